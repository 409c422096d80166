import hashlib
import math
import random
import zlib

import pytest
import timm
import torch

from timm_supertickets import Arch
from timm_supertickets.packing import (
    ARCH,
    DIGEST,
    arch_tensor,
    check_digest,
    digest,
    is_packed,
    pack,
    unpack,
    unpack_for_model,
)

ARCH_A = Arch('mbv2', (('stem', 8), ('stages', ((8, 1, 1),)), ('head', 16)), (((3, 4), (5, 2)),))
ARCH_B = Arch('mbv2', (('stem', 8), ('stages', ((8, 1, 2),)), ('head', 16)), (((3, 4), (5, 2)),))


def sample(dtype=torch.float32):
    torch.manual_seed(0)
    weights = {
        'w': torch.randn(4, 3, 2).to(dtype),
        'v': torch.randn(5).to(dtype),
        'bn.num_batches_tracked': torch.tensor(3),
        'bn.running_mean': torch.randn(4),
    }
    mask = {'w': torch.rand(4, 3, 2) > 0.5, 'v': torch.tensor([True, False, True, True, False])}
    for name, alive in mask.items():
        weights[name][~alive] = 0
    return weights, mask, {name: tuple(tensor.shape) for name, tensor in weights.items()}


def hashed(packed):
    """The digest, worked out anew from raw bytes."""
    rows = []
    for name in sorted(set(packed) - {'supertickets.digest'}):
        tensor = packed[name].contiguous()
        dtype = str(tensor.dtype).split('.')[-1]
        shape = ','.join(str(size) for size in tensor.shape)
        raw = tensor.flatten().view(torch.uint8).numpy().tobytes()
        rows.append(list(hashlib.sha256(f'{name}\n{dtype}\n{shape}\n'.encode() + raw).digest()))
    return torch.tensor(rows, dtype=torch.uint8)


def signed(packed, **changes):
    """Altered tensors with a digest that vouches for them: what only a look at the content can refuse."""
    packed = {**packed, **changes}
    return {**packed, DIGEST: hashed(packed)}


def test_bits_and_values_by_hand():
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1]).bool()
    packed = pack({'w': torch.arange(10.0, 19.0) * mask}, {'w': mask})
    assert packed['w.bits'].dtype == torch.uint8
    assert packed['w.bits'].tolist() == [0b00001101, 0b1]
    assert packed['w.values'].tolist() == [10.0, 12.0, 13.0, 18.0]
    assert set(packed) == {'w.values', 'w.bits', DIGEST}


def test_values_are_in_c_order_whatever_the_memory_order():
    weight = torch.arange(1.0, 7.0).view(2, 3)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()
    for dense, alive in [(weight, mask), (weight.t().contiguous().t(), mask.t().contiguous().t())]:
        packed = pack({'w': dense * alive}, {'w': alive})
        assert packed['w.values'].tolist() == [1, 3, 5, 6]
        assert packed['w.bits'].tolist() == [0b110101]


def test_what_is_packed_can_be_written_whatever_the_memory_order():
    packed = pack({'plain': torch.arange(1.0, 7.0).view(2, 3).t()}, {})
    assert packed['plain'].is_contiguous()
    assert packed['plain'].tolist() == [[1, 4], [2, 5], [3, 6]]
    assert torch.equal(packed[DIGEST], hashed(packed))


@pytest.mark.parametrize('n', [1, 7, 8, 9, 15, 16, 17, 64, 65])
def test_bits_take_an_eighth_rounded_up(n):
    torch.manual_seed(n)
    mask = torch.rand(n) > 0.5
    packed = pack({'w': torch.ones(n) * mask}, {'w': mask})
    number = sum(int(alive) << i for i, alive in enumerate(mask.tolist()))
    assert bytes(packed['w.bits'].tolist()) == number.to_bytes(math.ceil(n / 8), 'little')


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_round_trip(dtype):
    weights, mask, shapes = sample(dtype)
    packed = pack(weights, mask)
    assert packed['w.values'].dtype == dtype
    back, alive = unpack(packed, shapes, None)
    assert back.keys() == weights.keys()
    assert all(back[name].dtype == weights[name].dtype for name in weights)
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert alive.keys() == mask.keys()
    assert all(torch.equal(alive[name], mask[name]) for name in mask)


def test_a_living_weight_that_is_zero_stays_alive():
    mask = torch.tensor([True, True, False, False])
    packed = pack({'w': torch.tensor([0.0, 1.0, 0.0, 0.0])}, {'w': mask})
    assert packed['w.values'].tolist() == [0.0, 1.0]
    assert unpack(packed, {'w': (4,)}, None)[1]['w'].tolist() == [True, True, False, False]


def test_tensors_without_dimensions():
    weights = {'alive': torch.tensor(2.5), 'dead': torch.tensor(0.0), 'count': torch.tensor(9)}
    mask = {'alive': torch.tensor(True), 'dead': torch.tensor(False)}
    packed = pack(weights, mask)
    assert packed['alive.values'].tolist() == [2.5]
    assert packed['dead.values'].tolist() == []
    assert packed['alive.bits'].tolist() == [1]
    back, alive = unpack(packed, dict.fromkeys(weights, ()), None)
    assert {name: tensor.item() for name, tensor in back.items()} == {'alive': 2.5, 'dead': 0.0, 'count': 9}
    assert {name: tensor.item() for name, tensor in alive.items()} == {'alive': True, 'dead': False}


def test_a_tensor_with_nobody_left_and_one_with_nobody_dead():
    weights = {'none': torch.zeros(20), 'all': torch.arange(20.0)}
    mask = {'none': torch.zeros(20, dtype=torch.bool), 'all': torch.ones(20, dtype=torch.bool)}
    back, alive = unpack(pack(weights, mask), {'none': (20,), 'all': (20,)}, None)
    assert all(torch.equal(back[name], weights[name]) and torch.equal(alive[name], mask[name]) for name in mask)


def test_bits_are_deflated_only_where_that_is_smaller():
    torch.manual_seed(0)
    regular = torch.arange(8000) % 100 == 0
    noise = torch.rand(8000) > 0.5
    packed = pack({'r': torch.ones(8000) * regular, 'n': torch.ones(8000) * noise}, {'r': regular, 'n': noise})
    assert packed['n.bits'].numel() == 1000
    assert packed['r.bits'].numel() < 200
    raw = zlib.decompress(bytes(packed['r.bits'].tolist()))
    assert raw == sum(1 << i for i in range(0, 8000, 100)).to_bytes(1000, 'little')
    _, alive = unpack(packed, {'r': (8000,), 'n': (8000,)}, None)
    assert torch.equal(alive['r'], regular)
    assert torch.equal(alive['n'], noise)


def test_a_deflated_bomb_is_refused_and_never_unpacked(monkeypatch):
    unpacked = []
    original = zlib.decompressobj

    class Counting:
        def __init__(self):
            self.stream = original()

        def decompress(self, data, limit):
            assert limit > 0  # 0 would mean: no limit
            raw = self.stream.decompress(data, limit)
            unpacked.append(len(raw))
            return raw

        def __getattr__(self, name):
            return getattr(self.stream, name)

    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(10**7), 9)), dtype=torch.uint8)
    shape = (bomb.numel() * 8 + 80,)
    packed = signed({'w.values': torch.zeros(0), 'w.bits': bomb})
    monkeypatch.setattr('timm_supertickets.packing.zlib.decompressobj', Counting)
    with pytest.raises(ValueError, match="mask of 'w' does not unpack to"):
        unpack(packed, {'w': shape}, None)
    assert sum(unpacked) <= math.ceil(shape[0] / 8) + 1


def deflated(raw):
    return torch.frombuffer(bytearray(zlib.compress(raw, 9)), dtype=torch.uint8)


@pytest.mark.parametrize(
    ('bits', 'message'),
    [
        (deflated(bytes(99)), "mask of 'w' does not unpack to 100 bytes"),
        (deflated(bytes(101)), "mask of 'w' does not unpack to 100 bytes"),
        (deflated(bytes(100))[:-6], "mask of 'w' does not unpack to 100 bytes"),
        (deflated(bytes(100))[:-1], "mask of 'w' does not unpack to 100 bytes"),
        (deflated(bytes(100)).repeat(2), "mask of 'w' does not unpack to 100 bytes"),
        (torch.tensor([1, 2, 3], dtype=torch.uint8), "mask of 'w' is not readable"),
        (torch.cat([deflated(bytes(100))[:-1], torch.tensor([9], dtype=torch.uint8)]), "mask of 'w' is not readable"),
        (torch.zeros(101, dtype=torch.uint8), "mask of 'w' must be at most 100 bytes"),
        (torch.zeros(100, dtype=torch.int8), "mask of 'w' must be at most 100 bytes"),
        (torch.zeros(10, 10, dtype=torch.uint8), "mask of 'w' must be at most 100 bytes"),
        (torch.zeros(0, dtype=torch.uint8), "mask of 'w' does not unpack to 100 bytes"),
    ],
)
def test_bits_that_cannot_be_right_are_refused(bits, message):
    with pytest.raises(ValueError, match=message):
        unpack(signed({'w.values': torch.zeros(0), 'w.bits': bits}), {'w': (800,)}, None)


def test_a_damaged_deflate_stream_never_gives_other_bits():
    # damage shows at different points of the stream: in the middle, at its end, or in the checksum alone
    rng = random.Random(0)
    refused = 0
    for _ in range(1500):
        raw = bytes(rng.randrange(256) for _ in range(rng.randint(1, 20))) * rng.randint(3, 40)
        data = bytearray(zlib.compress(raw, rng.choice([1, 6, 9])))
        if len(data) >= len(raw):
            continue
        data[rng.choice([-1, -4, rng.randrange(len(data))])] ^= 1 << rng.randrange(8)
        bits = torch.frombuffer(data, dtype=torch.uint8)
        alive = sum(byte.bit_count() for byte in raw)
        packed = signed({'w.values': torch.zeros(alive), 'w.bits': bits})
        try:
            _, mask = unpack(packed, {'w': (len(raw) * 8,)}, None)
        except ValueError:
            refused += 1
        else:
            number = sum(1 << i for i in mask['w'].nonzero().flatten().tolist())
            assert number.to_bytes(len(raw), 'little') == raw
    assert refused > 500


def test_bits_beyond_the_last_weight_are_refused():
    packed = pack({'w': torch.ones(9)}, {'w': torch.ones(9, dtype=torch.bool)})
    bits = packed['w.bits'].clone()
    bits[1] |= 0b10
    with pytest.raises(ValueError, match="mask of 'w' has bits beyond its 9 weights"):
        unpack(signed(packed, **{'w.bits': bits}), {'w': (9,)}, None)


@pytest.mark.parametrize('values', [torch.ones(3), torch.ones(5), torch.ones(2, 2), torch.ones(())])
def test_another_number_of_values_is_refused(values):
    mask = torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    packed = pack({'w': torch.ones(6) * mask}, {'w': mask})
    with pytest.raises(ValueError, match=r"'w' has . living values, but its mask counts 4"):
        unpack(signed(packed, **{'w.values': values}), {'w': (6,)}, None)


def test_a_tensor_that_the_architecture_has_not_is_refused():
    weights, mask, shapes = sample()
    del shapes['w']
    with pytest.raises(ValueError, match="'w', which its architecture has not"):
        unpack(pack(weights, mask), shapes, None)


def test_the_digest_is_the_sha256_of_name_dtype_shape_and_bytes():
    weights, mask, _ = sample()
    packed = pack({**weights, ARCH: arch_tensor(ARCH_A)}, mask)
    assert packed[DIGEST].shape == (len(packed) - 1, 32)
    assert torch.equal(packed[DIGEST], hashed(packed))
    assert torch.equal(digest(packed), hashed(packed))


@pytest.mark.parametrize(
    'change',
    [
        lambda t: {'w': t['w'].view(3, 2)},
        lambda t: {'w': t['w'].view(torch.int32)},
        lambda t: {'u': t['w']},
        lambda t: {'w': t['w'] + 1},
        lambda t: {**t, 'x': t['w']},
        lambda t: {},
    ],
    ids=['shape', 'dtype', 'name', 'bytes', 'added', 'removed'],
)
def test_the_digest_covers(change):
    tensors = {'w': torch.arange(6.0), 'other': torch.zeros(1)}
    vouched = digest(tensors)
    check_digest({**tensors, DIGEST: vouched})
    with pytest.raises(ValueError, match='ticket: '):
        check_digest({'other': tensors['other'], **change({'w': tensors['w']}), DIGEST: vouched})


def test_every_byte_of_every_tensor_is_vouched_for():
    weights, mask, shapes = sample()
    packed = pack({**weights, ARCH: arch_tensor(ARCH_A)}, mask)
    for name in set(packed) - {DIGEST}:
        raw = bytearray(packed[name].reshape(-1).view(torch.uint8).numpy().tobytes())
        for i in range(len(raw)):
            bad = bytearray(raw)
            bad[i] ^= 1 << (i % 8)
            altered = torch.frombuffer(bad, dtype=packed[name].dtype).view(packed[name].shape)
            with pytest.raises(ValueError, match=f'tensor {name!r} is not what was saved'):
                unpack({**packed, name: altered}, shapes, ARCH_A)


def test_an_altered_digest_is_refused():
    weights, mask, shapes = sample()
    packed = pack(weights, mask)
    names = sorted(set(packed) - {DIGEST})
    for row, name in enumerate(names):
        vouched = packed[DIGEST].clone()
        vouched[row, 31] ^= 1
        with pytest.raises(ValueError, match=f'tensor {name!r} is not what was saved'):
            unpack({**packed, DIGEST: vouched}, shapes, None)
    for bad in (packed[DIGEST][1:], packed[DIGEST].view(torch.int8), packed[DIGEST].flatten(), torch.zeros(())):
        with pytest.raises(ValueError, match=r"'supertickets.digest' .* vouches for other than"):
            unpack({**packed, DIGEST: bad}, shapes, None)
    del packed[DIGEST]
    with pytest.raises(ValueError, match=r"no digest tensor 'supertickets.digest'"):
        unpack(packed, shapes, None)


def test_swapped_tensors_are_refused():
    weights, mask, shapes = sample()
    packed = pack({**weights, 'twin': weights['bn.running_mean'] + 1}, mask)
    packed['twin'], packed['bn.running_mean'] = packed['bn.running_mean'], packed['twin']
    with pytest.raises(ValueError, match=r"tensor 'bn.running_mean' is not what was saved"):
        unpack(packed, shapes, None)


@pytest.mark.parametrize(('saved', 'loaded'), [(ARCH_A, ARCH_B), (ARCH_A, None), (None, ARCH_A)])
def test_another_arch_is_refused(saved, loaded):
    weights, mask, shapes = sample()
    packed = pack({**weights, **({ARCH: arch_tensor(saved)} if saved else {})}, mask)
    assert ARCH not in unpack(packed, shapes, saved)[0]
    with pytest.raises(ValueError, match='saved for another arch'):
        unpack(packed, shapes, loaded)


def test_the_filter_passes_other_checkpoints_on():
    model = timm.create_model('supernet_mbv2_tiny')
    state = model.state_dict()
    assert unpack_for_model(state, model) is state
    assert not is_packed(state)
    assert is_packed(pack(state, {}))


def test_the_filter_verifies_and_unpacks():
    model = timm.create_model('supernet_mbv2_tiny')
    name = 'blocks.0.0.conv_pw.weight'
    state = model.state_dict()
    alive = torch.rand_like(state[name]) > 0.5
    state[name] = state[name] * alive
    packed = pack({**state, ARCH: arch_tensor(model.arch)}, {name: alive})
    unpacked = unpack_for_model(packed, model)
    assert list(unpacked) == list(state)
    assert all(torch.equal(unpacked[key], state[key]) for key in state)
    with pytest.raises(ValueError, match=r"tensor 'bn1.weight' is not what was saved"):
        unpack_for_model({**packed, 'bn1.weight': packed['bn1.weight'] + 1}, model)


def test_packing_leaves_its_input_alone():
    weights, mask, _ = sample()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    pack(weights, mask)
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in before)
