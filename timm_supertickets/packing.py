"""Packing: masked tensors <-> living values and their places, with a digest that vouches for every tensor.

A coded tensor is uint8: a kind, the number of dimensions, the dimensions as little-endian uint32, and a payload.
Codes are of fixed width, so that NumPy reads them at the speed of memory, and no file unpacks to more than it says.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models import PretrainedCfg
from torch import Tensor, nn

from .arch import Arch
from .files import parse_json

FORMAT_VERSION = 1
VALUES = '.values'
BITS = '.bits'
FRAME = '.frame'
CONFIG = 'supertickets.config'
DIGEST = 'supertickets.digest'

_RAW_BITS, _SPLIT = 0, 1
# the kind of a frame says what its numbers are
_FLOATS = {2: torch.float32, 3: torch.float16, 4: torch.bfloat16, 5: torch.float64}
_KINDS = {dtype: kind for kind, dtype in _FLOATS.items()}
# a frame costs time at every load: it must save so many bytes
_FRAME_SAVES = 512
# codes may unpack to so many numbers per byte of the file, or to so many at least: 1 KiB and 64 MiB of float32.
# A large net with one weight in a thousand alive needs 185 per byte
_NUMBERS_PER_BYTE = 256
_NUMBERS = 2**24
_DIMENSIONS = 8
# what a ticket says of timm's pretrained_cfg
CFG_KEYS = (
    'tag', 'input_size', 'fixed_input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std', 'num_classes',
    'label_names', 'pool_size', 'first_conv', 'classifier', 'license', 'description',
)  # fmt: skip
# what timm adds to that of a config.json, by where it came from
_WHENCE = {'local-dir': ('source', 'file'), 'hf-hub': ('source', 'hf_hub_id')}


def pack(weights: Mapping[str, Tensor], mask: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Masked tensors become `<name>.values` (the living weights, C order) and `<name>.bits` (which ones live).

    Bits are little-endian in each byte. Where that is smaller, the places of the living weights are stored instead,
    split as Elias and Fano do. Large tensors of floats, values among them, become `<its name>.frame` where that is
    smaller: floats of like magnitude share most of their exponent's bits.

    Args:
        weights: A state_dict.
        mask: `{name: bool tensor}`, True = alive.
        config: What config.json says. Stored among the tensors, because who loads weights sees tensors alone.

    Returns:
        The packed tensors, the config and their digest.

    Raises:
        ValueError: Two tensors would have the same name, or next to nothing is alive.
    """
    parts: list[tuple[str, Tensor]] = [(CONFIG, _bytes(dump_config(config)))]
    for name, weight in weights.items():
        weight = weight.detach().cpu().contiguous()
        if name in mask:
            alive = mask[name].cpu()
            parts.append((name + BITS, _bits(alive)))
            name, weight = name + VALUES, weight[alive]
        frame = _frame(weight)
        parts.append((name, weight) if frame is None else (name + FRAME, frame))
    packed = dict(parts)
    if len(packed) < len(parts) or DIGEST in packed:
        raise ValueError('ticket: a tensor has a name that packing needs for another one')
    packed[DIGEST] = digest(packed)
    if sum(weight.numel() for weight in weights.values()) > _room(packed):
        raise ValueError('ticket: so few weights are alive that no file of its size would be trusted to hold them')
    return packed


def unpack(packed: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Undo `pack`.

    Args:
        packed: What `pack` returned, unverified.

    Returns:
        The state_dict with zeros in place, and the mask.

    Raises:
        ValueError: A tensor was altered or cannot be read; it is named.
    """
    check_digest(packed)
    weights, places = _unpack(packed)
    return weights, {name: _alive(tuple(weights[name].shape), living, name) for name, living in places.items()}


def unpack_for_model(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's `checkpoint_filter_fn`: verify and unpack a packed ticket, pass anything else on.

    Masked weights are unpacked into the model's own tensors where those are alike: loading copies them once less.

    Raises:
        ValueError: A tensor was altered, or the model is not what the ticket was saved for.
    """
    if not is_packed(state_dict):
        return state_dict
    check_version(state_dict)
    check_digest(state_dict)
    check_model(read_config(state_dict), model)
    return _unpack(state_dict, model)[0]


def check_model(config: Mapping[str, Any], model: Any) -> None:
    """Check that a model is the one that a ticket was saved for: its arch, and what timm read in config.json.

    Args:
        config: The ticket's.
        model: Made by timm, its weights not loaded yet.

    Raises:
        ValueError: It is another one.
    """
    arch, saved = getattr(model, 'arch', None), config['model_args'].get('arch')
    if (arch if isinstance(arch, Arch) else None) != (None if saved is None else Arch.from_json(saved)):
        raise ValueError('ticket: its weights were saved for another arch than the one that they are loaded into')
    added = _WHENCE.get(model.pretrained_cfg.get('source'))
    if added is None:
        return
    cfg = PretrainedCfg(**config['pretrained_cfg'], architecture=config['architecture']).to_dict()
    found = {key: value for key, value in model.pretrained_cfg.items() if key not in added}
    check_same(config['model_args'], model.pretrained_model_args, 'config.json', 'model_args.')
    check_same(cfg, found, 'config.json (or pretrained_cfg_overlay)', 'pretrained_cfg.')


def check_same(saved: Any, found: Any, where: str, path: str = '') -> None:
    """Check that a config says what was saved.

    Raises:
        ValueError: It does not; the key is named.
    """
    if isinstance(saved, Mapping) and isinstance(found, Mapping):
        for key in sorted({*saved, *found}):
            if key not in saved or key not in found:
                what = 'lacks' if key in saved else 'has another key than was saved:'
                raise ValueError(f'{where} {what} {f"{path}{key}"!r}')
            check_same(saved[key], found[key], where, f'{path}{key}.')
    elif _as_json(saved) != _as_json(found):
        said = _as_json(found)
        short = said if len(said) <= 80 else f'{said[:80]}...'
        raise ValueError(f'{where}: {path.removesuffix(".")!r} is not what was saved with the weights, but {short}')


def is_packed(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a packed ticket, as far as names tell."""
    return DIGEST in tensors or CONFIG in tensors or any(name.endswith((BITS, FRAME)) for name in tensors)


def dump_config(config: Mapping[str, Any]) -> bytes:
    """A config as compact JSON."""
    return json.dumps(config, separators=(',', ':'), ensure_ascii=False).encode()


def read_config(packed: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config among the tensors of a packed ticket.

    Raises:
        ValueError: It is missing, not JSON, or says too little.
    """
    data = packed.get(CONFIG)
    if data is None or data.dtype != torch.uint8:
        raise ValueError(f'ticket has no config tensor {CONFIG!r}')
    return check_config(parse_json(data.numpy().tobytes(), f'ticket: {CONFIG!r}'), f'ticket: {CONFIG!r}')


def check_config(config: Any, where: str) -> dict[str, Any]:
    """Check that a config has the parts of a ticket's, of a version that can be read.

    Raises:
        ValueError: It has not; `where` is named.
    """
    section = config.get('supertickets') if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f'{where} is not that of a ticket: it has no "supertickets" section')
    version = section.get('format_version')
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f'{where}: format_version must be a whole number, got {version!r}')
    if version > FORMAT_VERSION:
        raise ValueError(f'{where} has format version {version}; this package reads up to {FORMAT_VERSION}: upgrade it')
    for key, kind in (('architecture', str), ('model_args', dict), ('pretrained_cfg', dict)):
        if not isinstance(config.get(key), kind):
            raise ValueError(f'{where} must have {key!r} as a {kind.__name__}, got {config.get(key)!r}')
    if not isinstance(section.get('facts'), dict):
        raise ValueError(f'{where}: facts must be a dict, got {section.get("facts")!r}')
    unknown = sorted(set(config['pretrained_cfg']) - {*CFG_KEYS, 'hf_hub_filename'})
    if unknown:
        raise ValueError(f'{where}: pretrained_cfg must not set {", ".join(unknown)}')
    return dict(config)


def check_version(packed: Mapping[str, Tensor]) -> None:
    """Check the version before anything else: a newer format may have another digest.

    Raises:
        ValueError: It is newer than this package.
    """
    try:
        read_config(packed)
    except ValueError as error:
        if 'upgrade' in str(error):
            raise


def tensor_hash(name: str, tensor: Tensor) -> bytes:
    """The sha256 of a tensor's name, dtype, shape and bytes."""
    dtype, shape = str(tensor.dtype)[len('torch.') :], ','.join(map(str, tensor.shape))
    found = hashlib.sha256(f'{name}\n{dtype}\n{shape}\n'.encode())
    found.update(_raw(tensor).data)
    return found.digest()


def digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """uint8 `(n, 32)`: the sha256 of every tensor but the digest itself, in the order of their names."""
    names = sorted(name for name in tensors if name != DIGEST)
    return _bytes(b''.join(tensor_hash(name, tensors[name]) for name in names)).view(-1, 32)


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
    if not torch.equal(found, expected):
        names = sorted(name for name in tensors if name != DIGEST)
        same = (found == expected).all(1).tolist()
        altered = [name for name, is_same in zip(names, same, strict=True) if not is_same]
        raise ValueError(f'ticket: tensor {altered[0]!r} is not what was saved ({len(altered)} of {len(names)} differ)')


def encode_mask(alive: Tensor) -> bytes:
    """A mask, shape included, as `<name>.bits` holds it."""
    return _bits(alive).numpy().tobytes()


def decode_mask(data: bytes, name: str, shape: Sequence[int]) -> Tensor:
    """Undo `encode_mask`.

    Raises:
        ValueError: The data cannot be read, or is for another shape; the name is quoted.
    """
    found, living = _living(_bytes(data), name, math.prod(shape))
    if found != tuple(shape):
        raise ValueError(f'ticket: mask of {name!r} is for the shape {found}, the weight has {tuple(shape)}')
    return _alive(found, living, name)


def _unpack(
    packed: Mapping[str, Tensor], model: nn.Module | None = None
) -> tuple[dict[str, Tensor], dict[str, NDArray[np.int64]]]:
    """The state_dict, and per masked tensor the flat places of its living weights.

    With a model, its parameters that are like what is unpacked are overwritten, and stand in the state_dict
    themselves; the places are left out.
    """
    room = _room(packed)
    weights, places = {}, {}
    for key, tensor in packed.items():
        name = key.removesuffix(FRAME)
        dense, owner = name.removesuffix(VALUES), key.removesuffix(BITS) + VALUES
        if key in (CONFIG, DIGEST) or (key.endswith(BITS) and (owner in packed or owner + FRAME in packed)):
            continue
        if key != name:
            tensor = _from_frame(tensor, key, room)
            room -= tensor.numel()
        if name == dense or dense + BITS not in packed:
            weights[name] = tensor
            continue
        shape, living = _living(packed[dense + BITS], dense, room)
        room -= math.prod(shape)
        if tensor.ndim != 1 or living.size != tensor.numel():
            raise ValueError(f'ticket: {dense!r} has {tensor.numel()} living values, but its mask counts {living.size}')
        target = _target(model, dense, shape, tensor.dtype)
        flat = _raw(target).view(f'i{tensor.element_size()}')
        flat.fill(0)
        flat[living] = _raw(tensor).view(flat.dtype)
        weights[dense] = target
        if model is None:
            places[dense] = living
    return weights, places


def _room(packed: Mapping[str, Tensor]) -> int:
    """How many numbers a file's codes may unpack to."""
    return max(_NUMBERS, _NUMBERS_PER_BYTE * sum(tensor.numel() for tensor in packed.values()))


def _alive(shape: tuple[int, ...], living: NDArray[np.int64], name: str) -> Tensor:
    alive = np.zeros(math.prod(shape), np.bool_)
    alive[living] = True
    if np.count_nonzero(alive) != living.size:
        raise ValueError(f'ticket: mask of {name!r} names a weight twice')
    return torch.from_numpy(alive).view(shape)


def _target(model: nn.Module | None, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    try:
        found = None if model is None else model.get_parameter(name)
    except AttributeError:
        found = None
    if found is None or found.shape != shape or found.dtype != dtype or found.device.type != 'cpu':
        return torch.empty(shape, dtype=dtype)
    return found if found.is_contiguous() else torch.empty(shape, dtype=dtype)


def _bits(alive: Tensor) -> Tensor:
    flat = alive.flatten().numpy()
    bits = np.packbits(flat, bitorder='little').tobytes()
    places = np.flatnonzero(flat)
    # so many low bits of each place are stored as they are; of the high ones the steps between them, in unary
    width = min(range(32), key=lambda low: places.size * low + (flat.size >> low))
    steps = np.zeros(places.size + (flat.size >> width), np.bool_)
    steps[(places >> width) + np.arange(places.size)] = True
    split = struct.pack('<IB', places.size, width)
    split += _pack_ints(places.astype('<u4'), width) + np.packbits(steps, bitorder='little').tobytes()
    is_split = len(split) < len(bits)
    return _coded(_SPLIT if is_split else _RAW_BITS, alive.shape, split if is_split else bits)


def _living(coded: Tensor, name: str, room: int) -> tuple[tuple[int, ...], NDArray[np.int64]]:
    """The shape of a mask and the flat places of its living weights, ascending; `room` is the most it may have."""
    what = f'mask of {name!r}'
    kind, shape, payload = _decoded(coded, what, room)
    count = math.prod(shape)
    if kind == _RAW_BITS:
        return shape, _ones(payload, count, what)
    if kind != _SPLIT or payload.size < 5 or payload[4] > 31:
        raise ValueError(f'ticket: {what} is of no known kind')
    living, width = struct.unpack_from('<IB', payload.data)
    end = 5 + _ints_size(living, width)
    if living > count or payload.size < end:
        raise ValueError(f'ticket: {what} is too short for {living} weights of {count}')
    steps = _ones(payload[end:], living + (count >> width), what)
    if steps.size != living:
        raise ValueError(f'ticket: {what} has {steps.size} steps for {living} weights')
    steps -= np.arange(living)
    steps <<= width
    steps |= _unpack_ints(payload[5:end], living, width)
    if living and steps.max() >= count:
        raise ValueError(f'ticket: {what} has weights beyond its {count}')
    return shape, steps


def _ones(bits: NDArray[np.uint8], count: int, what: str) -> NDArray[np.int64]:
    """Where ones are among so many bits."""
    if bits.size != -(-count // 8):
        raise ValueError(f'ticket: {what} has {bits.size} bytes where {-(-count // 8)} must be')
    if count % 8 and bits[-1] >> count % 8:
        raise ValueError(f'ticket: {what} has bits beyond its {count}')
    return np.flatnonzero(np.unpackbits(bits, count=count, bitorder='little').view(np.bool_))


def _frame(tensor: Tensor) -> Tensor | None:
    """Floats as their distance, in bits, from a small one, and the few that are below it; None where it is no gain."""
    size = tensor.element_size()
    if tensor.dtype not in _KINDS or tensor.numel() * size <= _FRAME_SAVES:
        return None
    numbers = _raw(tensor).view(f'<u{size}')
    numbers = (numbers << 1) | (numbers >> (8 * size - 1))  # the sign goes last: in order of magnitude
    ordered = np.sort(numbers)
    top, widths = int(ordered[-1]), range(8 * size)
    leasts = [max(int(ordered[0]), top + 1 - 2**width) for width in widths]
    below = np.searchsorted(ordered, np.array(leasts, ordered.dtype))
    bits = [numbers.size * width + (32 + 8 * size) * int(few) for width, few in zip(widths, below, strict=True)]
    width = bits.index(min(bits))
    places = np.flatnonzero(numbers < leasts[width])
    head = struct.pack('<BQI', width, leasts[width], places.size)
    outliers = places.astype('<u4').tobytes() + numbers[places].tobytes()
    numbers = np.maximum(numbers, leasts[width]) - leasts[width]
    coded = _coded(_KINDS[tensor.dtype], tensor.shape, head + outliers + _pack_ints(numbers, width))
    return coded if coded.numel() + _FRAME_SAVES <= tensor.numel() * size else None


def _from_frame(coded: Tensor, name: str, room: int) -> Tensor:
    kind, shape, payload = _decoded(coded, repr(name), room)
    if kind not in _FLOATS or payload.size < 13:
        raise ValueError(f'ticket: {name!r} is of no known kind')
    count, size = math.prod(shape), _FLOATS[kind].itemsize
    width, least, few = struct.unpack_from('<BQI', payload.data)
    middle, end = 13 + 4 * few, 13 + (4 + size) * few
    if width > 8 * size or least >> 8 * size or payload.size != end + _ints_size(count, width):
        raise ValueError(f'ticket: {name!r} is not {count} numbers of {width} bits')
    numbers = _unpack_ints(payload[end:], count, width).astype(f'<u{size}', copy=False)
    numbers += numbers.dtype.type(least)
    if few:
        places = payload[13:middle].view('<u4')
        if places.max() >= count:
            raise ValueError(f'ticket: {name!r} has numbers beyond its {count}')
        numbers[places] = payload[middle:end].view(numbers.dtype)
    numbers = (numbers >> 1) | (numbers << (8 * size - 1))
    return torch.from_numpy(numbers.view(np.uint8)).view(_FLOATS[kind]).view(shape)


def _pack_ints(ints: NDArray[Any], width: int) -> bytes:
    """The low `width` bits of each: whole bytes, the lowest of all numbers first, then the bits above, likewise."""
    whole, rest = divmod(width, 8)
    columns = ints.view(np.uint8).reshape(ints.size, ints.itemsize)
    planes = [np.packbits(columns[:, whole] >> bit & 1, bitorder='little') for bit in range(rest)]
    return columns[:, :whole].T.tobytes() + b''.join(plane.tobytes() for plane in planes)


def _unpack_ints(data: NDArray[np.uint8], count: int, width: int) -> NDArray[Any]:
    """Undo `_pack_ints`; the type is the smallest that holds them."""
    whole, rest = divmod(width, 8)
    size = next(size for size in (1, 2, 4, 8) if width <= 8 * size)
    columns = np.zeros((count, size), np.uint8)
    for byte in range(whole):
        columns[:, byte] = data[byte * count : (byte + 1) * count]
    if rest:
        bits = data[count * whole :].reshape(rest, -(-count // 8))
        planes = np.unpackbits(bits, axis=1, count=count, bitorder='little')
        for bit in range(1, rest):
            planes[0] |= planes[bit] << bit
        columns[:, whole] = planes[0]
    return columns.view(f'<u{size}').reshape(count)


def _ints_size(count: int, width: int) -> int:
    return count * (width // 8) + width % 8 * -(-count // 8)


def _coded(kind: int, shape: Sequence[int], payload: bytes) -> Tensor:
    return _bytes(struct.pack(f'<BB{len(shape)}I', kind, len(shape), *shape) + payload)


def _decoded(coded: Tensor, what: str, room: int) -> tuple[int, tuple[int, ...], NDArray[np.uint8]]:
    """Kind, shape and payload; `room` is the most numbers that the shape may have."""
    if coded.dtype != torch.uint8 or coded.ndim != 1 or coded.numel() < 2:
        raise ValueError(f'ticket: {what} must be bytes, got {coded.dtype} {tuple(coded.shape)}')
    data = _raw(coded)
    kind, dimensions = struct.unpack_from('<BB', data.data)
    start = 2 + 4 * dimensions
    if dimensions > _DIMENSIONS or data.size < start:
        raise ValueError(f'ticket: {what} is no tensor of {dimensions} dimensions')
    shape = struct.unpack_from(f'<{dimensions}I', data.data, 2)
    if math.prod(shape) > room:
        raise ValueError(f'ticket: {what} claims the shape {shape}, too large for a file of this size')
    return kind, shape, data[start:]


def _raw(tensor: Tensor) -> NDArray[np.uint8]:
    """A tensor's bytes, not copied if it lies contiguous in memory."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, default=repr)
    except RecursionError:
        return 'nested too deeply'
