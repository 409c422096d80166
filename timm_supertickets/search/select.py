"""Select: importance -> keep plan, by threshold or by budget."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..channels import ChannelGroup, Keep


def select_by_threshold(groups: Sequence[ChannelGroup], importance: Mapping[str, Tensor], threshold: float) -> Keep:
    """Channels whose importance is below the threshold die (the paper's rule).

    Args:
        groups: The model's channel groups.
        importance: Per gate a score per channel.
        threshold: What to reach to live on.

    Returns:
        The plan. A block that is not residual keeps at least its best channel.
    """
    keep = {}
    for group in groups:
        score = importance[group.gate].detach().cpu()
        keep[group.gate] = (score >= threshold) | _last_one(group, score)
    return keep


def select_by_budget(
    groups: Sequence[ChannelGroup],
    importance: Mapping[str, Tensor],
    channel_macs: Mapping[str, Tensor],
    total: float,
    budget: float,
) -> Keep:
    """The least important channels die, over all blocks, until the model fits the budget.

    Args:
        groups: The model's channel groups.
        importance: Per gate a score per channel.
        channel_macs: Per gate the MACs that each channel costs.
        total: MACs of the whole model as it is.
        budget: MACs that it may cost.

    Returns:
        The plan. A block that is not residual keeps at least its best channel.

    Raises:
        ValueError: The budget is below what is left with the fewest channels.
    """
    scores = {group.gate: importance[group.gate].detach().cpu() for group in groups}
    protected = {group.gate: _last_one(group, scores[group.gate]) for group in groups}
    excess = total - budget
    if excess <= 0 or not groups:
        if excess > 0:
            raise ValueError(
                f'budget of {budget:.0f} MACs is out of reach: the model costs {total:.0f}, none of it searchable'
            )
        return {group.gate: torch.ones(group.channels, dtype=torch.bool) for group in groups}
    score = torch.cat([s.double().masked_fill(protected[gate], torch.inf) for gate, s in scores.items()])
    order = score.argsort(stable=True)
    saved = torch.cat([channel_macs[gate] for gate in scores])[order].cumsum(0)
    dying = int((saved < excess).sum()) + 1
    free = score.numel() - int(score.isinf().sum())
    if dying > free:
        least = total - (saved[free - 1].item() if free else 0.0)
        raise ValueError(f'budget of {budget:.0f} MACs is out of reach: with the fewest channels {least:.0f} are left')
    alive = torch.ones_like(score, dtype=torch.bool).index_fill_(0, order[:dying], False)
    return dict(zip(scores, alive.split([group.channels for group in groups]), strict=True))


def _last_one(group: ChannelGroup, score: Tensor) -> Tensor:
    """Marks the best channel of a block that must not lose all of them."""
    marked = torch.zeros(group.channels, dtype=torch.bool)
    if not group.droppable:
        marked[score.argmax()] = True
    return marked
