"""Damaged and hostile tickets: refused with one line, or the same to the bit; at no great cost, and nothing is run.

`python tests/test_fuzz.py FOLDER COUNT` tries mutations with little memory to spare and under an audit hook.
"""

import collections
import copy
import json
import os
import random
import resource
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from timm_supertickets import Ticket, load_ticket, verify_ticket
from timm_supertickets.packing import CONFIG, DIGEST, digest
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import magnitude

ARCH = {
    'space': 'mbv2',
    'shape': {'stem': 16, 'stages': [[16, 1, 1], [24, 2, 2]], 'head': 64},
    'blocks': [{'3': 96, '7': 32}, {'3': 64, '5': 64}, {'5': 128}],
}
PACKED, DENSE = 'ticket.safetensors', 'model.safetensors'
SPARE = 256 * 2**20  # bytes of address space that the mutations of a 60 kB ticket may take between them
HOSTILE = (
    0, -1, 1, 2, 3, 10**9, -(10**9), 2**31, 2**63, 10**30, 0.5, 1e308, -0.0, True, None, '', 'x', 'x' * 5000, '\0\n',
    '../../../etc/passwd', '/etc/passwd', 'os.system', 'timm.models.resnet', 'hf-hub:a/b', 'local-dir:/tmp', 'resnet18',
    'supernet_mbv2', 'supernet_hr_tiny', 'superticket_hr', 'silu', 'BatchNorm2d', 'http://127.0.0.1:9/x.pth', [], {},
    [1, 2, 3], [[8, 10**9, 1]], [[8, 1, 1]] * 2000, [{}] * 100_000, [{'3': 10**9}] * 3, {'3': 10**9}, {'a': {'b': []}},
    json.loads('[' * 200 + ']' * 200),
)  # fmt: skip
KEYS = (
    'file', 'url', 'hf_hub_id', 'hf_hub_filename', 'custom_load', 'source', 'state_dict', 'architecture', 'model_args',
    'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained', 'pretrained_strict', 'pretrained_filter_fn', 'pruned',
    'checkpoint_path', 'features_only', 'feature_cls', 'feature_cfg', 'out_indices', 'in_chans', 'num_classes', 'arch',
    'act_layer', 'norm_layer', 'global_pool', 'output_stride', 'drop_rate', 'width', 'label_offset', 'first_conv',
    'classifier', 'input_size', 'mean', 'auto_map', '__class__', '__reduce__', 'supertickets', 'format_version', 'x',
)  # fmt: skip
# what a config.json can name that timm itself stumbles over, before our code sees anything
TIMM_SAYS = (RuntimeError, TypeError, KeyError, AttributeError, AssertionError, IndexError, RecursionError, OSError)


def make(folder):
    """A ticket that has every kind of tensor."""
    torch.manual_seed(0)
    model = timm.create_model('superticket_mbv2', arch=ARCH, num_classes=3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    ticket = Ticket.draw(model, prune(magnitude(model), 0.6), facts={'top1': 0.5, 'command': 'train'})
    return ticket.save(folder, dense=True)


class Original:
    """The ticket before anything happens to it, and how to tell whether something did."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        self.ticket = load_ticket(self.folder)
        self.config = json.loads(self.files['config.json'])
        self.image = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
        (self.folder / DENSE).unlink()
        self.model = self.create()

    def create(self):
        return timm.create_model(f'local-dir:{self.folder}', pretrained=True).eval()

    def write(self, files):
        for path in self.folder.iterdir():
            path.unlink()
        for name, data in files.items():
            (self.folder / name).write_bytes(data)

    def is_loaded(self, ticket):
        return (
            same(ticket.weights, self.ticket.weights)
            and same(ticket.mask, self.ticket.mask)
            and ticket.config() == self.ticket.config()
        )

    def is_created(self, model):
        return (
            type(model) is type(self.model)
            and same(dict(model.state_dict()), dict(self.model.state_dict()))
            and json.dumps(model.pretrained_cfg) == json.dumps(self.model.pretrained_cfg)
            and model.arch == self.model.arch
            and torch.equal(model(self.image), self.model(self.image))
        )


def same(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and bool((first[name].flatten().view(torch.uint8) == second[name].flatten().view(torch.uint8)).all())
        for name in first
    )


def split(data):
    """Header and the bytes behind it."""
    size = struct.unpack('<Q', data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header, body, indent=None):
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(',', ':'), indent=indent).encode()
    text += b' ' * (-len(text) % 8)
    return struct.pack('<Q', len(text)) + text + body


def regions(data):
    """Where the parts of a file lie: the length of its header, the header, and each kind of tensor."""
    start = 8 + struct.unpack('<Q', data[:8])[0]
    found = collections.defaultdict(list)
    found['length'], found['header'] = [(0, 8)], [(8, start)]
    for name, entry in split(data)[0].items():
        if name != '__metadata__':
            a, b = (start + offset for offset in entry['data_offsets'])
            kind = next((k for k in ('.bits', '.values', '.frame', DIGEST, CONFIG) if name.endswith(k)), 'others')
            if a < b:
                found[kind].append((a, b))
    return found


def flip(rng, files, name):
    """Some bits of one part."""
    data = bytearray(files[name])
    parts = regions(files[name])
    a, b = rng.choice(parts[rng.choice(sorted(parts))])
    for _ in range(rng.randint(1, 3)):
        data[rng.randint(a, b - 1)] ^= 1 << rng.randint(0, 7)
    files[name] = bytes(data)


def cut(rng, files, name):
    """Shorter, longer, or with a piece too many, too few, or repeated."""
    data = files[name]
    a, b = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    files[name] = rng.choice(
        [
            data[:a],
            data[a:],
            data + bytes(b),
            data[:a] + data[b:],
            data[:b] + data[a:],
            data + data,
            data[:a] + b'{' + data[a:],
        ]
    )


def rewrite(rng, files, name):
    """Tensors swapped, changed, renamed, removed, added: a well-formed file, with the words of the old header."""
    tensors = safetensors.torch.load(files[name])
    words = split(files[name])[0]['__metadata__']
    names = sorted(tensors)
    a, b = rng.choice(names), rng.choice(names)
    tensor = tensors[a]
    what = rng.randint(0, 9)
    if what == 0:
        tensors[a], tensors[b] = tensors[b], tensor
    elif what == 1:
        tensors[a] = tensor.double() if tensor.is_floating_point() else tensor.float()
    elif what == 2:
        tensors[a] = tensor.reshape(rng.choice([(-1,), (1, -1), (-1, 1), (1, 1, -1)]))
    elif what == 3:
        del tensors[a]
    elif what == 4:
        tensors[rng.choice(['x', f'{a}.bits', f'{a}.values', f'{a}.frame', a.upper()])] = tensor.clone()
    elif what == 5:
        tensors[rng.choice(['x', b, f'{a}.bits', a.partition('.')[2] or 'x'])] = tensors.pop(a)
    elif what == 6:
        tensors[a] = tensor.flatten()[: rng.randint(0, tensor.numel())]
    elif what == 7:
        tensors[a] = torch.cat([tensor.flatten(), tensor.flatten()])
    elif what == 8:
        tensors[a] = torch.zeros_like(tensor)
    else:
        words = {**words, rng.choice([*words, 'x']): rng.choice(['', '1', '2', 'pt', '{}', 'null', 'x' * 300])}
    files[name] = safetensors.torch.save(tensors, words)


def rehead(rng, files, name):
    """A header that claims other things of the same bytes: offsets, shapes, types, the same name twice."""
    header, body = split(files[name])
    a, b = (rng.choice([key for key in header if key != '__metadata__']) for _ in range(2))
    what = rng.randint(0, 8)
    if what == 0:
        header[a]['shape'] = rng.choice([[], [2**62], [2**63, 2], [0], [-1], [1] * 70, [10**30], ['1'], None])
    elif what == 1:
        start, stop = header[a]['data_offsets']
        pairs = [[0, 2**63], [start, stop + 1], [stop, start], [-8, 0], [0, 10**30], [2**64 - 8, 2**64], [start], None]
        header[a]['data_offsets'] = rng.choice(pairs)
    elif what == 2:
        header[a]['dtype'] = rng.choice(['F64', 'BOOL', 'F8_E4M3', 'U8', 'X', '', None, 5])
    elif what == 3:
        header[a]['data_offsets'] = header[b]['data_offsets']
    elif what == 4:
        header[a], header[b] = header[b], header[a]
    elif what == 5:
        header = json.dumps(header, separators=(',', ':')).encode()[:-1] + f',"{a}":{json.dumps(header[b])}}}'.encode()
    elif what == 6:
        text = json.dumps(header)
        header = rng.choice(
            [text, text.replace('"', '\\u0022', 1), '[' * 5000, '{"a":' * 5000, 'null', '[]', '{}']
        ).encode()
    elif what == 7:
        header['__metadata__'] = rng.choice([None, {}, {'format': 5}, [], {'config': '{}'}, {'sha256': '[' * 3000}])
    else:
        size = rng.choice([0, 1, 7, 2**40, 2**63, 2**64 - 1, 100_000_001])
        files[name] = struct.pack('<Q', size) + files[name][8:]
        return
    files[name] = join(header, body, rng.choice([None, None, 1]))


def reconfig(rng, files, name):
    """A config.json with other values, keys or text; `name` is not touched."""
    config = json.loads(files['config.json'])
    for _ in range(rng.choice([1, 1, 2])):
        place = config
        while True:
            key = rng.choice(sorted(place, key=str) if isinstance(place, dict) else list(range(len(place))))
            if isinstance(place[key], (dict, list)) and place[key] and rng.randint(0, 3):
                place = place[key]
            else:
                break
        value = copy.deepcopy(rng.choice(HOSTILE))
        if isinstance(place, dict) and rng.randint(0, 1):
            key = rng.choice(KEYS)
        place[key] = value
        if rng.randint(0, 5) == 0:
            del place[key]
    text = json.dumps(config)
    odd = ['[' * 100_000, text[:-1], f'{text[:-1]},"architecture":"resnet18"}}', '', 'NaN', text + text, '9' * 5000]
    files['config.json'] = rng.choice([text] * 12 + odd).encode()
    return config


def forge(rng, files, name):
    """A ticket that vouches for what it should not: another config, codes or tensors, all with a digest that fits."""
    tensors = safetensors.torch.load(files[PACKED])
    if rng.randint(0, 1):
        config = reconfig(rng, files, name)
        tensors[CONFIG] = torch.frombuffer(bytearray(json.dumps(config).encode()), dtype=torch.uint8)
    else:
        key = rng.choice(sorted(set(tensors) - {DIGEST}))
        data = bytearray(tensors[key].flatten().view(torch.uint8).numpy().tobytes())
        for _ in range(rng.randint(1, 4)):
            if data:
                place = rng.choice([rng.randint(0, min(24, len(data)) - 1), rng.randint(0, len(data) - 1)])
                data[place] = rng.choice([0, 1, 2, 127, 128, 255])
        data = data[: rng.choice([len(data), len(data), rng.randint(0, len(data))])]
        tensors[key] = torch.frombuffer(data, dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
    tensors[DIGEST] = digest(tensors)
    files[PACKED] = safetensors.torch.save(tensors, split(files[PACKED])[0]['__metadata__'])


def attempt(call, allowed):
    """What came out, and how it was refused if it was: with one line, by one of the allowed errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # timm's and torch's, about what they are asked to make
            return call(), None
    except (ValueError, *allowed) as error:
        return None, error


MUTATIONS = (flip, cut, rewrite, rehead, reconfig, forge)


def check(original, rng, counts):
    """Mutate, and knock at every door."""
    mutation = rng.choice(MUTATIONS)
    name = rng.choice([PACKED, PACKED, DENSE])
    files = {key: data for key, data in original.files.items() if key in ('config.json', name)}
    if mutation is forge:
        files = {key: data for key, data in original.files.items() if key != DENSE}
    before = dict(files)
    mutation(rng, files, name)
    if files == before:
        return
    original.write(files)
    doors = [(load_ticket, original.folder), (verify_ticket, original.folder)]
    doors += [(load_ticket, original.folder / name)] if name in files else []
    for load, path in doors:
        door = load.__name__ if load is verify_ticket else 'load_ticket'
        ticket, error = attempt(lambda load=load, path=path: load(path), ())
        counts[f'{mutation.__name__}: {"accepted" if error is None else "refused"} by {door}'] += 1
        if error is None:
            assert mutation is forge or original.is_loaded(ticket), f'{door} took {path.name} after {mutation.__name__}'
        else:
            assert '\n' not in str(error), f'{door}: {error}'
            assert str(path) in str(error), f'{door}: {error}'
            assert len(str(error)) < 1000
    if name == DENSE and mutation is not forge:
        return  # create_model cannot see the header of a dense file; that is what the packed one is for
    model, error = attempt(original.create, (SafetensorError, *TIMM_SAYS))
    counts[f'{mutation.__name__}: {"accepted" if error is None else type(error).__name__} by create_model'] += 1
    if error is None:
        assert mutation is forge or original.is_created(model), f'create_model took it after {mutation.__name__}'
    elif mutation in (flip, cut, rewrite, rehead):
        assert isinstance(error, (ValueError, SafetensorError)), f'create_model: {type(error).__name__}: {error}'
        assert '\n' not in str(error)
    assert error is None or 'alloc' not in str(error), f'create_model asked for too much memory: {error}'


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    return Original(make(tmp_path_factory.mktemp('fuzz') / 'ticket'))


def fuzz(examples):
    def decorate(test):
        relaxed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
        chosen = settings(
            max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=relaxed
        )
        return chosen(given(rng=st.randoms(use_true_random=False))(test))

    return decorate


@fuzz(200)
def test_mutations(original, rng):
    check(original, rng, collections.Counter())


@pytest.mark.slow
@fuzz(10_000)
def test_ten_thousand_mutations(original, rng):
    check(original, rng, collections.Counter())


def limited(folder, count, seed=0):
    """Mutations with little memory to spare, in a process of their own; returns what it printed."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    command = [sys.executable, __file__, str(folder), str(count), str(seed)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=env)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_mutations_take_little_memory_and_run_nothing(tmp_path):
    found = limited(make(tmp_path / 'ticket'), 150)
    assert found['violations'] == []
    assert sum(found['counts'].values()) > 300


@pytest.mark.slow
def test_ten_thousand_mutations_take_little_memory_and_run_nothing(tmp_path):
    found = limited(make(tmp_path / 'ticket'), 10_000)
    print(json.dumps(found, indent=1))
    assert found['violations'] == []


def run(folder, count, seed):
    """In a process of its own: no more than SPARE bytes above what it has taken, and an ear to what Python does."""
    torch.set_num_threads(1)
    original = Original(folder)
    rng, counts, violations = random.Random(seed), collections.Counter(), []
    for mutation in MUTATIONS:  # what is imported once and for all
        files = dict(original.files)
        mutation(rng, files, PACKED)
        original.write(files)
        attempt(original.create, (SafetensorError, *TIMM_SAYS))
        attempt(lambda: load_ticket(original.folder), ())
    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, used + SPARE))
    kept = tuple(str(path) for path in (original.folder, Path('/proc'), *map(Path, sys.path[1:]), Path(sys.prefix)))

    def listen(event, args):
        bad = event in ('os.system', 'os.exec', 'subprocess.Popen', 'pickle.find_class', 'socket.connect', 'exec')
        bad |= event == 'import' and args[0] not in sys.modules
        bad |= event == 'open' and isinstance(args[0], (str, bytes)) and not os.fsdecode(args[0]).startswith(kept)
        if bad:
            violations.append(f'{event} {args}'[:200])

    sys.addaudithook(listen)
    for _ in range(count):
        check(original, rng, counts)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({'violations': violations[:20], 'peak': peak, 'counts': dict(sorted(counts.items()))}))


if __name__ == '__main__':
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
