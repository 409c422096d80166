import errno
import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from timm_supertickets.files import dump_json, dump_safetensors, parse_json, read_json, read_safetensors, write_atomic

TENSORS = {
    'b.weight': torch.arange(12.0).view(3, 4),
    'a.count': torch.tensor(7),
    'half': torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    'empty': torch.zeros(0, 3),
}
METADATA = {key: key.upper() for key in 'zyxwvutsrqponmlkjihgfedcba'}


def test_write_atomic_replaces_the_whole_file(tmp_path):
    path = tmp_path / 'x.bin'
    write_atomic(path, b'first and longer')
    write_atomic(path, b'second')
    assert path.read_bytes() == b'second'
    assert [p.name for p in tmp_path.iterdir()] == ['x.bin']


@pytest.mark.parametrize('call', ['open', 'fsync', 'replace'])
def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch, call):
    path = tmp_path / 'x.bin'
    write_atomic(path, b'old')

    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(*(('builtins.open', full) if call == 'open' else (f'os.{call}', full)))
    with pytest.raises(OSError, match=r'No space left on device.*x\.bin'):
        write_atomic(path, b'new')
    monkeypatch.undo()
    assert path.read_bytes() == b'old'
    assert [p.name for p in tmp_path.iterdir()] == ['x.bin']


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='there is no full device')
def test_write_atomic_names_the_file_that_found_no_space(tmp_path):
    path = tmp_path / 'x.bin'
    write_atomic(path, b'old')
    (tmp_path / '.x.bin.tmp').symlink_to('/dev/full')
    with pytest.raises(OSError, match=r'No space left on device.*x\.bin'):
        write_atomic(path, b'new')
    assert path.read_bytes() == b'old'
    assert [p.name for p in tmp_path.iterdir()] == ['x.bin']


@pytest.mark.skipif(os.name == 'nt', reason='flushes no folders')
def test_write_atomic_flushes_the_file_before_its_name_and_the_folder_after(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr('os.fsync', lambda handle: (done.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr('os.replace', lambda *names: (done.append('named'), replace(*names)))
    write_atomic(tmp_path / 'x.bin', b'some bytes')
    assert done == [(tmp_path / 'x.bin').stat().st_ino, 'named', tmp_path.stat().st_ino]


@pytest.mark.parametrize(
    'data',
    [
        {},
        [],
        {'a': 1, 'b': [1, 2, [3.5, None]], 'c': {'d': {'e': 'ü\n"'}}, 'f': [{'3': 4}, {}, {'5': 6, '7': 8}]},
        {'long': list(range(200)), 'words': ['word'] * 60},
        [{'nested': {'deep': [{'x': []}]}}],
        'text',
    ],
)
def test_dump_json_reads_back(data):
    text = dump_json(data)
    assert json.loads(text) == data
    assert text.endswith(b'\n')
    assert max(len(line) for line in text.decode().splitlines()) < 120


def test_dump_json_keeps_small_values_on_one_line():
    lines = dump_json({'stages': [[8, 1, 1], [12, 2, 2]], 'block': {'3': 32, '5': 32}}).decode().splitlines()
    assert lines == ['{', '  "stages": [[8, 1, 1], [12, 2, 2]],', '  "block": {"3": 32, "5": 32}', '}']


def test_read_json_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r'config.json is missing'):
        read_json(tmp_path / 'config.json')
    path = tmp_path / 'config.json'
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match=r'config.json is not readable as JSON'):
        read_json(path)
    path.write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match=r'config.json is not readable as JSON'):
        read_json(path)
    with pytest.raises(ValueError, match='is not readable as JSON'):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "'c' is there twice"),
        ('{"a": 1, "a": 1}', "'a' is there twice"),
        ('[NaN]', 'NaN is no number of JSON'),
        ('[-Infinity]', '-Infinity is no number of JSON'),
        ('[1e999]', '1e999 is no number of JSON'),
        ('[' * 100_000, 'recursion'),
        ('9' * 5000, 'digits'),
        ('', 'Expecting value'),
    ],
)
def test_json_that_parsers_read_in_two_ways_is_refused(text, message):
    with pytest.raises(ValueError, match=f'here is not readable as JSON: .*{message}') as caught:
        parse_json(text.encode(), 'here')
    assert '\n' not in str(caught.value)


def test_json_is_read_as_it_is():
    assert parse_json(b'{"a": [1, 2.5, -1e3, null, true, "\xc3\xbc"]}', 'here') == {
        'a': [1, 2.5, -1000, None, True, 'ü']
    }


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / 'x.safetensors'
    path.write_bytes(dump_safetensors(TENSORS, METADATA))
    tensors, metadata = read_safetensors(path)
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_safetensors_are_read_by_the_library_itself(tmp_path):
    path = tmp_path / 'x.safetensors'
    path.write_bytes(dump_safetensors(TENSORS, METADATA))
    assert all(torch.equal(t, TENSORS[n]) for n, t in safetensors.torch.load_file(path).items())


def test_the_same_tensors_give_the_same_bytes():
    # the library writes its metadata in a random order, another one at every call
    assert len({dump_safetensors(TENSORS, METADATA) for _ in range(8)}) == 1
    backwards = dict(reversed(METADATA.items()))
    assert dump_safetensors(dict(reversed(TENSORS.items())), backwards) == dump_safetensors(TENSORS, METADATA)


def test_tensors_begin_at_a_multiple_of_eight():
    data = dump_safetensors(TENSORS, {'odd': 'ü'})
    assert struct.unpack('<Q', data[:8])[0] % 8 == 0


def test_every_truncation_is_an_error_and_names_the_tensor(tmp_path):
    path = tmp_path / 'x.safetensors'
    data = dump_safetensors(TENSORS, {'a': 'b'})
    header = json.loads(data[8 : (start := 8 + struct.unpack('<Q', data[:8])[0])])
    ends = sorted((entry['data_offsets'][1], name) for name, entry in header.items() if name != '__metadata__')
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r'x.safetensors is not a whole safetensors file') as caught:
            read_safetensors(path)
        if length >= start:
            first_cut = next(name for end, name in ends if end > length - start)
            assert f'it breaks off in tensor {first_cut!r}' in str(caught.value)


@pytest.mark.parametrize(
    'data',
    [b'', b'hello', b'\xff' * 100, struct.pack('<Q', 2**60), struct.pack('<Q', 4) + b'null', b'PK\x03\x04' * 50],
)
def test_what_is_no_safetensors_is_an_error(tmp_path, data):
    path = tmp_path / 'x.safetensors'
    path.write_bytes(data)
    with pytest.raises(ValueError, match='is not a whole safetensors file'):
        read_safetensors(path)


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r'x.safetensors is missing'):
        read_safetensors(tmp_path / 'x.safetensors')
    with pytest.raises(ValueError, match='is not a whole safetensors file'):
        read_safetensors(tmp_path)


@pytest.mark.parametrize(
    'change',
    [
        lambda header: header.replace(b':', b': ', 1),
        lambda header: header + b'\t',
        lambda header: header.replace(b'"b.weight"', b'"\\u0062.weight"'),
        lambda header: header[:-1] + b',"a.count":{"dtype":"I64","shape":[],"data_offsets":[0,8]}}',
    ],
    ids=['space', 'tab', 'escape', 'twice'],
)
def test_a_header_that_says_the_same_in_other_bytes_is_refused(tmp_path, change):
    path = tmp_path / 'x.safetensors'
    data = dump_safetensors(TENSORS, METADATA)
    size = struct.unpack('<Q', data[:8])[0]
    header = change(data[8 : 8 + size].rstrip(b' '))
    header += b' ' * (-len(header) % 8)
    path.write_bytes(struct.pack('<Q', len(header)) + header + data[8 + size :])
    with pytest.raises(ValueError, match=r'is not a whole safetensors file|is there twice') as caught:
        read_safetensors(path)
    assert 'x.safetensors' in str(caught.value)


def test_every_byte_of_a_header_counts(tmp_path):
    path = tmp_path / 'x.safetensors'
    data = dump_safetensors({'a': torch.arange(3.0), 'b': torch.zeros(2)}, {'k': 'v'})
    whole = {name: (tensor.dtype, tensor.tolist()) for name, tensor in read(path, data)[0].items()}
    for place in range(8, 8 + struct.unpack('<Q', data[:8])[0]):
        for bit in range(8):
            bad = bytearray(data)
            bad[place] ^= 1 << bit
            try:
                tensors, metadata = read(path, bytes(bad))
            except ValueError:
                continue
            found = {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()}
            assert (found, metadata) != (whole, {'k': 'v'})


def read(path, data):
    path.write_bytes(data)
    return read_safetensors(path)
