"""Channel groups: which tensors share an axis, and the one function that thins them all alike."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Keep = dict[str, Tensor]
"""A keep plan: gate name -> bool tensor over the group's channels, True = lives on."""


TOKENS = 0
"""Stands for the kernel size of tokens, which see the whole map."""


class Member(NamedTuple):
    """Dimension `dim` of tensor `name` runs along channels `start` to `stop` of its group."""

    name: str
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class ChannelGroup:
    """One gate and every (tensor, dim) that shares its axis.

    Args:
        block: Index of the block in the arch.
        gate: Name of the batch-norm scale whose magnitude is the channel's importance.
        shift: Name of the batch-norm shift beside it. A gate that is zero silences a channel only with its shift.
        kernels: `(kernel size, channels)` in the order of the axis; for tokens `((TOKENS, tokens),)`.
        members: Every tensor that is thinned with the gate, the gate included.
        inside: Prefix of all tensors of the block, which go when no channel is left.
        output: Scale and shift of the block's last batch norm, silenced with a dropped block; empty if the
            block cannot be dropped (it is not residual).
        shared: Weights that are no members, but are used once for every channel.
    """

    block: int
    gate: str
    shift: str
    kernels: tuple[tuple[int, int], ...]
    members: tuple[Member, ...]
    inside: str
    output: tuple[str, ...]
    shared: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Length of the shared axis."""
        return sum(channels for _, channels in self.kernels)

    @property
    def droppable(self) -> bool:
        """Whether the block may lose all of its channels and become the identity."""
        return bool(self.output)

    def kept_kernels(self, keep: Tensor) -> tuple[tuple[int, int], ...]:
        """`(kernel size, channels)` of what is left, without the kernel sizes that died."""
        parts = zip(self.kernels, keep.split([channels for _, channels in self.kernels]), strict=True)
        return tuple((kernel, int(part.sum())) for (kernel, _), part in parts if part.any())


def check_keep(groups: Iterable[ChannelGroup], keep: Keep) -> None:
    """Check a keep plan against the groups that it thins.

    Raises:
        ValueError: An unknown gate, a plan of another length, or a block emptied that is not residual.
    """
    by_gate = {group.gate: group for group in groups}
    for gate, alive in keep.items():
        group = by_gate.get(gate)
        if group is None:
            raise ValueError(f'keep plan names {gate!r}, which is no gate; gates are {", ".join(by_gate)}')
        if alive.dtype != torch.bool or alive.shape != (group.channels,):
            raise ValueError(
                f'keep plan of {gate!r} must be {group.channels} bools, got {alive.dtype} {tuple(alive.shape)}'
            )
        if not alive.any() and not group.droppable:
            raise ValueError(f'keep plan of {gate!r} leaves no channel, and the block is not residual')


def take(tensors: Mapping[str, Tensor], groups: Iterable[ChannelGroup], keep: Keep) -> dict[str, Tensor]:
    """Thin tensors along their shared axes; serves weights, buffers, masks, EMA and optimizer moments alike.

    Args:
        tensors: By parameter or buffer name. Names may be missing, and scalars (step counts) and dimensions of
            size 1 (factored moments) are left alone, but any other tensor must have its parameter's layout.
        groups: The channel groups of the model that the names belong to.
        keep: Keep plan; groups without an entry stay whole.

    Returns:
        The tensors that are left. Those in no thinned group are the very same objects.
    """
    taken = dict(tensors)
    for group in groups:
        if group.gate not in keep:
            continue
        alive = keep[group.gate]
        for name, dim, start, stop in group.members:
            part = alive[start:stop]
            if name not in taken or part.all():
                continue
            if not part.any():
                del taken[name]
            elif taken[name].ndim and taken[name].size(dim) != 1:
                index = part.nonzero().squeeze(1).to(taken[name].device)
                taken[name] = taken[name].index_select(dim, index)
        if not alive.any():
            taken = {name: tensor for name, tensor in taken.items() if not name.startswith(group.inside)}
    return taken
