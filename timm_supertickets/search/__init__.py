"""Search: how important a channel is, which channels live, and the smaller net that is left."""
