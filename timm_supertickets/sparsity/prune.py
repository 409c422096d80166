"""Prune: scores + sparsity + scope -> Mask, with exactly k dead weights."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..channels import ChannelGroup
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
    groups: Iterable[ChannelGroup] = (),
) -> Mask:
    """Choose the weights with the lowest scores to die: exactly `round(sparsity * weights)` of them, ties included.

    Among equal scores the first in order of the tensors die first. With channel groups, a channel that has lost all of
    its weights in one tensor loses those in the others too, and better ones live instead of them: nothing goes through
    it any more, and the batch norms around it would only blow up its rounding errors.

    Args:
        scores: Per prunable tensor a score for each weight, higher = more worth keeping.
        sparsity: Dead share of all weights, in [0, 1).
        scope: `'global'`: all weights compete; `'tensor'`: every tensor gets this sparsity, as nearly as
            `floor` and `within` allow; `'N:M'`, e.g. `'2:4'`: exactly N live of every M consecutive weights of
            `weight.flatten(1)`, the inputs of one output. Tensors whose inputs M does not divide, such as 3x3
            depthwise ones for 4, lose nothing and still count in the mask's total. `sparsity` must be `1 - N / M`.
        floor: Living weights that every tensor keeps, whatever its scores (or all of them, if it has fewer).
        within: Only its living weights may live; what is dead in it stays dead and counts.
        groups: Channels that live or die whole, as far as there are other weights that may live.

    Returns:
        The mask, on the devices of the scores.

    Raises:
        ValueError: Sparsity or scope out of range, scores that are not finite, or fewer weights free to die
            than asked for. For `'N:M'` also a sparsity that is not the pattern's, a floor above it, a group with fewer
            than N weights alive in `within`, or no tensor that M divides.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f'sparsity must be in [0, 1), got {sparsity}')
    pattern = _pattern(scope)
    if scope not in SCOPES and pattern is None:
        raise ValueError(f'scope {scope!r} is unknown; choose from {", ".join(SCOPES)}, N:M (such as 2:4, N <= M)')
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise ValueError(f'scores of {name!r} are not finite')
    if not scores:
        raise ValueError('nothing to prune: there are no scores')
    mask = _prune(scores, sparsity, pattern, scope, floor, within)
    groups, lost = tuple(groups), {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}
    while _lose_cut_channels_(lost, mask, groups):
        mask = _prune(_with_last(scores, lost), sparsity, pattern, scope, floor, within)
    return mask


def _with_last(scores: Mapping[str, Tensor], lost: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores of which some are lower than all others, in the same order among each other."""
    low, high = min(float(score.min()) for score in scores.values()), max(float(s.max()) for s in scores.values())
    return {name: torch.where(lost[name], score - (high - low + 1), score) for name, score in scores.items()}


def _lose_cut_channels_(lost: dict[str, Tensor], mask: Mask, groups: Iterable[ChannelGroup]) -> bool:
    """Mark all weights of channels that have no living weight left in some tensor; returns whether any are new."""
    new = False
    for group in groups:
        masked = [member for member in group.members if member.name in mask]
        cut = torch.zeros(group.channels, dtype=torch.bool)
        for name, dim, start, stop in masked:
            cut[start:stop] |= ~mask[name].transpose(0, dim).flatten(1).any(1).cpu()
        for name, dim, start, stop in masked:
            marks, index = lost[name].transpose(0, dim), cut[start:stop].nonzero().squeeze(1).to(lost[name].device)
            new = new or not bool(marks[index].all())
            marks[index] = True
    return new


def _prune(
    scores: Mapping[str, Tensor],
    sparsity: float,
    pattern: tuple[int, int] | None,
    scope: str,
    floor: int,
    within: Mask | None,
) -> Mask:
    if pattern is not None:
        return _prune_groups(scores, sparsity, *pattern, floor, within)
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


def _pattern(scope: str) -> tuple[int, int] | None:
    """(N, M) of a scope 'N:M'; None if it is none."""
    found = re.fullmatch(r'([1-9][0-9]*):([1-9][0-9]*)', scope)
    n, m = map(int, found.groups()) if found else (1, 0)
    return (n, m) if n <= m else None


def _prune_groups(
    scores: Mapping[str, Tensor], sparsity: float, n: int, m: int, floor: int, within: Mask | None
) -> Mask:
    """Let the best n of every m consecutive weights of an output live, where m divides its inputs."""
    if abs(sparsity - (1 - n / m)) > 1e-6:
        raise ValueError(f'scope {n}:{m} means sparsity {1 - n / m:g}, got {sparsity}')
    mask = Mask()
    for name, score in scores.items():
        rank = _ranked(name, score, within)
        alive = ~rank.isneginf()
        if score.shape[1:].numel() % m == 0:
            groups = alive.view(-1, m)
            if (groups.sum(1) < n).any():
                raise ValueError(
                    f'{n} of every {m} weights of {name!r} should live, but in some groups fewer are alive'
                )
            if min(floor, score.numel()) > len(groups) * n:
                raise ValueError(f'{n}:{m} leaves {name!r} {len(groups) * n} living weights, fewer than floor={floor}')
            lowest = rank.view(-1, m).argsort(dim=1, stable=True)[:, : m - n]
            alive = groups.scatter(1, lowest, False)
        mask[name] = alive.view(score.shape)
    if all(score.shape[1:].numel() % m for score in scores.values()):
        raise ValueError(f'scope {n}:{m} fits no tensor: {m} divides the inputs of none')
    return mask


def _ranked(name: str, score: Tensor, within: Mask | None) -> Tensor:
    """Scores in float, flat; -inf for what must stay dead."""
    rank = score.flatten().to(torch.promote_types(score.dtype, torch.float32))
    if within is None:
        return rank
    if name not in within or within[name].shape != score.shape:
        raise ValueError(f'the mask to prune within has no entry of shape {tuple(score.shape)} for {name!r}')
    return rank.masked_fill(~within[name].flatten().to(rank.device), -torch.inf)


def _protected(name: str, score: Tensor, floor: int, within: Mask | None) -> Tensor:
    """Ranked scores, and +inf for the tensor's best, which must live."""
    rank = _ranked(name, score, within)
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
