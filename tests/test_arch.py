import copy
import json
import pickle
import re

import pytest
import timm
import torch

from timm_supertickets import Arch
from timm_supertickets.layers import block_group

SHAPE = {'stem': 8, 'stages': [[4, 2, 1], [6, 1, 2]], 'head': 16}
BLOCKS = [{'3': 8, '5': 4}, {}, {'7': 2}]


def make() -> Arch:
    return Arch('mbv2', SHAPE, BLOCKS)


def test_lists_and_dicts_are_frozen_into_tuples_with_kernels_in_order():
    arch = Arch('mbv2', SHAPE, [{7: 1, 3: 2}])
    assert dict(arch.shape) == {'stem': 8, 'stages': ((4, 2, 1), (6, 1, 2)), 'head': 16}
    assert arch.blocks == (((3, 2), (7, 1)),)
    with pytest.raises(AttributeError):
        arch.space = 'hr'


def test_json_round_trip():
    arch = make()
    data = arch.to_json()
    assert data == {'space': 'mbv2', 'shape': SHAPE, 'blocks': BLOCKS}
    assert Arch.from_json(json.loads(json.dumps(data))) == arch
    assert Arch.from_json(arch) is arch


def test_the_order_of_a_json_file_does_not_matter():
    other = Arch('mbv2', dict(reversed(SHAPE.items())), [{'5': 4, '3': 8}, {}, {'7': 2}])
    assert other == make()
    assert hash(other) == hash(make())


def test_equality_hash_and_copies():
    arch = make()
    assert len({arch, make(), copy.deepcopy(arch), pickle.loads(pickle.dumps(arch))}) == 1
    assert arch != Arch('hr', SHAPE, BLOCKS)
    assert arch != Arch('mbv2', {**SHAPE, 'stem': 9}, BLOCKS)
    assert arch != Arch('mbv2', SHAPE, [{'3': 8, '5': 4}, {}, {'7': 3}])


def test_values_of_the_shape_by_name():
    assert make()['stages'] == ((4, 2, 1), (6, 1, 2))
    with pytest.raises(ValueError, match="'mbv2' has no 'tail'; it has: head, stages, stem"):
        make()['tail']


def test_shrunk_by_hand():
    arch = Arch('mbv2', {}, [{3: 2, 5: 3}, {3: 2, 7: 2}, {5: 2}])
    groups = [
        block_group('a', 0, ((3, 2), (5, 3)), False),
        block_group('b', 1, ((3, 2), (7, 2)), True),
        block_group('c', 2, ((5, 2),), True),
    ]
    keep = {
        'a.bn2.weight': torch.tensor([False, False, True, False, True]),
        'b.bn2.weight': torch.tensor([False, False, False, False]),
    }
    assert arch.shrunk(groups, keep).blocks == (((5, 2),), (), ((5, 2),))
    assert arch.shrunk(groups, {}) == arch


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ((3, {}, []), 'space must be a name such as "mbv2", got 3'),
        (('mbv2', 7, []), 'shape must map names to numbers or lists of them, got 7'),
        (('mbv2', None, []), 'shape must map names to numbers or lists of them, got None'),
        (('mbv2', {'stem': {'a': 1}}, []), "shape must map names to numbers or lists of them, got {'stem': {'a': 1}}"),
        (('mbv2', {'stem': [{1}]}, []), "shape must map names to numbers or lists of them, got {'stem': [{1}]}"),
        (('mbv2', {}, 5), 'blocks must be a list of {kernel size: channels}, got 5'),
        (('mbv2', {}, 'ab'), "blocks must be a list of {kernel size: channels}, got 'ab'"),
        (('mbv2', {}, {'3': 4}), "blocks must be a list of {kernel size: channels}, got {'3': 4}"),
        (('mbv2', {}, [{3: 4}, 9]), 'block 1 must be {kernel size: channels}, got 9'),
        (('mbv2', {}, [{'three': 4}]), "block 0 must be {kernel size: channels}, got {'three': 4}"),
        (('mbv2', {}, [{3.7: 4}]), 'block 0 must be {kernel size: channels}, got {3.7: 4}'),
        (('mbv2', {}, [{}, {4: 4}]), 'block 1 has kernel size 4; kernel sizes are odd, e.g. 3, 5, 7'),
        (('mbv2', {}, [{-3: 4}]), 'block 0 has kernel size -3; kernel sizes are odd'),
        (('mbv2', {}, [{3: 0}]), 'block 0 has 0 channels of kernel size 3; need at least 1'),
        (('mbv2', {}, [{3: 2.5}]), 'block 0 has 2.5 channels of kernel size 3; need at least 1'),
        (('mbv2', {}, [{3: True}]), 'block 0 has True channels of kernel size 3; need at least 1'),
        (('mbv2', {}, [{3: '4'}]), "block 0 has '4' channels of kernel size 3; need at least 1"),
        (('mbv2', {}, [[(3, 4), (3, 2)]]), 'block 0 names a kernel size twice: [(3, 4), (3, 2)]'),
    ],
)
def test_bad_input_gets_one_clear_line(args, message):
    with pytest.raises(ValueError, match=re.escape(f'arch: {message}')) as caught:
        Arch(*args)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('data', 'found'),
    [
        (None, 'NoneType'),
        ('mbv2', 'str'),
        ([1, 2], 'list'),
        ({}, '[]'),
        ({'space': 'mbv2', 'shape': {}}, "['shape', 'space']"),
        ({'space': 'mbv2', 'shape': {}, 'blocks': [], 'more': 1}, "['blocks', 'more', 'shape', 'space']"),
    ],
)
def test_json_with_other_keys_is_refused(data, found):
    with pytest.raises(ValueError, match=re.escape(f'arch: expected the keys blocks, shape and space, got {found}')):
        Arch.from_json(data)


@pytest.mark.parametrize(
    ('shape', 'blocks', 'message'),
    [
        ({'stem': 8, 'head': 10**9}, [{'3': 8}], 'its shape has a number above the limit of 16384'),
        ({'stem': 8, 'head': -(10**9)}, [{'3': 8}], 'its shape has a number above the limit of 16384'),
        ({'stem': 8}, [{}] * 1001, '1001 blocks are too many for a net; the limit is 1000'),
        ({'stages': [[8] * 1000] * 17}, [{}], 'are too many for a net'),
        ({'stem': 8}, [{'3': 10**9}], '1000000000 hidden channels at these widths are too many for a net'),
        ({'stem': 16384}, [{'3': 30000}, {'3': 40000}], '70000 hidden channels at these widths are too many'),
    ],
)
def test_numbers_that_no_net_has_are_refused_before_anything_is_built(shape, blocks, message):
    with pytest.raises(ValueError, match=message):
        Arch.from_json({'space': 'mbv2', 'shape': shape, 'blocks': blocks})


def test_ends_that_no_net_has_are_refused_before_anything_is_built():
    arch = {'space': 'mbv2', 'shape': {'stem': 8, 'stages': [[8, 1, 1]], 'head': 2048}, 'blocks': [{'3': 8}]}
    for kwargs in ({'num_classes': 10**9}, {'in_chans': 10**9}):
        with pytest.raises(ValueError, match='are too many for a net of these widths'):
            timm.create_model('superticket_mbv2', arch=arch, **kwargs)
    arch['shape']['stages'] = [[8, 10**4, 1]] * 1000
    with pytest.raises(ValueError, match='arch has 1 blocks, but its stages ask for 10000000'):
        timm.create_model('superticket_mbv2', arch=arch)
