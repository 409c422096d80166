"""Arch: a frozen value that names one member of a space."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .channels import TOKENS, ChannelGroup

Kernels = tuple[tuple[int, int], ...]

# far beyond any member of a space; what comes from a file must not cost memory before it can be compared
MAX_BLOCKS = 1000
MAX_NUMBER = 2**14
MAX_WEIGHTS = 2**31


@dataclass(frozen=True)
class Arch:
    """One member of a space: per block, the hidden channels per kernel size.

    Args:
        space: The family of architectures, e.g. `'mbv2'`.
        shape: What all members share (widths between the blocks, strides), as `{name: value}`.
            Stored as nested tuples, so that an `Arch` can be hashed, compared and deep-copied.
        blocks: Per block in network order `{kernel size: hidden channels}`; `{}` is a dropped block.
        tokens: Per block the tokens of its attention path, 0 for none; empty where the space has no such path.

    Raises:
        ValueError: A kernel size that is not odd, a channel count that is not positive, tokens for other than the
            blocks, or numbers that are too large for any net.
    """

    space: str
    shape: tuple[tuple[str, Any], ...]
    blocks: tuple[Kernels, ...]
    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.space, str):
            raise ValueError(f'arch: space must be a name such as "mbv2", got {self.space!r}')
        object.__setattr__(self, 'shape', _frozen_shape(self.shape))
        object.__setattr__(self, 'blocks', _frozen_blocks(self.blocks))
        object.__setattr__(self, 'tokens', _frozen_tokens(self.tokens, len(self.blocks)))
        _check_extent(self)

    def __getitem__(self, name: str) -> Any:
        """A value of the shape by its name."""
        for key, value in self.shape:
            if key == name:
                return value
        raise ValueError(f'arch of space {self.space!r} has no {name!r}; it has: {", ".join(k for k, _ in self.shape)}')

    @property
    def widest(self) -> float:
        """The largest number of the shape: no layer between blocks is wider."""
        return max(map(abs, _numbers(self.shape)), default=1)

    def shrunk(self, groups: Iterable[ChannelGroup], keep: Mapping[str, Tensor]) -> 'Arch':
        """The member that is left when only the channels marked in `keep` live on.

        Args:
            groups: The model's channel groups.
            keep: Per gate, a bool tensor over its channels; groups without an entry stay whole.
        """
        blocks, tokens = list(self.blocks), list(self.tokens)
        for group in groups:
            if group.gate in keep:
                kept = group.kept_kernels(keep[group.gate])
                if TOKENS in dict(group.kernels):
                    tokens[group.block] = dict(kept).get(TOKENS, 0)
                else:
                    blocks[group.block] = kept
        return Arch(self.space, self.shape, tuple(blocks), tuple(tokens))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` is its inverse."""
        data: dict[str, Any] = {
            'space': self.space,
            'shape': {key: _thawed(value) for key, value in self.shape},
            'blocks': [{str(kernel): channels for kernel, channels in block} for block in self.blocks],
        }
        return {**data, 'tokens': list(self.tokens)} if self.tokens else data

    @staticmethod
    def from_json(data: Any) -> 'Arch':
        """Read what `to_json` wrote.

        Raises:
            ValueError: Something is missing, unknown or of the wrong kind.
        """
        if isinstance(data, Arch):
            return data
        if not isinstance(data, Mapping) or set(data) - {'tokens'} != {'space', 'shape', 'blocks'}:
            found = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f'arch: expected the keys blocks, shape and space, got {found}')
        return Arch(data['space'], data['shape'], data['blocks'], data.get('tokens', ()))


def _frozen_shape(shape: Any) -> tuple[tuple[str, Any], ...]:
    try:
        named = {str(key): _frozen(value) for key, value in (shape.items() if isinstance(shape, Mapping) else shape)}
    except (TypeError, ValueError):
        raise ValueError(f'arch: shape must map names to numbers or lists of them, got {shape!r}') from None
    return tuple(sorted(named.items()))  # archs are equal whatever the order of a JSON file


def _frozen(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_frozen(v) for v in value)
    if value is not None and not isinstance(value, (int, float, str)):
        raise TypeError
    return value


def _thawed(value: Any) -> Any:
    return [_thawed(v) for v in value] if isinstance(value, tuple) else value


def _frozen_blocks(blocks: Any) -> tuple[Kernels, ...]:
    if not isinstance(blocks, Sequence) or isinstance(blocks, str):
        raise ValueError(f'arch: blocks must be a list of {{kernel size: channels}}, got {blocks!r}')
    return tuple(_frozen_kernels(index, block) for index, block in enumerate(blocks))


def _frozen_tokens(tokens: Any, blocks: int) -> tuple[int, ...]:
    if not isinstance(tokens, Sequence) or not all(isinstance(n, int) and not isinstance(n, bool) for n in tokens):
        raise ValueError(f'arch: tokens must be a list of numbers, got {tokens!r}')
    if tokens and (len(tokens) != blocks or min(tokens) < 0):
        raise ValueError(f'arch: tokens must be {blocks} numbers from 0, one per block, got {list(tokens)}')
    return tuple(tokens)


def _check_extent(arch: Arch) -> None:
    numbers = list(_numbers(arch.shape))
    hidden = sum(channels for block in arch.blocks for _, channels in block) + sum(arch.tokens)
    if len(arch.blocks) > MAX_BLOCKS or len(numbers) > MAX_NUMBER:
        raise ValueError(f'arch: {len(arch.blocks)} blocks are too many for a net; the limit is {MAX_BLOCKS}')
    if not all(abs(number) <= MAX_NUMBER for number in numbers):
        raise ValueError(f'arch: its shape has a number above the limit of {MAX_NUMBER}')
    if 2 * hidden * arch.widest > MAX_WEIGHTS:
        raise ValueError(f'arch: {hidden} hidden channels at these widths are too many for a net')


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, tuple):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, (int, float)):
        yield value


def _frozen_kernels(index: int, block: Any) -> Kernels:
    try:
        pairs = [(int(str(k)), c) for k, c in (block.items() if isinstance(block, Mapping) else block)]
    except (TypeError, ValueError):
        raise ValueError(f'arch: block {index} must be {{kernel size: channels}}, got {block!r}') from None
    for kernel, channels in pairs:
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f'arch: block {index} has kernel size {kernel}; kernel sizes are odd, e.g. 3, 5, 7')
        if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
            raise ValueError(f'arch: block {index} has {channels!r} channels of kernel size {kernel}; need at least 1')
    if len({kernel for kernel, _ in pairs}) != len(pairs):
        raise ValueError(f'arch: block {index} names a kernel size twice: {block!r}')
    return tuple(sorted(pairs))
