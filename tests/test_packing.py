import hashlib
import json
import math
import random
import struct

import pytest
import timm
import torch

from timm_supertickets.packing import (
    CONFIG,
    DIGEST,
    check_digest,
    check_same,
    decode_mask,
    digest,
    encode_mask,
    is_packed,
    pack,
    unpack,
    unpack_for_model,
)

ARCH = {'space': 'mbv2', 'shape': {'stem': 8, 'stages': [[8, 1, 1]], 'head': 16}, 'blocks': [{'3': 4, '5': 2}]}


def config_of(arch=ARCH, **args):
    return {
        'architecture': 'superticket_mbv2',
        'num_classes': 3,
        'model_args': {'arch': arch, **args},
        'pretrained_cfg': {'num_classes': 3, 'classifier': 'classifier', 'first_conv': 'conv_stem'},
        'supertickets': {'format_version': 1, 'sparsity': 0.5, 'facts': {'ü': 'x'}},
    }


SAVED = config_of()


def sample(dtype=torch.float32):
    torch.manual_seed(0)
    weights = {
        'w': torch.randn(4, 3, 2).to(dtype),
        'v': torch.randn(5).to(dtype),
        'big': torch.rand(60, 50).to(dtype) + 1,
        'plain': torch.rand(3000).to(dtype) + 1,
        'bn.num_batches_tracked': torch.tensor(3),
        'bn.running_mean': torch.randn(4),
    }
    mask = {
        'w': torch.rand(4, 3, 2) > 0.5,
        'v': torch.tensor([True, False, True, True, False]),
        'big': torch.rand(60, 50) > 0.2,
    }
    for name, alive in mask.items():
        weights[name][~alive] = 0
    return weights, mask


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


def coded(kind, shape, payload):
    data = bytes([kind, len(shape)]) + struct.pack(f'<{len(shape)}I', *shape) + payload
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def read(tensor):
    """Kind, shape and payload of a coded tensor."""
    data = bytes(tensor.tolist())
    return data[0], struct.unpack_from(f'<{data[1]}I', data, 2), data[2 + 4 * data[1] :]


def bits_of(data):
    return [data[i // 8] >> (i % 8) & 1 for i in range(8 * len(data))]


def numbers_of(data, count, width):
    """Numbers of so many bits: byte planes, then bit planes, as the format has them; and what is left of the data."""
    whole, size = width // 8, (count + 7) // 8
    numbers = [sum(data[byte * count + i] << 8 * byte for byte in range(whole)) for i in range(count)]
    data = data[whole * count :]
    for bit in range(width % 8):
        for i in range(count):
            numbers[i] |= (data[bit * size + i // 8] >> (i % 8) & 1) << (8 * whole + bit)
    return numbers, data[width % 8 * size :]


def places_of(payload):
    """Elias and Fano's split of ascending places, read back with nothing but Python."""
    (count,), width = struct.unpack_from('<I', payload), payload[4]
    low, steps = numbers_of(payload[5:], count, width)
    high, places = 0, []
    for bit in bits_of(steps):
        if bit:
            places.append(high << width | low[len(places)])
        else:
            high += 1
    return places


def frame_of(tensor):
    """The bits of each float of a frame, read back with nothing but Python."""
    kind, shape, payload = read(tensor)
    size = {2: 4, 3: 2, 4: 2, 5: 8}[kind]
    width, least, few = struct.unpack_from('<BQI', payload)
    places = struct.unpack_from(f'<{few}I', payload, 13)
    outliers = payload[13 + 4 * few :]
    numbers, left = numbers_of(outliers[few * size :], math.prod(shape), width)
    assert left == b''
    turned, top = [number + least for number in numbers], 8 * size - 1
    for i, place in enumerate(places):
        turned[place] = int.from_bytes(outliers[i * size : (i + 1) * size], 'little')
    return [(n >> 1) | (n & 1) << top for n in turned]


def test_bits_and_values_by_hand():
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1]).bool()
    packed = pack({'w': torch.arange(10.0, 19.0) * mask}, {'w': mask}, SAVED)
    assert packed['w.bits'].dtype == torch.uint8
    # raw bits, one dimension, of nine; then the bits
    assert packed['w.bits'].tolist() == [0, 1, 9, 0, 0, 0, 0b00001101, 0b1]
    assert packed['w.values'].tolist() == [10.0, 12.0, 13.0, 18.0]
    assert set(packed) == {'w.values', 'w.bits', CONFIG, DIGEST}
    assert json.loads(bytes(packed[CONFIG].tolist())) == SAVED


def test_places_by_hand():
    mask = torch.zeros(2, 100, dtype=torch.bool)
    mask[0, 3] = mask[1, 30] = True
    packed = pack({'w': torch.ones(2, 100) * mask}, {'w': mask}, SAVED)
    # split, two dimensions; two places, 3 and 130, of which 6 bits are stored: 3 and 2, plane by plane;
    # and their high ones, 0 and 2, as steps: one, zero, zero, one
    head = [1, 2, 2, 0, 0, 0, 100, 0, 0, 0]
    assert packed['w.bits'].tolist() == [*head, 2, 0, 0, 0, 6, 0b01, 0b11, 0, 0, 0, 0, 0b1001]


def test_values_are_in_c_order_whatever_the_memory_order():
    weight = torch.arange(1.0, 7.0).view(2, 3)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()
    for dense, alive in [(weight, mask), (weight.t().contiguous().t(), mask.t().contiguous().t())]:
        packed = pack({'w': dense * alive}, {'w': alive}, SAVED)
        assert packed['w.values'].tolist() == [1, 3, 5, 6]
        assert packed['w.bits'].tolist()[-1] == 0b110101


def test_what_is_packed_can_be_written_whatever_the_memory_order():
    packed = pack({'plain': torch.arange(1.0, 7.0).view(2, 3).t()}, {}, SAVED)
    assert packed['plain'].is_contiguous()
    assert packed['plain'].tolist() == [[1, 4], [2, 5], [3, 6]]
    assert torch.equal(packed[DIGEST], hashed(packed))


@pytest.mark.parametrize('n', [1, 7, 8, 9, 15, 16, 17, 64, 65])
def test_bits_take_an_eighth_rounded_up(n):
    torch.manual_seed(n)
    mask = torch.rand(n) > 0.5
    kind, shape, payload = read(pack({'w': torch.ones(n) * mask}, {'w': mask}, SAVED)['w.bits'])
    number = sum(int(alive) << i for i, alive in enumerate(mask.tolist()))
    assert (kind, shape, payload) == (0, (n,), number.to_bytes(math.ceil(n / 8), 'little'))


@pytest.mark.parametrize('density', [0.5, 0.2, 0.1, 0.05, 0.01, 0.001, 0])
@pytest.mark.parametrize('n', [1000, 4099])
def test_places_are_those_of_the_mask_and_near_its_entropy(density, n):
    torch.manual_seed(n)
    mask = torch.rand(n) < density
    tensor = torch.frombuffer(bytearray(encode_mask(mask)), dtype=torch.uint8)
    kind, shape, payload = read(tensor)
    assert shape == (n,)
    places = places_of(payload) if kind == 1 else [i for i, bit in enumerate(bits_of(payload)) if bit]
    assert places == mask.nonzero().flatten().tolist()
    assert kind == (density < 0.4)
    p = mask.float().mean().item()
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) * n / 8 if p else 0
    assert len(payload) <= 1.2 * entropy + 10


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_frame_is_the_floats_bit_by_bit(dtype):
    torch.manual_seed(0)
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    tensor = torch.randn(2, 3000).to(dtype)
    packed = pack({'w': tensor}, {}, SAVED)['w.frame']
    assert read(packed)[1] == (2, 3000)
    few = struct.unpack_from('<I', read(packed)[2], 9)[0]  # near zero, and kept apart where that pays
    assert (few > 0) == (dtype != torch.float64)
    assert few < 200
    mask = 2 ** (8 * dtype.itemsize) - 1
    assert frame_of(packed) == [bits & mask for bits in tensor.view(ints).flatten().tolist()]
    assert packed.numel() < 0.95 * tensor.numel() * dtype.itemsize


@pytest.mark.parametrize(
    ('tensor', 'is_frame'),
    [
        (torch.ones(2000), True),
        (torch.full((2000,), -0.0), True),
        (torch.randn(200), False),
        (torch.arange(4000), False),
        (torch.empty(2000).uniform_(-1, 1) * 2.0 ** torch.randint(-120, 120, (2000,)), False),
        (torch.cat([torch.rand(3000) + 1, torch.tensor([1e-40, 0.0, -0.0, -1e-9])]), True),
        (torch.tensor([math.nan, math.inf, 1e38]).repeat(1000), True),
    ],
    ids=['constant', 'minus zero', 'small', 'whole numbers', 'wide', 'few outliers', 'nan and infinity'],
)
def test_a_frame_only_where_it_is_smaller(tensor, is_frame):
    packed = pack({'w': tensor}, {}, SAVED)
    assert ('w.frame' in packed) == is_frame
    back = unpack(packed)[0]['w']
    assert back.dtype == tensor.dtype
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_round_trip(dtype):
    weights, mask = sample(dtype)
    packed = pack(weights, mask, SAVED)
    assert packed['w.values'].dtype == dtype
    assert {'plain.frame', 'big.values.frame'} <= set(packed)
    back, alive = unpack(packed)
    assert back.keys() == weights.keys()
    assert all(back[name].dtype == weights[name].dtype for name in weights)
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert alive.keys() == mask.keys()
    assert all(torch.equal(alive[name], mask[name]) for name in mask)


def test_a_living_weight_that_is_zero_stays_alive():
    mask = torch.tensor([True, True, False, False])
    packed = pack({'w': torch.tensor([0.0, 1.0, 0.0, 0.0])}, {'w': mask}, SAVED)
    assert packed['w.values'].tolist() == [0.0, 1.0]
    assert unpack(packed)[1]['w'].tolist() == [True, True, False, False]


def test_tensors_without_dimensions():
    weights = {'alive': torch.tensor(2.5), 'dead': torch.tensor(0.0), 'count': torch.tensor(9)}
    mask = {'alive': torch.tensor(True), 'dead': torch.tensor(False)}
    packed = pack(weights, mask, SAVED)
    assert packed['alive.values'].tolist() == [2.5]
    assert packed['dead.values'].tolist() == []
    assert packed['alive.bits'].tolist() == [0, 0, 1]
    back, alive = unpack(packed)
    assert {name: tensor.item() for name, tensor in back.items()} == {'alive': 2.5, 'dead': 0.0, 'count': 9}
    assert {name: tensor.item() for name, tensor in alive.items()} == {'alive': True, 'dead': False}


def test_tensors_with_nobody_left_with_nobody_dead_and_with_nothing():
    weights = {'none': torch.zeros(200), 'all': torch.arange(20.0), 'empty': torch.zeros(0, 3)}
    mask = {name: torch.full_like(weight, name == 'all', dtype=torch.bool) for name, weight in weights.items()}
    back, alive = unpack(pack(weights, mask, SAVED))
    assert all(torch.equal(back[name], weights[name]) and torch.equal(alive[name], mask[name]) for name in mask)


def test_masks_on_their_own():
    for alive in (torch.rand(3, 4, 5) > 0.7, torch.tensor(True), torch.zeros(0).bool(), torch.rand(3000) > 0.95):
        back = decode_mask(encode_mask(alive), 'w', alive.shape)
        assert back.shape == alive.shape
        assert torch.equal(back, alive)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"mask of 'w' is for the shape \(2, 3\), the weight has \(3, 2\)"):
        decode_mask(encode_mask(torch.ones(2, 3).bool()), 'w', (3, 2))
    with pytest.raises(ValueError, match=r"mask of 'w' claims the shape \(2, 3\), too large"):
        decode_mask(encode_mask(torch.ones(2, 3).bool()), 'w', (5,))


def test_names_that_collide_are_refused():
    alive = {'w': torch.tensor([True, False])}
    for name in ('w.bits', 'w.values', CONFIG, DIGEST):
        with pytest.raises(ValueError, match='a name that packing needs'):
            pack({'w': torch.zeros(2), name: torch.zeros(2)}, alive, SAVED)


def split(count, width, low, steps):
    return struct.pack('<IB', count, width) + bytes(low) + bytes(steps)


@pytest.mark.parametrize(
    ('bits', 'message'),
    [
        (torch.zeros(8, dtype=torch.int8), "mask of 'w' must be bytes, got torch.int8"),
        (torch.zeros(4, 2, dtype=torch.uint8), "mask of 'w' must be bytes"),
        (torch.zeros(1, dtype=torch.uint8), "mask of 'w' must be bytes"),
        (torch.tensor([0, 3, 1, 1], dtype=torch.uint8), "mask of 'w' is no tensor of 3 dimensions"),
        (coded(0, (1,) * 9, b'\1'), "mask of 'w' is no tensor of 9 dimensions"),
        (coded(0, (2**32 - 1,) * 4, b'\1'), "mask of 'w' claims the shape .* too large for a file of this size"),
        (coded(0, (800,), bytes(99)), "mask of 'w' has 99 bytes where 100 must be"),
        (coded(0, (800,), bytes(101)), "mask of 'w' has 101 bytes where 100 must be"),
        (coded(0, (9,), b'\0\2'), "mask of 'w' has bits beyond its 9"),
        (coded(7, (9,), b'\0\0'), "mask of 'w' is of no known kind"),
        (coded(1, (9,), b'\0\0'), "mask of 'w' is of no known kind"),
        (coded(1, (9,), split(0, 32, [], [])), "mask of 'w' is of no known kind"),
        (coded(1, (9,), split(10, 0, [], [255, 255, 7])), "mask of 'w' is too short for 10 weights of 9"),
        (coded(1, (9,), split(2**32 - 1, 0, [], [])), "mask of 'w' is too short for 4294967295 weights"),
        (coded(1, (9,), split(9, 16, [1, 2], [])), "mask of 'w' is too short for 9 weights"),
        (coded(1, (9,), split(2, 2, [0, 0], [0b11, 0])), "mask of 'w' has 2 bytes where 1 must be"),
        (coded(1, (9,), split(2, 2, [0, 0], [0b11111])), "mask of 'w' has bits beyond its 4"),
        (coded(1, (9,), split(2, 2, [0, 0], [0b1])), "mask of 'w' has 1 steps for 2 weights"),
        (coded(1, (9,), split(2, 2, [2, 0], [0b11])), "'w' has 0 living values, but its mask counts 2"),
        (coded(1, (9,), split(2, 2, [3, 3], [0b1100])), "mask of 'w' has weights beyond its 9"),
    ],
)
def test_bits_that_cannot_be_right_are_refused(bits, message):
    with pytest.raises(ValueError, match=message):
        unpack(signed({'w.values': torch.zeros(0), 'w.bits': bits}))


def test_places_that_are_there_twice_are_refused():
    twice = coded(1, (9,), split(2, 2, [0, 0], [0b11]))
    with pytest.raises(ValueError, match="mask of 'w' names a weight twice"):
        unpack(signed({'w.values': torch.zeros(2), 'w.bits': twice}))


def framed(kind, shape, width, least=0, numbers=b'', outliers=0):
    return coded(kind, shape, struct.pack('<BQI', width, least, outliers) + numbers)


@pytest.mark.parametrize(
    ('frame', 'message'),
    [
        (torch.zeros(30), "'w.frame' must be bytes"),
        (framed(0, (3,), 8, 0, b'123'), "'w.frame' is of no known kind"),
        (framed(6, (3,), 8, 0, b'123'), "'w.frame' is of no known kind"),
        (coded(2, (3,), b'1234'), "'w.frame' is of no known kind"),
        (framed(2, (3,), 8, 0, b'12'), "'w.frame' is not 3 numbers of 8 bits"),
        (framed(2, (3,), 8, 0, b'1234'), "'w.frame' is not 3 numbers of 8 bits"),
        (framed(2, (3,), 33, 0, b'1' * 13), "'w.frame' is not 3 numbers of 33 bits"),
        (framed(3, (3,), 17, 0, b'1' * 7), "'w.frame' is not 3 numbers of 17 bits"),
        (framed(2, (3,), 0, 2**32), "'w.frame' is not 3 numbers of 0 bits"),
        (framed(2, (3,), 8, 0, b'123', 1), "'w.frame' is not 3 numbers of 8 bits"),
        (framed(2, (3,), 0, 0, b'', 2**32 - 1), "'w.frame' is not 3 numbers of 0 bits"),
        (framed(2, (3,), 0, 0, b'\3\0\0\0abcd', 1), "'w.frame' has numbers beyond its 3"),
        (framed(2, (2**32 - 1, 2**32 - 1), 0), "'w.frame' claims the shape .* too large for a file of this size"),
    ],
)
def test_frames_that_cannot_be_right_are_refused(frame, message):
    with pytest.raises(ValueError, match=message):
        unpack(signed({'w.frame': frame}))


def test_a_file_cannot_claim_much_more_than_it_holds():
    def claim(rows):
        return signed({f'{i}.frame': framed(2, (rows, 1000), 0, 5) for i in range(20)})

    weights, _ = unpack(claim(2))
    assert [weight.shape for weight in weights.values()] == [(2, 1000)] * 20
    assert all(set(weight.view(torch.int32).flatten().tolist()) == {(5 >> 1) | -(2**31)} for weight in weights.values())
    with pytest.raises(ValueError, match=r"'19.frame' claims the shape \(850, 1000\), too large for a file of this"):
        unpack(claim(850))  # more than 2 ** 24 in all


def test_next_to_nothing_alive_is_packed_if_it_can_be_unpacked(monkeypatch):
    alive = torch.zeros(3000, 100, dtype=torch.bool)
    alive[7, 7] = True
    packed = pack({'w': alive.float()}, {'w': alive}, SAVED)
    assert packed['w.bits'].numel() < 30
    assert torch.equal(unpack(packed)[1]['w'], alive)
    assert torch.equal(decode_mask(encode_mask(alive), 'w', (3000, 100)), alive)
    monkeypatch.setattr('timm_supertickets.packing._NUMBERS', 1000)
    with pytest.raises(ValueError, match='so few weights are alive'):
        pack({'w': alive.float()}, {'w': alive}, SAVED)


@pytest.mark.parametrize('values', [torch.ones(3), torch.ones(5), torch.ones(2, 2), torch.ones(())])
def test_another_number_of_values_is_refused(values):
    mask = torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    packed = pack({'w': torch.ones(6) * mask}, {'w': mask}, SAVED)
    with pytest.raises(ValueError, match=r"'w' has . living values, but its mask counts 4"):
        unpack(signed(packed, **{'w.values': values}))


def test_damage_that_the_digest_vouches_for_is_refused_or_harmless():
    rng = random.Random(0)
    refused = []
    weights, mask = sample()
    packed = pack(weights, mask, SAVED)
    for _ in range(1500):
        name = rng.choice(['w.bits', 'big.bits', 'big.values.frame', 'plain.frame'])
        data = bytearray(bytes(packed[name].tolist()))
        for _ in range(rng.randint(1, 3)):
            data[rng.choice([rng.randrange(min(20, len(data))), rng.randrange(len(data))])] = rng.choice(
                [0, 1, 255, rng.randrange(256)]
            )
        data = data[: rng.choice([len(data), len(data), rng.randrange(len(data))])]
        try:
            unpack(signed(packed, **{name: torch.frombuffer(data or bytearray(1), dtype=torch.uint8)}))
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 500
    assert all(text.startswith('ticket: ') for text in refused)


def test_the_digest_is_the_sha256_of_name_dtype_shape_and_bytes():
    weights, mask = sample()
    packed = pack(weights, mask, SAVED)
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
    weights, mask = sample()
    packed = pack(weights, mask, SAVED)
    for name in set(packed) - {DIGEST}:
        raw = bytearray(packed[name].reshape(-1).view(torch.uint8).numpy().tobytes())
        for i in range(len(raw)):
            bad = bytearray(raw)
            bad[i] ^= 1 << (i % 8)
            altered = torch.frombuffer(bad, dtype=packed[name].dtype).view(packed[name].shape)
            with pytest.raises(ValueError, match=f'tensor {name!r} is not what was saved'):
                unpack({**packed, name: altered})


def test_an_altered_digest_is_refused():
    weights, mask = sample()
    packed = pack(weights, mask, SAVED)
    names = sorted(set(packed) - {DIGEST})
    for row, name in enumerate(names):
        vouched = packed[DIGEST].clone()
        vouched[row, 31] ^= 1
        with pytest.raises(ValueError, match=f'tensor {name!r} is not what was saved'):
            unpack({**packed, DIGEST: vouched})
    for bad in (packed[DIGEST][1:], packed[DIGEST].view(torch.int8), packed[DIGEST].flatten(), torch.zeros(())):
        with pytest.raises(ValueError, match=r"'supertickets.digest' .* vouches for other than"):
            unpack({**packed, DIGEST: bad})
    del packed[DIGEST]
    with pytest.raises(ValueError, match=r"no digest tensor 'supertickets.digest'"):
        unpack(packed)


def test_swapped_tensors_are_refused():
    weights, mask = sample()
    packed = pack({**weights, 'twin': weights['bn.running_mean'] + 1}, mask, SAVED)
    packed['twin'], packed['bn.running_mean'] = packed['bn.running_mean'], packed['twin']
    with pytest.raises(ValueError, match=r"tensor 'bn.running_mean' is not what was saved"):
        unpack(packed)


def model_and_ticket():
    model = timm.create_model('supernet_mbv2_tiny')
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = 'blocks.0.0.conv_pw.weight'
    alive = torch.rand_like(state[name]) > 0.5
    state[name] *= alive
    return model, state, {name: alive}, config_of(model.arch.to_json())


def test_another_arch_is_refused():
    model, state, mask, config = model_and_ticket()
    unpack_for_model(pack(state, mask, config), model)
    stages = [*config['model_args']['arch']['shape']['stages']]
    stages[-1] = [*stages[-1][:2], 1]  # another stride, which leaves no trace in shapes
    arch = {**config['model_args']['arch'], 'shape': {**config['model_args']['arch']['shape'], 'stages': stages}}
    for other in (config_of(arch), {**config, 'model_args': {}}):
        with pytest.raises(ValueError, match='saved for another arch'):
            unpack_for_model(pack(state, mask, other), model)
    with pytest.raises(ValueError, match='saved for another arch'):
        unpack_for_model(pack(state, mask, config), timm.create_model('test_resnet'))


def test_the_filter_passes_other_checkpoints_on():
    model = timm.create_model('supernet_mbv2_tiny')
    state = model.state_dict()
    assert unpack_for_model(state, model) is state
    assert not is_packed(state)
    assert is_packed(pack(state, {}, SAVED))


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_the_filter_verifies_and_unpacks(layout):
    model, state, mask, config = model_and_ticket()
    model = model.to(memory_format=layout)
    packed = pack(state, mask, config)
    unpacked = unpack_for_model(packed, model)
    assert list(unpacked) == list(state)
    assert all(torch.equal(unpacked[key], state[key]) for key in state)
    with pytest.raises(ValueError, match=r"tensor 'bn1.weight' is not what was saved"):
        unpack_for_model({**packed, 'bn1.weight': packed['bn1.weight'] + 1}, model)


def test_the_filter_leaves_the_model_alone_until_everything_is_verified():
    model, state, mask, config = model_and_ticket()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = pack(state, mask, config)
    with pytest.raises(ValueError, match='is not what was saved'):
        unpack_for_model({**packed, 'bn2.bias': packed['bn2.bias'] + 1}, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_ticket_of_half_the_precision_goes_into_a_model():
    model, state, mask, config = model_and_ticket()
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    unpacked = unpack_for_model(pack(half, mask, config), model)
    assert all(torch.equal(unpacked[name], half[name]) and unpacked[name].dtype == half[name].dtype for name in half)
    model.load_state_dict(unpacked)
    assert all(torch.equal(tensor, half[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'supertickets': {'format_version': 2, 'facts': {}}}, 'has format version 2; this package reads up to 1'),
        ({'supertickets': None}, 'has no "supertickets" section'),
        ({'model_args': 5}, "must have 'model_args' as a dict, got 5"),
        ({'pretrained_cfg': {'file': 'x', 'url': 'y'}}, 'pretrained_cfg must not set file, url'),
    ],
)
def test_a_config_that_is_none_is_refused(change, message):
    model, state, mask, config = model_and_ticket()
    with pytest.raises(ValueError, match=message):
        unpack_for_model(pack(state, mask, {**config, **change}), model)


def test_a_newer_version_is_named_though_its_digest_is_another():
    model, state, mask, config = model_and_ticket()
    packed = pack(state, mask, {**config, 'supertickets': {'format_version': 3, 'facts': {}}})
    packed[DIGEST] = packed[DIGEST][:, :16]
    with pytest.raises(ValueError, match='format version 3; this package reads up to 1: upgrade it'):
        unpack_for_model(packed, model)


@pytest.mark.parametrize(
    ('found', 'message'),
    [
        ({'a': {'b': [1, 3]}, 'c': 1}, r"here: 'a.b' is not what was saved with the weights, but \[1, 3\]"),
        ({'a': {'b': [1, 2]}, 'c': True}, "here: 'c' is not what was saved with the weights, but true"),
        ({'a': {'b': [1, 2]}, 'c': 1.0}, "here: 'c' is not what was saved with the weights, but 1.0"),
        ({'a': {'b': [1, 2]}}, "here lacks 'c'"),
        ({'a': {'b': [1, 2], 'd': 0}, 'c': 1}, "here has another key than was saved: 'a.d'"),
        ({'a': 5, 'c': 1}, "here: 'a' is not what was saved"),
        ({'a': {'b': [1, 2]}, 'c': [[] * 3] * 300}, r"here: 'c' is not what .*, but .{80}\.\.\.$"),
    ],
)
def test_what_differs_is_named(found, message):
    saved = {'a': {'b': (1, 2)}, 'c': 1}
    check_same(saved, {'c': 1, 'a': {'b': [1, 2]}}, 'here')
    with pytest.raises(ValueError, match=message):
        check_same(saved, found, 'here')


def test_packing_leaves_its_input_alone():
    weights, mask = sample()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    pack(weights, mask, SAVED)
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in before)
