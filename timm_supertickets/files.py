"""Files: written whole or not at all, and safetensors read with a clear word about what is broken."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

HEADER_LIMIT = 100_000_000


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, and only then give it its name."""
    temporary = path.with_name(f'.{path.name}.tmp')
    with open(temporary, 'wb') as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: It is missing, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise ValueError(f'{path} is missing') from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f'{path} is not readable as JSON: {error}') from None


def dump_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Serialise tensors; the same tensors and metadata give the same bytes (the library shuffles the metadata)."""
    data = safetensors.torch.save(dict(tensors), dict(metadata))
    size = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8 : 8 + size])
    header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
    text += b' ' * (-len(text) % 8)
    return len(text).to_bytes(8, 'little') + text + data[8 + size :]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata.

    Raises:
        ValueError: The file is missing, cut short (the first tensor that is not whole is named) or no safetensors.
    """
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f'{path} is missing') from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f'{path} is not a whole safetensors file: {_first_cut(path) or error}') from None


def _first_cut(path: Path) -> str:
    """Says which tensor a truncated file breaks off in; empty if that is not what is wrong."""
    try:
        with open(path, 'rb') as file:
            size = int.from_bytes(file.read(8), 'little')
            if size > HEADER_LIMIT:
                return ''
            header = json.loads(file.read(size))
            there = path.stat().st_size - 8 - size
        ends = {name: entry['data_offsets'][1] for name, entry in header.items() if name != '__metadata__'}
        cut = sorted((end, name) for name, end in ends.items() if end > there)
        return f'it breaks off in tensor {cut[0][1]!r} ({there} of {max(ends.values())} bytes are there)' if cut else ''
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return ''
