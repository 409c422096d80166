"""Masks: which weights live, when they die, and when they come back."""
