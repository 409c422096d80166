"""Packing: masked tensors <-> living values and bits, with a digest that vouches for every tensor."""

import hashlib
import json
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .arch import Arch

VALUES = '.values'
BITS = '.bits'
ARCH = 'supertickets.arch'
DIGEST = 'supertickets.digest'


def pack(weights: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masked tensors become `<name>.values` (the living weights, C order) and `<name>.bits` (the mask).

    The bits are uint8, flat, little-endian in each byte, `ceil(n / 8)` bytes; deflated where that is smaller.

    Args:
        weights: A state_dict.
        mask: `{name: bool tensor}`, True = alive.

    Returns:
        The packed tensors and their digest.
    """
    packed = {}
    for name, weight in weights.items():
        weight = weight.detach().cpu().contiguous()
        if name in mask:
            alive = mask[name].cpu()
            packed[name + VALUES] = weight[alive]
            packed[name + BITS] = _deflated(_to_bits(alive))
        else:
            packed[name] = weight
    packed[DIGEST] = digest(packed)
    return packed


def unpack(
    packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], arch: Arch | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Undo `pack`.

    Args:
        packed: What `pack` returned, unverified.
        shapes: The shapes of the dense tensors, by name.
        arch: What the weights are going into; must be what they were saved for. None for a stock timm model.

    Returns:
        The state_dict with zeros in place, and the mask.

    Raises:
        ValueError: A tensor was altered, is missing or does not fit its shape; the tensor is named.
    """
    check_digest(packed)
    if not torch.equal(packed.get(ARCH, torch.empty(0)), torch.empty(0) if arch is None else arch_tensor(arch)):
        raise ValueError('ticket: its weights were saved for another arch than the one that they are loaded into')
    weights, mask = {}, {}
    for name, tensor in packed.items():
        if name.endswith(VALUES) and name.removesuffix(VALUES) + BITS in packed:
            dense = name.removesuffix(VALUES)
            if dense not in shapes:
                raise ValueError(f'ticket has the tensor {dense!r}, which its architecture has not')
            bits = packed[dense + BITS]
            alive = _from_bits(dense, bits, shapes[dense])
            if tensor.ndim != 1 or int(alive.sum()) != tensor.numel():
                raise ValueError(
                    f'ticket: {dense!r} has {tensor.numel()} living values, but its mask counts {int(alive.sum())}'
                )
            weights[dense] = torch.zeros(shapes[dense], dtype=tensor.dtype).masked_scatter_(alive, tensor)
            mask[dense] = alive
        elif not (name in (ARCH, DIGEST) or (name.endswith(BITS) and name.removesuffix(BITS) + VALUES in packed)):
            weights[name] = tensor
    return weights, mask


def unpack_for_model(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's `checkpoint_filter_fn`: verify and unpack a packed ticket, pass anything else on."""
    if not is_packed(state_dict):
        return state_dict
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return unpack(state_dict, shapes, getattr(model, 'arch', None))[0]


def arch_tensor(arch: Arch) -> Tensor:
    """The arch as a uint8 tensor of JSON, so that the digest vouches for it too: strides leave no trace in shapes."""
    text = json.dumps(arch.to_json(), separators=(',', ':'), sort_keys=True)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def is_packed(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a packed ticket, as far as names tell."""
    return DIGEST in tensors or any(name.endswith(BITS) for name in tensors)


def tensor_hash(name: str, tensor: Tensor) -> bytes:
    """The sha256 of a tensor's name, dtype, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    head = f'{name}\n{str(tensor.dtype).removeprefix("torch.")}\n{",".join(map(str, tensor.shape))}\n'
    return hashlib.sha256(head.encode() + tensor.view(-1).view(torch.uint8).numpy().tobytes()).digest()


def digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """uint8 `(n, 32)`: the sha256 of every tensor but the digest itself, in the order of their names."""
    names = sorted(name for name in tensors if name != DIGEST)
    hashes = b''.join(tensor_hash(name, tensors[name]) for name in names)
    return torch.frombuffer(bytearray(hashes), dtype=torch.uint8).view(-1, 32)


def check_digest(tensors: Mapping[str, Tensor]) -> None:
    """Check every tensor against the digest among them.

    Raises:
        ValueError: The digest is missing or a tensor was altered, added or removed; the tensor is named if one is
            to blame.
    """
    if DIGEST not in tensors:
        raise ValueError(f'ticket has no digest tensor {DIGEST!r}: it cannot be verified')
    found, expected = digest(tensors), tensors[DIGEST]
    if expected.dtype != torch.uint8 or expected.shape != found.shape:
        raise ValueError(
            f'ticket: {DIGEST!r} of shape {tuple(expected.shape)} vouches for other than its {len(found)} tensors'
        )
    names = sorted(name for name in tensors if name != DIGEST)
    altered = [name for name, same in zip(names, (found == expected).all(1).tolist(), strict=True) if not same]
    if altered:
        raise ValueError(f'ticket: tensor {altered[0]!r} is not what was saved ({len(altered)} of {len(names)} differ)')


def _to_bits(alive: Tensor) -> bytes:
    flat = alive.flatten().to(torch.uint8)
    padded = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.uint8)
    padded[: flat.numel()] = flat
    place = 2 ** torch.arange(8, dtype=torch.uint8)
    return (padded.view(-1, 8) * place).sum(1, dtype=torch.uint8).numpy().tobytes()


def _deflated(bits: bytes) -> Tensor:
    small = zlib.compress(bits, 9)
    return torch.frombuffer(bytearray(small if len(small) < len(bits) else bits), dtype=torch.uint8)


def _from_bits(name: str, bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    expected = -(-count // 8)
    if bits.dtype != torch.uint8 or bits.ndim != 1 or bits.numel() > expected:
        raise ValueError(
            f'ticket: mask of {name!r} must be at most {expected} bytes, got {bits.dtype} {tuple(bits.shape)}'
        )
    raw = bits
    if bits.numel() < expected:
        raw = torch.frombuffer(bytearray(_inflated(name, bits.numpy().tobytes(), expected)), dtype=torch.uint8)
    place = torch.arange(8, dtype=torch.uint8)
    flat = ((raw.unsqueeze(1) >> place) & 1).flatten().bool()
    if flat[count:].any():
        raise ValueError(f'ticket: mask of {name!r} has bits beyond its {count} weights')
    return flat[:count].view(shape)


def _inflated(name: str, data: bytes, expected: int) -> bytes:
    """At most `expected` bytes are ever unpacked."""
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(data, expected)
        more = stream.decompress(stream.unconsumed_tail, 1)  # reads the checksum, if nothing else is left
    except zlib.error as error:
        raise ValueError(f'ticket: mask of {name!r} is not readable ({error})') from None
    if len(raw) != expected or more or not stream.eof or stream.unused_data:
        raise ValueError(f'ticket: mask of {name!r} does not unpack to {expected} bytes')
    return raw
