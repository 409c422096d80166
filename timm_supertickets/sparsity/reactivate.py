"""Reactivation: which dead weights may compete again until the next event. Functions from a mask to a mask."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..channels import ChannelGroup
from .mask import Mask
from .prune import prune


def reset(mask: Mask) -> Mask:
    """Open the mask: all weights train until the next event, the dead ones from zero.

    Source:
        You et al., SuperTickets, https://arxiv.org/abs/2207.03677.
    """
    return Mask({name: torch.ones_like(alive) for name, alive in mask.items()})


def regrow(
    mask: Mask,
    scores: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    share: float,
    groups: Iterable[ChannelGroup] = (),
) -> Mask:
    """Trade the weakest living weights for the dead ones with the largest gradients; the sparsity stays.

    The weights that die must still be zeroed, and those that come back start from zero.

    Args:
        mask: The mask after a prune.
        scores: Per tensor the scores that it was pruned by.
        gradients: Per tensor the dense gradient of the loss.
        share: Share of the living weights that is traded, in [0, 1).
        groups: Channels that die whole, as in `prune`.

    Source:
        Evci et al., Rigging the Lottery (RigL), https://arxiv.org/abs/1911.11134.
    """
    if not 0 <= share < 1:
        raise ValueError(f'share of weights to regrow must be in [0, 1), got {share}')
    total, alive = mask.total, mask.alive
    traded = min(round(share * alive), total - alive)
    if traded == 0:
        return mask
    kept = prune(scores, (total - alive + traded) / total, within=mask, groups=groups)
    del scores  # candidates take as much memory; a decorator would hold on to what it was called with
    candidates = {name: gradients[name].detach().abs().masked_fill_(mask[name], -1.0) for name in mask}
    grown = prune(candidates, (total - traded) / total, floor=0)
    return Mask({name: kept[name] | grown[name] for name in mask})
