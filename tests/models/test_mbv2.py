import copy
import re
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

import timm_supertickets  # noqa: F401  registers the models
from timm_supertickets import Arch
from timm_supertickets.layers import DroppedBlock, MixedBlock
from timm_supertickets.models.mbv2 import FULL, block_places, full_arch
from timm_supertickets.search.shrink import shrink

NAMES = ['supernet_mbv2', 'supernet_mbv2_small', 'supernet_mbv2_tiny', 'superticket_mbv2']

# (channels of MobileNetV2's blocks, per stage), from table 2 of its paper
STAGES = [[16], [24] * 2, [32] * 3, [64] * 4, [96] * 3, [160] * 3, [320]]
SMALL = {
    'space': 'mbv2',
    'shape': {'stem': 8, 'stages': [[8, 2, 1], [12, 2, 2], [12, 1, 2], [16, 2, 2], [20, 3, 2]], 'head': 32},
    'blocks': [
        {'3': 4},
        {},
        {'5': 3, '7': 2},
        {'3': 2, '5': 2, '7': 2},
        {'7': 4},
        {'3': 6},
        {},
        {'3': 1},
        {},
        {},
    ],
}
DROPPED = ['blocks.0.1', 'blocks.3.1', 'blocks.4.1', 'blocks.4.2']


def small(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model('superticket_mbv2', arch=SMALL, **kwargs).eval()


def tiny(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model('supernet_mbv2_tiny', **kwargs).eval()


def altered(**changes) -> dict:
    """SMALL with other values of its shape, or of `space`, `blocks`."""
    data = copy.deepcopy(SMALL)
    for key, value in changes.items():
        (data if key in data else data['shape'])[key] = value
    return data


@pytest.mark.parametrize('name', NAMES)
def test_registered(name):
    assert timm.is_model(name)
    assert name in timm.list_models('super*mbv2*')
    assert timm.get_pretrained_cfg(name).classifier == 'classifier'
    assert not timm.is_model_pretrained(name)


@pytest.mark.parametrize('name', NAMES)
def test_unknown_arguments_raise(name):
    with pytest.raises(TypeError, match='not_an_argument'):
        timm.create_model(name, not_an_argument=1)


def test_supernet_has_mobilenetv2s_blocks_with_three_kernels_at_ratio_four():
    net = timm.create_model('supernet_mbv2', device='meta')
    before = 32
    for stage, channels in zip(net.blocks, STAGES, strict=True):
        for block, out in zip(stage, channels, strict=True):
            depthwise = {name: tuple(conv.weight.shape) for name, conv in block.conv_dw.items()}
            assert depthwise == {f'k{k}': (before * 4, 1, k, k) for k in (3, 5, 7)}
            assert block.conv_pw.weight.shape == (12 * before, before, 1, 1)
            assert block.conv_pwl.weight.shape == (out, 12 * before, 1, 1)
            before = out
    superticket = timm.create_model('superticket_mbv2', device='meta')
    assert superticket.arch == net.arch, 'the default is the largest member'


def test_all_but_the_blocks_is_timms_mobilenetv2():
    ours = timm.create_model('supernet_mbv2', device='meta')
    theirs = timm.create_model('mobilenetv2_100', device='meta')
    for key, value in theirs.state_dict().items():
        if not key.startswith('blocks.'):
            assert ours.state_dict()[key].shape == value.shape, key
    outside = [key for key in ours.state_dict() if not key.startswith('blocks.')]
    assert outside == [key for key in theirs.state_dict() if not key.startswith('blocks.')]
    assert {'conv_stem.weight', 'classifier.weight', 'classifier.bias'} <= set(outside)
    assert [len(stage) for stage in ours.blocks] == [len(stage) for stage in theirs.blocks]
    for our_stage, their_stage in zip(ours.blocks, theirs.blocks, strict=True):
        for our_block, their_block in zip(our_stage, their_stage, strict=True):
            assert our_block.feature_info('bottleneck')['num_chs'] == their_block.feature_info('bottleneck')['num_chs']
            assert our_block.has_skip == their_block.has_skip
    assert ours.feature_info == theirs.feature_info
    assert (ours.num_features, ours.head_hidden_size, ours.stage_ends) == (1280, 1280, theirs.stage_ends)


CHANNELS = {
    'supernet_mbv2': [16, 24, 32, 96, 320],
    'supernet_mbv2_small': [8, 16, 32, 64, 96],  # its stem is the first
    'supernet_mbv2_tiny': [8, 16, 16, 24, 32],
    'mobilenetv2_100': [16, 24, 32, 96, 320],
}


@pytest.mark.parametrize('name', CHANNELS)
@pytest.mark.parametrize('output_stride', [32, 16, 8])
def test_feature_reductions(name, output_stride):
    """timm's own net is held to the same."""
    net = timm.create_model(name, features_only=True, output_stride=output_stride).eval()
    channels = CHANNELS[name]
    reductions = [min(reduction, output_stride) for reduction in (2, 4, 8, 16, 32)]
    assert net.feature_info.channels() == channels
    assert net.feature_info.reduction() == reductions
    with torch.no_grad():
        shapes = [tuple(f.shape) for f in net(torch.randn(1, 3, 64, 64))]
    assert shapes == [(1, c, 64 // r, 64 // r) for c, r in zip(channels, reductions, strict=True)]


@pytest.mark.parametrize('output_stride', [16, 8])
def test_dilation_keeps_the_weights_view_of_the_image(output_stride):
    # at the image's centre, where no border is near, the dilated net sees what the strided one sees
    strided, dilated = tiny(), tiny(output_stride=output_stride)
    dilated.load_state_dict(strided.state_dict())
    x = torch.randn(1, 3, 512, 512)
    with torch.no_grad():
        one, other = strided.forward_features(x), dilated.forward_features(x)
    step = 32 // output_stride
    assert other.shape[-1] == one.shape[-1] * step
    torch.testing.assert_close(other[..., ::step, ::step][..., 6:10, 6:10], one[..., 6:10, 6:10], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['list', 'getter', 'hook'])
def test_features_only(kind):
    net, x = tiny(), torch.randn(2, 3, 32, 32)
    features = tiny(features_only=True, out_indices=(1, 3), feature_cls=kind)
    with torch.no_grad():
        seen = [net.bn1(net.conv_stem(x))]
        for stage in net.blocks:
            seen.append(stage(seen[-1]))
        found = features(x)
    assert torch.equal(found[0], seen[2])
    assert torch.equal(found[1], seen[4])
    assert features.feature_info.channels() == [16, 24]


@pytest.mark.parametrize(
    ('width', 'stem', 'channels', 'head'),
    [
        # in multiples of eight: 12 becomes 16, 36 becomes 40; the head only grows
        (0.5, 16, [8, 16, 16, 32, 48, 80, 160], 1280),
        (1.5, 48, [24, 40, 48, 96, 144, 240, 480], 1920),
    ],
)
def test_width(width, stem, channels, head):
    net = timm.create_model('supernet_mbv2', width=width, device='meta')
    assert net.conv_stem.out_channels == stem
    assert [stage[-1].conv_pwl.out_channels for stage in net.blocks] == channels
    assert net.num_features == head


@pytest.mark.parametrize('width', [0, -1.0])
def test_bad_width(width):
    with pytest.raises(ValueError, match=f'^width must be above 0, got {width}$'):
        timm.create_model('supernet_mbv2', width=width)


@pytest.mark.parametrize('make', [tiny, small])
def test_input_channels_classes_and_head(make):
    net = make(in_chans=1, num_classes=7)
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert net.conv_stem.weight.shape[1] == 1
    bare = make(num_classes=0)
    assert isinstance(bare.classifier, nn.Identity)
    features = bare.forward_features(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, bare.num_features, 2, 2)
    assert bare.forward_head(features).shape == (2, bare.num_features)
    assert make(num_classes=0, global_pool='')(torch.randn(2, 3, 64, 64)).shape == (2, bare.num_features, 2, 2)


def test_drop_rates():
    net = tiny(drop_rate=0.3, drop_path_rate=0.18)
    assert net.drop_rate == 0.3
    rates = [getattr(block.drop_path, 'drop_prob', 0.0) for stage in net.blocks for block in stage]
    # nine blocks, growing linearly from zero as timm's do
    assert rates == pytest.approx([0.18 * index / 9 for index in range(9)])
    theirs = timm.create_model('mobilenetv2_100', drop_path_rate=0.2, device='meta')
    ours = timm.create_model('supernet_mbv2', drop_path_rate=0.2, device='meta')
    assert [getattr(b.drop_path, 'drop_prob', 0.0) for s in ours.blocks for b in s] == pytest.approx(
        [getattr(b.drop_path, 'drop_prob', 0.0) for s in theirs.blocks for b in s]
    )
    assert not any(hasattr(module, 'drop_prob') for module in tiny().modules())


def test_act_and_norm_layers():
    net = tiny(act_layer='silu')
    assert not any(isinstance(module, nn.ReLU6) for module in net.modules())
    assert all(isinstance(m.bn2.act, nn.SiLU) for m in net.modules() if isinstance(m, MixedBlock))


def test_dropped_residual_block_is_the_identity():
    net, x = small(), torch.randn(2, 3, 64, 64)
    found = [name for name, module in net.named_modules() if isinstance(module, DroppedBlock)]
    assert found == DROPPED
    assert not any(name.startswith(f'{dropped}.') for name in net.state_dict() for dropped in DROPPED)
    with torch.no_grad():
        expected = net(x)
        pruned = copy.deepcopy(net)
        for stage, blocks in enumerate(pruned.blocks):
            pruned.blocks[stage] = nn.Sequential(*[block for block in blocks if not isinstance(block, DroppedBlock)])
        assert torch.equal(pruned(x), expected)


def test_features_of_a_net_with_dropped_blocks():
    net = small()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        seen = [net.bn1(net.conv_stem(x))]
        for stage in net.blocks:
            seen.append(stage(seen[-1]))
        final = net.forward_features(x)

        last, features = net.forward_intermediates(x)
        assert torch.equal(last, final)
        assert all(torch.equal(f, s) for f, s in zip(features, seen[1:], strict=True))
        _, everything = net.forward_intermediates(x, extra_blocks=True)
        assert all(torch.equal(f, s) for f, s in zip(everything, seen, strict=True))

        only = small(features_only=True)
        assert all(torch.equal(f, s) for f, s in zip(only(x), seen[1:], strict=True))
    assert only.feature_info.channels() == [8, 12, 12, 16, 20]
    assert only.feature_info.reduction() == [2, 4, 8, 16, 32]


@pytest.mark.parametrize(('settings', 'stride'), [({}, 32), ({'output_stride': 8}, 8)])
def test_an_image_smaller_than_the_stride_is_one_clear_line(settings, stride):
    net = timm.create_model('supernet_mbv2_tiny', **settings).eval()
    assert net(torch.randn(1, 3, stride, stride + 1)).shape == (1, 10)
    with pytest.raises(
        ValueError, match=f'an image of {stride - 1}x40 is smaller than the stride of {stride}'
    ) as caught:
        net(torch.randn(1, 3, stride - 1, 40))
    assert '\n' not in str(caught.value)
    traced = torch.fx.symbolic_trace(net)
    with pytest.raises(ValueError, match='is smaller than the stride'):
        traced(torch.randn(1, 3, stride - 1, 40))


@pytest.mark.parametrize('extra_blocks', [False, True])
@pytest.mark.parametrize('make', [small, tiny])
def test_prune_intermediate_layers(make, extra_blocks):
    x = torch.randn(2, 3, 64, 64)
    levels = 6 if extra_blocks else 5
    for index in range(levels):
        net = make().train()
        expected = make().forward_intermediates(x, [index], intermediates_only=True, extra_blocks=extra_blocks)[0]
        assert net.prune_intermediate_layers([index], prune_norm=True, extra_blocks=extra_blocks)
        found = net.eval().forward_intermediates(x, [index], intermediates_only=True, extra_blocks=extra_blocks)[0]
        assert torch.equal(found, expected)
        assert net.num_features == found.shape[1]
        found.sum().backward()
        assert all(param.grad is not None for param in net.parameters()), index


def check_groups(net: nn.Module) -> None:
    state = net.state_dict()
    params = dict(net.named_parameters())
    for group in net.channel_groups():
        assert group.gate in params
        assert group.shift == group.gate.replace('.weight', '.bias')
        tiles = []
        for name, dim, start, stop in group.members:
            assert state[name].shape[dim] == stop - start, name
            if (start, stop) != (0, group.channels) or 'conv_dw' in name:
                tiles.append((start, stop))
                kernel = state[name].shape[-1]
                assert (kernel, stop - start) in group.kernels
        assert tiles[0][0] == 0
        assert tiles[-1][1] == group.channels
        assert all(one[1] == other[0] for one, other in pairwise(tiles))
        # whatever has the axis is a member: all tensors inside but the last batch norm and the counters
        named = {member.name for member in group.members}
        rest = {name for name in state if name.startswith(group.inside)} - named
        bn3 = {f'{group.inside}bn3.{end}' for end in ('weight', 'bias', 'running_mean', 'running_var')}
        assert rest == bn3 | {f'{group.inside}bn{i}.num_batches_tracked' for i in (1, 2, 3)}
        assert group.gate in named
        assert set(group.output) <= set(params)


@pytest.mark.parametrize('make', [tiny, small])
def test_channel_groups_fit_the_tensors(make):
    net = make()
    check_groups(net)
    places = [name for name, module in net.named_modules() if isinstance(module, MixedBlock)]
    assert [group.inside for group in net.channel_groups()] == [f'{place}.' for place in places]
    for group in net.channel_groups():
        assert net.get_submodule(group.inside[:-1]).has_skip == group.droppable
        assert net.arch.blocks[group.block] == group.kernels


def test_block_places_by_hand():
    arch = Arch.from_json(SMALL)
    assert [name for name, _ in block_places(arch)] == [
        'blocks.0.0', 'blocks.0.1', 'blocks.1.0', 'blocks.1.1', 'blocks.2.0',
        'blocks.3.0', 'blocks.3.1', 'blocks.4.0', 'blocks.4.1', 'blocks.4.2',
    ]  # fmt: skip
    # the very first is residual as well: the stem is as wide as the first stage
    assert [droppable for _, droppable in block_places(arch)] == [
        True, True, False, True, False, False, True, False, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize('make', [tiny, small])
def test_every_parameter_gets_a_gradient(make):
    net = make().train()
    net(torch.randn(4, 3, 64, 64)).square().sum().backward()
    for name, param in net.named_parameters():
        assert param.grad is not None, name
        assert param.grad.abs().sum() > 0, name


@pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning')
@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning')
@pytest.mark.parametrize('make', [tiny, small])
def test_torchscript(make):
    net, x = make(scriptable=True), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(torch.jit.script(net)(x), expected)


@pytest.mark.parametrize('make', [tiny, small])
def test_grad_checkpointing_changes_nothing(make):
    x = torch.randn(4, 3, 32, 32)
    plain, checkpointed = make().train(), make().train()
    checkpointed.set_grad_checkpointing()
    plain(x).sum().backward()
    checkpointed(x).sum().backward()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize('make', [tiny, small])
def test_deepcopy_channels_last_and_bfloat16(make):
    net, x = make(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(x)
        copied = copy.deepcopy(net)
        assert torch.equal(copied(x), expected)
        assert copied.arch == net.arch
        torch.testing.assert_close(net.to(memory_format=torch.channels_last)(x), expected)
        assert net.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_device_and_dtype_place_everything():
    net = timm.create_model('superticket_mbv2', arch=SMALL, device='meta', dtype=torch.float64)
    assert all(tensor.is_meta for tensor in net.state_dict().values())
    assert {tensor.dtype for name, tensor in net.state_dict().items() if 'num_batches' not in name} == {torch.float64}


def test_same_arch_from_json_and_as_a_value():
    one, other = small(), timm.create_model('superticket_mbv2', arch=Arch.from_json(SMALL)).eval()
    assert one.arch == other.arch
    assert [t.shape for t in one.state_dict().values()] == [t.shape for t in other.state_dict().values()]
    assert one.arch.to_json() == SMALL


def test_rebuild_makes_another_member():
    net = tiny(num_classes=3, output_stride=8)
    arch = Arch('mbv2', net.arch.shape, ({3: 1}, *net.arch.blocks[1:]))
    other = net.rebuild(arch)
    assert other.arch == arch
    assert other.blocks[0][0].conv_pw.weight.shape[0] == 1
    assert other.num_classes == 3
    assert not other.training
    assert shrink(other, {}).arch == arch


def test_full_arch_by_hand():
    arch = full_arch(((16, 1, 1), (24, 2, 2)), 32, 64)
    assert dict(arch.shape) == {'stem': 32, 'stages': ((16, 1, 1), (24, 2, 2)), 'head': 64}
    assert [dict(block) for block in arch.blocks] == [dict.fromkeys((3, 5, 7), n) for n in (128, 64, 96)]
    assert [channels for channels, _, _ in FULL] == [stage[0] for stage in STAGES]


@pytest.mark.parametrize(
    ('arch', 'message'),
    [
        (altered(space='hr'), 'arch is of space \'hr\', this model takes space "mbv2"'),
        (
            altered(depth=3),
            "arch: shape of space \"mbv2\" has stem, stages and head, got ['depth', 'head', 'stages', 'stem']",
        ),
        (altered(stem=0), 'arch: stem must be a positive number of channels, got 0'),
        (altered(head=2.5), 'arch: head must be a positive number of channels, got 2.5'),
        (altered(head=True), 'arch: head must be a positive number of channels, got True'),
        (altered(stages=[]), 'arch: stages must be a list of [channels, blocks, stride], got ()'),
        (altered(stages=4), 'arch: stages must be a list of [channels, blocks, stride], got 4'),
        (altered(stages=[[8, 2]]), 'arch: a stage is [channels, blocks, stride 1 or 2], got (8, 2)'),
        (altered(stages=[[8, 2, 3]]), 'arch: a stage is [channels, blocks, stride 1 or 2], got (8, 2, 3)'),
        (altered(stages=['abc']), "arch: a stage is [channels, blocks, stride 1 or 2], got 'abc'"),
        (altered(blocks=[{'3': 4}]), 'arch has 1 blocks, but its stages ask for 10'),
        (
            altered(blocks=[{'9': 4}, *SMALL['blocks'][1:]]),
            'arch: blocks.0.0 has kernel size 9; space "mbv2" has 3, 5, 7',
        ),
        (
            altered(blocks=[*SMALL['blocks'][:2], {}, *SMALL['blocks'][3:]]),
            'arch: blocks.1.0 has no channels, and only residual blocks can be dropped',
        ),
        ({}, 'arch: expected the keys blocks, shape and space, got []'),
        ('mbv2', 'arch: expected the keys blocks, shape and space, got str'),
    ],
)
def test_an_arch_that_is_no_member_gets_one_clear_line(arch, message):
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        timm.create_model('superticket_mbv2', arch=arch)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'in_chans': 0}, 'in_chans must be at least 1, got 0'),
        ({'output_stride': 4}, 'output_stride must be 8, 16 or 32, got 4'),
        ({'output_stride': 64}, 'output_stride must be 8, 16 or 32, got 64'),
    ],
)
def test_arguments_out_of_range_get_one_clear_line(kwargs, message):
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        timm.create_model('supernet_mbv2_tiny', **kwargs)
