"""Prune: scores + sparsity + scope -> Mask, with exactly k dead weights."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isqrt

import torch
from torch import Tensor

from ..channels import ChannelGroup
from .mask import Mask

SCOPES = ('global', 'tensor')
SAMPLE = 2**16  # ranks that are sorted to know roughly where the border lies


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
        if score.numel() and not all(torch.isfinite(end) for end in score.aminmax()):
            raise ValueError(f'scores of {name!r} are not finite')
    if not scores:
        raise ValueError('nothing to prune: there are no scores')
    dtype = torch.float32
    for score in scores.values():
        dtype = torch.promote_types(dtype, score.dtype)
    entrants = [_Entrant(name, score, dtype, floor, within) for name, score in scores.items()]
    groups, found = tuple(groups), dict[str, Tensor]()
    mask = _prune(entrants, sparsity, pattern, scope)
    while _move_cut_channels_last_(entrants, found, mask, groups):
        mask = _prune(entrants, sparsity, pattern, scope)
    return mask


@dataclass
class _Entrant:
    """A tensor whose weights compete. Its ranks are made anew whenever they are looked at: memory holds one tensor's.

    Args:
        name: The tensor's.
        score: Of its weights.
        dtype: What ranks are compared in.
        floor: Weights that must live; fewer where fewer may.
        within: Which may live.
        last: Slices that come after all others, as dimension and index.
        shift: What is taken from the scores of these.
    """

    name: str
    score: Tensor
    dtype: torch.dtype
    floor: int
    within: Mask | None
    last: list[tuple[int, Tensor]] = field(default_factory=list)
    shift: float = 0.0

    def __post_init__(self) -> None:
        self.size, self.dead = self.score.numel(), 0
        if self.within is not None:
            alive = self.within.get(self.name)
            if alive is None or alive.shape != self.score.shape:
                raise ValueError(
                    f'the mask to prune within has no entry of shape {tuple(self.score.shape)} for {self.name!r}'
                )
            self.dead = self.size - int(alive.count_nonzero())
        self.floor = min(self.floor, self.size - self.dead)

    @property
    def may_die(self) -> int:
        """How many may, what is dead included."""
        return self.size - self.floor

    def ranks(self) -> Tensor:
        """Scores, flat; lower for what comes last, -inf for what must stay dead."""
        ranks = self.score.to(self.dtype)
        if self.last:
            marks = torch.zeros_like(ranks, dtype=torch.bool)
            for dim, index in self.last:
                marks.transpose(0, dim)[index] = True
            ranks = torch.where(marks, ranks - self.shift, ranks)
        if self.dead:
            assert self.within is not None
            ranks = ranks.masked_fill(~self.within[self.name].to(ranks.device), -inf)
        return ranks.flatten()


def _move_cut_channels_last_(
    entrants: Sequence[_Entrant], found: dict[str, Tensor], mask: Mask, groups: Sequence[ChannelGroup]
) -> bool:
    """Let channels that have no living weight left in some tensor come last in all; returns whether any are new.

    Args:
        entrants: The tensors.
        found: Per group, by its gate, the channels that were cut before; those of now are added.
        mask: What lives.
        groups: The channels.
    """
    by_name, new = {one.name: one for one in entrants}, False
    for group in groups:
        members = [member for member in group.members if member.name in mask]
        cut = torch.zeros(group.channels, dtype=torch.bool)
        for name, dim, start, stop in members:
            cut[start:stop] |= ~mask[name].transpose(0, dim).flatten(1).any(1).cpu()
        before = found.get(group.gate, torch.zeros_like(cut))
        if (cut & ~before).any():
            found[group.gate] = cut | before
            for name, dim, start, stop in members:
                index = found[group.gate][start:stop].nonzero().squeeze(1)
                by_name[name].last.append((dim, index.to(by_name[name].score.device)))
            new = True
    if new and not any(one.shift for one in entrants):
        low, high = min(float(one.score.min()) for one in entrants), max(float(one.score.max()) for one in entrants)
        for one in entrants:
            one.shift = high - low + 1
    return new


def _prune(entrants: Sequence[_Entrant], sparsity: float, pattern: tuple[int, int] | None, scope: str) -> Mask:
    if pattern is not None:
        return _prune_groups(entrants, sparsity, *pattern)
    dead = round(sparsity * sum(one.size for one in entrants))
    if scope == 'global':
        alive = _prune_together(entrants, dead)
    else:
        quota = _quota(entrants, sparsity, dead)
        alive = {one.name: _all_but_lowest([one], quota[one.name])[one.name] for one in entrants}
    return Mask({one.name: alive[one.name].view(one.score.shape) for one in entrants})


def _prune_together(entrants: Sequence[_Entrant], dead: int) -> dict[str, Tensor]:
    """Flat masks with so many False in all tensors together; a tensor that would fall below its floor keeps that."""
    size, forced = sum(one.size for one in entrants), sum(one.dead for one in entrants)
    free = sum(one.may_die for one in entrants)
    if dead > free:
        raise ValueError(f'{dead} weights should die in all tensors together, but only {free} of {size} may')
    if dead < forced:
        raise ValueError(f'{forced} weights of all tensors together are dead already, more than the {dead} asked for')
    settled: dict[str, Tensor] = {}
    while True:
        left = [one for one in entrants if one.name not in settled]
        alive = _all_but_lowest(left, dead - sum(one.may_die for one in entrants if one.name in settled))
        starved = [one for one in left if int(alive[one.name].count_nonzero()) < one.floor]
        if not starved:
            return {**settled, **alive}
        for one in starved:
            settled |= _all_but_lowest([one], one.may_die)


def _all_but_lowest(entrants: Sequence[_Entrant], k: int) -> dict[str, Tensor]:
    """Flat masks with exactly k False in all, at the lowest ranks; among ties the first go first."""
    if k == sum(one.dead for one in entrants):
        return {one.name: ~one.ranks().isneginf() for one in entrants}
    border = _kth_lowest(entrants, k)
    alive = {one.name: one.ranks() > border for one in entrants}
    surplus = sum(one.size for one in entrants) - k - sum(int(a.count_nonzero()) for a in alive.values())
    for one in reversed(entrants):
        if surplus:
            ties = (one.ranks() == border).nonzero().squeeze(1)
            living = ties[max(0, ties.numel() - surplus) :]
            alive[one.name].index_fill_(0, living, True)
            surplus -= living.numel()
    return alive


def _kth_lowest(entrants: Sequence[_Entrant], k: int) -> Tensor:
    """The k-th lowest of all ranks, counted from 1.

    A sample of the ranks, sorted, says between which two of them it should lie; only what lies there is looked through.
    """
    size = sum(one.size for one in entrants)
    stride = max(1, size // SAMPLE)
    sample = torch.cat([one.ranks()[::stride] for one in entrants]).sort().values
    place, margin = k * sample.numel() // size, 4 * isqrt(sample.numel()) + len(entrants)
    ends = sample.new_tensor([-inf, inf])
    low = sample[place - margin] if place >= margin else ends[0]
    high = sample[place + margin] if place + margin < sample.numel() else ends[1]
    below, at_low, between = 0, 0, []
    for one in entrants:
        ranks = one.ranks()
        below += int((ranks < low).count_nonzero())
        at_low += int((ranks == low).count_nonzero())
        between.append(ranks[(ranks > low) & (ranks <= high)])
    if below < k <= below + at_low:
        return low
    inside = torch.cat(between)
    if not below + at_low < k <= below + at_low + inside.numel():  # the sample was not like the rest
        below, at_low, inside = 0, 0, torch.cat([one.ranks() for one in entrants])
    return inside.kthvalue(k - below - at_low).values


def _pattern(scope: str) -> tuple[int, int] | None:
    """(N, M) of a scope 'N:M'; None if it is none."""
    found = re.fullmatch(r'([1-9][0-9]*):([1-9][0-9]*)', scope)
    n, m = map(int, found.groups()) if found else (1, 0)
    return (n, m) if n <= m else None


def _prune_groups(entrants: Sequence[_Entrant], sparsity: float, n: int, m: int) -> Mask:
    """Let the best n of every m consecutive weights of an output live, where m divides its inputs."""
    if abs(sparsity - (1 - n / m)) > 1e-6:
        raise ValueError(f'scope {n}:{m} means sparsity {1 - n / m:g}, got {sparsity}')
    mask = Mask()
    for one in entrants:
        ranks = one.ranks()
        alive = ~ranks.isneginf()
        if one.score.shape[1:].numel() % m == 0:
            groups = alive.view(-1, m)
            if (groups.sum(1) < n).any():
                raise ValueError(
                    f'{n} of every {m} weights of {one.name!r} should live, but in some groups fewer are alive'
                )
            if one.floor > len(groups) * n:
                raise ValueError(
                    f'{n}:{m} leaves {one.name!r} {len(groups) * n} living weights, fewer than floor={one.floor}'
                )
            lowest = ranks.view(-1, m).argsort(dim=1, stable=True)[:, : m - n]
            alive = groups.scatter(1, lowest, False)
        mask[one.name] = alive.view(one.score.shape)
    if all(one.score.shape[1:].numel() % m for one in entrants):
        raise ValueError(f'scope {n}:{m} fits no tensor: {m} divides the inputs of none')
    return mask


def _quota(entrants: Sequence[_Entrant], sparsity: float, dead: int) -> dict[str, int]:
    """Whole numbers per tensor that add up to `dead`: as near to this sparsity as what is dead already, and what
    must live, allow.
    """
    wanted = {one.name: sparsity * one.size for one in entrants}
    least = {one.name: one.dead for one in entrants}
    most = {one.name: one.may_die for one in entrants}
    quota = {name: min(max(int(wanted[name]), least[name]), most[name]) for name in wanted}
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
