"""Files: written whole or not at all, and safetensors read with a clear word about what is broken."""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

HEADER_LIMIT = 100_000_000


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, and only then give it its name.

    Raises:
        OSError: It cannot be written; what was there before is there still, and no more.
    """
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno and not error.filename:  # a full disk does not say where
            error.filename = str(path)
        raise


def flush_to_disk(path: Path) -> None:
    """Let a file's bytes, or which files a folder holds, survive a power cut."""
    if os.name == 'nt':  # which opens no folders, and flushes no file that is only read
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(handle)


def dump_json(data: Any) -> bytes:
    """JSON as this package writes it: indented, with short lists of numbers and small dicts on one line."""
    return (_dumped(data, '') + '\n').encode()


def _dumped(data: Any, indent: str) -> str:
    line = json.dumps(data, ensure_ascii=False)
    if not isinstance(data, (dict, list)) or not data or (len(indent) + len(line) <= 100 and not _nested_dict(data)):
        return line
    deeper = indent + '  '
    if isinstance(data, dict):
        parts = [f'{deeper}{json.dumps(str(key))}: {_dumped(value, deeper)}' for key, value in data.items()]
        return '{\n' + ',\n'.join(parts) + f'\n{indent}}}'
    return '[\n' + ',\n'.join(deeper + _dumped(value, deeper) for value in data) + f'\n{indent}]'


def _nested_dict(data: Any) -> bool:
    return any(isinstance(value, dict) for value in (data.values() if isinstance(data, dict) else data))


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON that no two parsers read in two ways: no key twice, no NaN or Infinity.

    Raises:
        ValueError: It is something else; `where` is named.
    """
    try:
        return json.loads(
            data.decode(), parse_constant=_finite, parse_float=_finite, object_pairs_hook=_without_duplicates
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{where} is not readable as JSON: {error}') from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f'{text} is no number of JSON')
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'{next(name for name in names if names.count(name) > 1)!r} is there twice')
    return found


def read_json(path: Path) -> Any:
    """Parse a JSON file, as `parse_json` does.

    Raises:
        ValueError: It is missing, or not JSON.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f'{path} is missing') from None
    except OSError as error:
        raise ValueError(f'{path} is not readable as JSON: {error}') from None
    return parse_json(data, str(path))


def dump_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Serialise tensors; the same tensors and metadata give the same bytes (the library shuffles the metadata)."""
    data = safetensors.torch.save(dict(tensors), dict(metadata))
    size = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8 : 8 + size])
    header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
    text = _dump_header(header)
    return len(text).to_bytes(8, 'little') + text + data[8 + size :]


def _dump_header(header: Any) -> bytes:
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
    return text + b' ' * (-len(text) % 8)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata.

    Raises:
        ValueError: The file is missing, cut short (the first tensor that is not whole is named) or no safetensors, or
            its header says the same in other bytes than `dump_safetensors` would: every byte of a file counts.
    """
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
        with open(path, 'rb') as raw:
            header = raw.read(int.from_bytes(raw.read(8), 'little'))
    except FileNotFoundError:
        raise ValueError(f'{path} is missing') from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f'{path} is not a whole safetensors file: {_first_cut(path) or error}') from None
    if header != _dump_header(parse_json(header, f'header of {path}')):
        raise ValueError(f'{path} is not a whole safetensors file: its header is not written as this format writes it')
    return tensors, metadata


def _first_cut(path: Path) -> str:
    """Says which tensor a truncated file breaks off in; empty if that is not what is wrong."""
    try:
        with open(path, 'rb') as file:
            size = int.from_bytes(file.read(8), 'little')
            if size > HEADER_LIMIT:
                return ''
            header = json.loads(file.read(size).decode())
            there = path.stat().st_size - 8 - size
        ends = {name: entry['data_offsets'][1] for name, entry in header.items() if name != '__metadata__'}
        cut = sorted((end, name) for name, end in ends.items() if end > there)
        return f'it breaks off in tensor {cut[0][1]!r} ({there} of {max(ends.values())} bytes are there)' if cut else ''
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return ''
