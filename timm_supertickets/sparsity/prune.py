"""Prune: scores + sparsity + scope -> Mask, with exactly k dead weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .mask import Mask

SCOPES = ('global', 'tensor')


@torch.no_grad()
def prune(
    scores: Mapping[str, Tensor],
    sparsity: float,
    *,
    scope: str = 'global',
    floor: int = 1,
    within: Mask | None = None,
) -> Mask:
    """Choose the weights with the lowest scores to die: exactly `round(sparsity * weights)` of them, ties included.

    Among equal scores the first in order of the tensors die first.

    Args:
        scores: Per prunable tensor a score for each weight, higher = more worth keeping.
        sparsity: Dead share of all weights, in [0, 1).
        scope: `'global'`: all weights compete; `'tensor'`: every tensor gets this sparsity, as nearly as
            `floor` and `within` allow.
        floor: Living weights that every tensor keeps, whatever its scores (or all of them, if it has fewer).
        within: Only its living weights may live; what is dead in it stays dead and counts.

    Returns:
        The mask, on the devices of the scores.

    Raises:
        ValueError: Sparsity or scope out of range, scores that are not finite, or fewer weights free to die
            than asked for.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f'sparsity must be in [0, 1), got {sparsity}')
    if scope not in SCOPES:
        raise ValueError(f'scope {scope!r} is unknown; choose from {", ".join(SCOPES)}')
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise ValueError(f'scores of {name!r} are not finite')
    if not scores:
        raise ValueError('nothing to prune: there are no scores')
    sizes = {name: score.numel() for name, score in scores.items()}
    dead = round(sparsity * sum(sizes.values()))
    ranks = {name: _protected(name, score, floor, within) for name, score in scores.items()}
    if scope == 'global':
        flat = torch.cat(list(ranks.values()))
        alive = _all_but_lowest(flat, dead, 'all tensors together').split(list(sizes.values()))
        return Mask({name: a.view(scores[name].shape) for name, a in zip(sizes, alive, strict=True)})
    quota = _quota(ranks, sparsity, dead)
    return Mask(
        {name: _all_but_lowest(rank, quota[name], name).view(scores[name].shape) for name, rank in ranks.items()}
    )


def _protected(name: str, score: Tensor, floor: int, within: Mask | None) -> Tensor:
    """Scores in float, flat; -inf for what must stay dead, +inf for the tensor's best, which must live."""
    rank = score.flatten().to(torch.promote_types(score.dtype, torch.float32))
    if within is not None:
        if name not in within or within[name].shape != score.shape:
            raise ValueError(f'the mask to prune within has no entry of shape {tuple(score.shape)} for {name!r}')
        rank = rank.masked_fill(~within[name].flatten().to(rank.device), -torch.inf)
    floor = min(floor, rank.numel() - int(rank.isneginf().sum()))
    return rank.masked_fill(_all_but_lowest(rank, rank.numel() - floor, name), torch.inf)


def _all_but_lowest(rank: Tensor, k: int, where: str) -> Tensor:
    """A flat mask with exactly k False, at the lowest ranks; among ties the first go first."""
    free = rank.numel() - int(rank.isposinf().sum())
    if k > free:
        raise ValueError(f'{k} weights should die in {where}, but only {free} of {rank.numel()} may')
    forced = int(rank.isneginf().sum())
    if k < forced:
        raise ValueError(f'{forced} weights of {where} are dead already, more than the {k} asked for')
    if k == 0:
        return torch.ones_like(rank, dtype=torch.bool)
    threshold = rank.kthvalue(k).values
    alive = rank > threshold
    ties = (rank == threshold).nonzero().squeeze(1)
    surplus = rank.numel() - k - int(alive.sum())
    return alive.index_fill_(0, ties[ties.numel() - surplus :], True)


def _quota(ranks: Mapping[str, Tensor], sparsity: float, dead: int) -> dict[str, int]:
    """Whole numbers per tensor that add up to `dead`: as near to this sparsity as what is dead already, and what
    must live, allow.
    """
    wanted = {name: sparsity * rank.numel() for name, rank in ranks.items()}
    least = {name: int(rank.isneginf().sum()) for name, rank in ranks.items()}
    most = {name: rank.numel() - int(rank.isposinf().sum()) for name, rank in ranks.items()}
    quota = {name: min(max(int(wanted[name]), least[name]), most[name]) for name in ranks}
    while missing := dead - sum(quota.values()):
        one = 1 if missing > 0 else -1
        movable = [name for name in quota if least[name] <= quota[name] + one <= most[name]]
        if not movable:
            raise ValueError(
                f'{dead} weights should die in all tensors together, but {sum(least.values())} are dead already '
                f'and only {sum(most.values())} may die'
            )
        movable.sort(key=lambda name: one * (quota[name] - wanted[name]))
        for name in movable[: abs(missing)]:
            quota[name] += one
    return quota
