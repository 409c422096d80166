import copy
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models._features import FeatureGetterNet
from torch import nn

from timm_supertickets import bake, prunable
from timm_supertickets.bake import SURPLUS, BakedBlock, Shift
from timm_supertickets.cost import model_cost
from timm_supertickets.layers import DroppedBlock, MixedBlock, MixedDepthwiseConv2d
from timm_supertickets.models.hr import ProjectedBlock
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import random

# stem 4 (stride 2); block 0: 4 -> 6, stride 2; block 1: 6 -> 6, residual; block 2: 6 -> 5, stride 1, so that what
# lies between blocks 1 and 2 is no feature map; head 7
ARCH = {
    'space': 'mbv2',
    'shape': {'stem': 4, 'stages': [[6, 2, 2], [5, 1, 1]], 'head': 7},
    'blocks': [{'3': 3}, {'5': 3}, {'7': 3}],
}


def net(arch=ARCH, **kwargs):
    """Weights in [0.5, 1.5], biases in [0.1, 0.2]; nothing is constant, silent or unread. In float64."""
    torch.manual_seed(0)
    model = timm.create_model('superticket_mbv2', arch=arch, num_classes=2, **kwargs).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, 0.1, 0.2)
                module.running_mean.zero_()
                module.running_var.uniform_(0.5, 1.5)
            elif isinstance(module, nn.Conv2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                module.weight /= module.weight[0].numel()
    return model


def trained(name, sparsity, **kwargs):
    """A random mask, and statistics as after training: any sign of scale and shift."""
    torch.manual_seed(round(1000 * sparsity))
    model = timm.create_model(name, num_classes=5, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.5)
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    if sparsity:
        prune(random(model), sparsity).zero_weights_(model)
    return model


def images(model, size=(37, 42), batch=2):
    like = next(model.parameters())
    return torch.randn(batch, model.in_chans, *size, generator=torch.Generator().manual_seed(0)).to(like)


@torch.no_grad()
def error(model, baked, size=(37, 42)):
    """Largest difference of scores, as a share of the largest."""
    x = images(model, size)
    expected = copy.deepcopy(model).eval()(x)
    return float((baked(x) - expected).abs().max() / expected.abs().max())


def same(model, size=(37, 42)):
    """The baked model, once it is seen to compute the same."""
    baked = bake(model)
    assert error(model, baked, size) < 1e-10
    return baked


def blocks(model):
    return [module for module in model.modules() if isinstance(module, (MixedBlock, BakedBlock))]


def depthwise(block):
    if isinstance(block, BakedBlock):
        return [branch.conv_dw for branch in block.branches.values()]
    conv = block.conv_dw
    return list(conv.values()) if isinstance(conv, MixedDepthwiseConv2d) else [conv]


def kernels(block):
    """Which channels have a living depthwise weight."""
    return torch.cat([conv.weight.flatten(1).any(1) for conv in depthwise(block)])


def hidden(model):
    return [block.conv_pwl.in_channels for block in blocks(model)]


def affine(norm):
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def test_batch_norm_becomes_a_scale_and_a_bias_by_hand():
    model = net()
    with torch.no_grad():
        model.bn1.weight[0], model.bn1.bias[0], model.bn1.eps = 3, 0.5, 0.25
        model.bn1.running_mean[0], model.bn1.running_var[0] = 2, 2
    baked = same(model)
    # 3 / sqrt(2 + 0.25) = 2, 0.5 - 2 * 2 = -3.5
    assert torch.allclose(baked.conv_stem.weight[0], 2 * model.conv_stem.weight[0])
    assert baked.conv_stem.bias[0] == -3.5
    assert isinstance(baked.bn1, nn.ReLU6)
    assert hidden(baked) == [3, 3, 3]  # nothing else to do


@torch.no_grad()
@pytest.mark.parametrize('index', [0, 1, 2])
def test_a_hidden_channel_that_nothing_reads_goes(index):
    model = net()
    blocks(model)[index].conv_pwl.weight[:, 1] = 0
    baked = same(model)
    assert hidden(baked) == [2 if i == index else 3 for i in range(3)]
    (branch,) = blocks(baked)[index].branches.values()
    pw, dw, pwl = branch.conv_pw, branch.conv_dw, blocks(baked)[index].conv_pwl
    assert (pw.weight.shape[0], dw.weight.shape[0], pwl.weight.shape[1]) == (2, 2, 2)
    assert pw.bias.shape == dw.bias.shape == (2,)


@torch.no_grad()
def test_a_dead_kernel_leaves_a_constant_that_goes_into_the_bias_by_hand():
    model = net()
    block = blocks(model)[0]
    block.conv_dw.k3.weight[2] = 0
    baked = same(model)
    assert hidden(baked) == [2, 3, 3]
    _, before = affine(block.bn2)
    scale, after = affine(block.bn3)
    constant = before[2].clamp(0, 6)
    assert constant > 0
    expected = after + scale * block.conv_pwl.weight[:, 2, 0, 0] * constant
    assert torch.allclose(blocks(baked)[0].conv_pwl.bias, expected)


@torch.no_grad()
@pytest.mark.parametrize('stride', [1, 2])
def test_a_constant_before_the_kernel_stays_where_the_zeros_around_the_map_change_it(stride):
    index = {2: 0, 1: 1}[stride]
    model = net()
    block = blocks(model)[index]
    block.conv_pw.weight[0] = 0
    baked = same(model)
    assert hidden(baked) == [3, 3, 3]

    # what a fold that forgets the border would do: the sum of the kernel times the constant, everywhere
    _, value = affine(block.bn1)
    scale, shift = affine(block.bn2)
    conv = depthwise(block)[0]
    naive = (scale[0] * conv.weight[0].sum() * value[0] + shift[0]).clamp(0, 6)
    wrong = copy.deepcopy(block)
    depthwise(wrong)[0].weight[0] = 0
    wrong.bn2.bias[0] = naive + wrong.bn2.running_mean[0] * scale[0]
    x = torch.rand(1, block.conv_pw.in_channels, 12, 12, dtype=torch.float64)
    difference = (wrong(x) - block(x)).abs().amax((0, 1))
    ring = conv.kernel_size[0] // 2
    assert difference[0].min() > 1e-3
    assert difference[ring:-ring, ring:-ring].max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize('stride', [1, 2])
def test_a_constant_before_a_kernel_of_which_the_centre_lives_goes_by_hand(stride):
    index = {2: 0, 1: 1}[stride]
    model = net()
    block = blocks(model)[index]
    block.conv_pw.weight[0] = 0
    kernel = depthwise(block)[0].weight[0, 0]
    middle = len(kernel) // 2
    centre = float(kernel[middle, middle])
    kernel.zero_()[middle, middle] = centre
    baked = same(model)
    assert hidden(baked)[index] == 2
    value = affine(block.bn1)[1][0].clamp(0, 6)
    scale, shift = affine(block.bn2)
    constant = (scale[0] * centre * value + shift[0]).clamp(0, 6)
    outer, after = affine(block.bn3)
    expected = after + outer * block.conv_pwl.weight[:, 0, 0, 0] * constant
    assert torch.allclose(blocks(baked)[index].conv_pwl.bias, expected)
    kernel[middle, middle - 1] = 1e-6  # as small as can be seen: a tap beside the centre meets the border
    assert hidden(same(model))[index] == 3


@torch.no_grad()
def test_a_constant_that_is_zero_before_the_kernel_goes_whatever_the_kernel():
    model = net()
    block = blocks(model)[1]
    block.conv_pw.weight[0] = 0
    block.bn1.bias[0] = -0.1
    baked = same(model)
    assert hidden(baked) == [3, 2, 3]


@torch.no_grad()
@pytest.mark.parametrize(
    ('bias', 'taps', 'left'),
    [
        (-0.1, -0.5, 2),  # never above 0
        (0.1, -0.5, 3),  # above 0 where the channel is 0
        (-0.1, 0.5, 3),
        (6.1, 0.5, 2),  # never below 6
        (5.9, 0.5, 3),
        (6 * 9 * 0.5 + 5.9, -0.5, 3),  # 5.9 where all of the channel is 6
        (6 * 9 * 0.5 + 6.1, -0.5, 2),  # 6.1 there
    ],
)
def test_a_channel_whose_activation_never_moves_goes(bias, taps, left):
    model = net()
    block = blocks(model)[0]
    block.conv_dw.k3.weight[1] = taps
    block.bn2.weight[1], block.bn2.bias[1] = (block.bn2.running_var[1] + block.bn2.eps).sqrt(), bias
    assert hidden(same(model)) == [left, 3, 3]


@torch.no_grad()
def test_relu_has_no_upper_end_and_other_activations_no_end():
    for act, left in (('relu', 3), ('silu', 3), ('relu6', 2)):
        model = net(act_layer=act)
        blocks(model)[0].bn2.bias[1] = 6.1
        assert hidden(same(model))[0] == left
    for act, left in (('relu', 2), ('silu', 3)):
        model = net(act_layer=act)
        blocks(model)[0].conv_dw.k3.weight[1] = -1
        blocks(model)[0].bn2.bias[1] = -1
        assert hidden(same(model))[0] == left
    model = net(act_layer='silu')
    blocks(model)[0].conv_dw.k3.weight[1] = 0
    assert hidden(same(model))[0] == 2
    model = net(act_layer='silu')  # a constant below 0, and the zeros around the map are above it
    blocks(model)[0].conv_pw.weight[1] = 0
    blocks(model)[0].bn1.bias[1] = -1
    assert hidden(same(model))[0] == 3


@torch.no_grad()
def test_what_goes_takes_with_it_what_only_it_read():
    arch = {**ARCH, 'shape': {**ARCH['shape'], 'stages': [[6, 2, 1], [5, 1, 1]]}}  # its stem is no feature map
    model = net(arch)
    first, _, last = blocks(model)
    last.conv_pwl.weight[:, 0] = 0  # this goes
    for block in blocks(model)[1:]:
        block.conv_pw.weight[:, 4] = 0
    last.conv_pw.weight[0, 4] = 1  # and with it the only reader of channel 4 between block 0 and block 2
    first.conv_pwl.weight[:, 1] = 0
    first.conv_pwl.weight[4, 1] = 1  # and with that the only reader of the first block's channel 1
    first.conv_pw.weight[:, 2] = 0
    first.conv_pw.weight[1, 2] = 1  # and with that the only reader of the stem's channel 2
    baked = same(model)
    assert hidden(baked) == [2, 3, 2]
    assert baked.conv_stem.out_channels == 3
    assert [block.conv_pwl.out_channels for block in blocks(baked)] == [5, 5, 5]
    assert [next(iter(block.branches.values())).conv_pw.in_channels for block in blocks(baked)] == [3, 5, 5]
    assert torch.equal(baked.conv_stem.weight, bake(net(arch)).conv_stem.weight[[0, 1, 3]])


@torch.no_grad()
def test_channels_of_a_feature_map_stay():
    arch = {**ARCH, 'shape': {**ARCH['shape'], 'stages': [[6, 2, 2], [5, 1, 2]]}}
    model = net(arch)
    assert [info['num_chs'] for info in model.feature_info] == [4, 6, 5]
    for block in blocks(model):
        block.conv_pw.weight[:, 3] = 0
    baked = same(model)
    assert baked.conv_stem.out_channels == 4
    assert [block.conv_pwl.out_channels for block in blocks(baked)] == [6, 6, 5]


@torch.no_grad()
def test_a_residual_block_that_adds_nothing_goes_and_a_constant_one_adds_that():
    model = net()
    blocks(model)[1].conv_pwl.weight.zero_()
    baked = same(model)
    assert isinstance(baked.blocks[0][1], Shift)
    assert torch.allclose(baked.blocks[0][1].bias.flatten(), affine(blocks(model)[1].bn3)[1])
    blocks(model)[1].bn3.bias.zero_()
    baked = same(model)
    assert type(baked.blocks[0][1]) is DroppedBlock
    assert hidden(baked) == [3, 3]


@torch.no_grad()
def test_any_other_block_keeps_a_channel():
    model = net()
    blocks(model)[0].conv_pwl.weight.zero_()
    assert hidden(same(model)) == [1, 3, 3]


@torch.no_grad()
def test_a_projected_block_that_adds_a_constant_leaves_it_to_the_projection():
    model = trained('supernet_hr_tiny', 0).double()
    name, parent = next((n, m) for n, m in model.named_modules() if isinstance(m, ProjectedBlock))
    parent.block.conv_pwl.weight.zero_()
    baked = same(model, (64, 64))
    assert baked.get_submodule(name).block is None
    assert torch.allclose(baked.get_submodule(name).shortcut.bias, affine(parent.block.bn3)[1])


@torch.no_grad()
@pytest.mark.parametrize('pool', ['avg', 'max', 'avgmax', 'catavgmax'])
def test_a_constant_of_the_head_goes_into_the_classifiers_bias(pool):
    model = net(global_pool=pool)
    model.conv_head.weight[3] = 0
    baked = same(model)
    copies = 2 if pool == 'catavgmax' else 1
    assert (baked.conv_head.out_channels, baked.classifier.in_features) == (6, 6 * copies)
    assert (baked.num_features, baked.head_hidden_size) == (6, 6 * copies)
    columns = model.classifier.weight[:, 3::7].sum(1)
    assert torch.allclose(baked.classifier.bias, model.classifier.bias + columns * affine(model.bn2)[1][3])
    model.classifier.weight[:, 5::7] = 0
    assert bake(model).conv_head.out_channels == 5
    assert same(model).classifier.in_features == 5 * copies


@torch.no_grad()
def test_features_that_are_the_output_stay():
    model = net()
    model.reset_classifier(0)
    model.conv_head.weight[3] = 0
    assert same(model).conv_head.out_channels == 7


@torch.no_grad()
@pytest.mark.parametrize('stride', [16, 32])  # with 16 the later blocks are dilated
def test_kernels_lose_dead_rings(stride):
    arch = {
        'space': 'mbv2',
        'shape': {'stem': 4, 'stages': [[8, 1, 2], [8, 1, 2], [8, 1, 2], [8, 2, 2]], 'head': 8},
        'blocks': [{'3': 4}, {'3': 4}, {'3': 4}, {'3': 4}, {'3': 16, '7': 16}],
    }
    model = net(arch, output_stride=stride)
    block = blocks(model)[-1]
    large, small = block.conv_dw.k7, block.conv_dw.k3
    ring5 = F.pad(torch.ones(5, 5), [1] * 4)
    ring3 = F.pad(torch.ones(3, 3), [2] * 4)
    large.weight[:8] *= ring5
    large.weight[8:16] *= ring3
    small.weight[:8] *= F.pad(torch.ones(1, 1), [1] * 4)
    size = (160, 130)
    baked = same(model, size)
    convs = depthwise(blocks(baked)[-1])
    assert {conv.kernel_size: conv.out_channels for conv in convs} == {(1, 1): 8, (3, 3): 16, (5, 5): 8}
    assert {conv.dilation[0] for conv in convs} == {32 // stride}
    large.weight[3, 0, 6, 2] = 1e-3  # one channel needs the whole of it, and for so narrow a block 7 beside it are dear
    convs = depthwise(blocks(same(model, size))[-1])
    assert {conv.kernel_size: conv.out_channels for conv in convs} == {(1, 1): 8, (3, 3): 16, (5, 5): 4, (7, 7): 4}


def test_a_kernel_size_of_one_channel():
    for kernels in ({'3': 1, '7': 3}, {'3': 1}):
        model = net({**ARCH, 'blocks': [kernels, {'5': 3}, {'7': 3}]})
        convs = depthwise(blocks(same(model))[0])
        assert [conv.out_channels for conv in convs] == list(kernels.values())


@torch.no_grad()
@pytest.mark.parametrize(('alive', 'channels'), [(32, 32), (29, 32), (25, 28), (9, 9), (8, 8), (7, 7), (1, 1)])
def test_channels_fill_up_steps(alive, channels):
    arch = {**ARCH, 'blocks': [{'3': 32}, {'5': 3}, {'7': 3}]}
    model = net(arch)
    blocks(model)[0].conv_pwl.weight[:, alive:] = 0
    baked = same(model)
    assert hidden(baked) == [channels, 3, 3]
    (branch,) = blocks(baked)[0].branches.values()
    for living in (blocks(baked)[0].conv_pwl.weight.any(0), branch.conv_pw.weight.any(1), branch.conv_pw.bias):
        assert int(living.count_nonzero()) == alive


@torch.no_grad()
def test_a_step_has_the_kernel_size_that_one_of_its_channels_needs():
    arch = {
        'space': 'mbv2',
        'shape': {'stem': 64, 'stages': [[64, 1, 2]], 'head': 8},
        'blocks': [{'3': 30, '5': 5, '7': 13}],
    }
    convs = depthwise(blocks(same(net(arch)))[0])
    # 24 3x3; 6 3x3 and 2 5x5; 3 5x5 and 5 7x7; 8 7x7
    assert {conv.kernel_size: conv.out_channels for conv in convs} == {(3, 3): 24, (5, 5): 8, (7, 7): 16}


@torch.no_grad()
def test_an_unread_channel_that_fills_up_a_step_is_written_no_more():
    arch = {**ARCH, 'shape': {**ARCH['shape'], 'stages': [[16, 2, 2], [5, 1, 1]]}}
    model = net(arch)
    for block in blocks(model)[1:]:
        block.conv_pw.weight[:, 4] = 0
    blocks(model)[0].conv_pwl.weight[:, 1] = 0
    blocks(model)[0].conv_pwl.weight[4, 1] = 1
    baked = same(model)
    assert [block.conv_pwl.out_channels for block in blocks(baked)] == [16, 16, 5]
    assert hidden(baked) == [2, 3, 3]


SPACES = [
    ('supernet_mbv2_tiny', {}),
    ('supernet_mbv2_tiny', {'act_layer': 'hard_swish', 'in_chans': 1, 'drop_path_rate': 0.1}),
    ('supernet_hr_tiny', {'in_chans': 4}),
    ('supernet_hr_tiny', {'head': 'dense'}),
    ('supernet_hr_tiny', {'tokens': 2}),
]


@pytest.mark.parametrize('sparsity', [0, 0.8, 0.97])
@pytest.mark.parametrize(('name', 'kwargs'), SPACES)
def test_random_masks(name, kwargs, sparsity):
    model = trained(name, sparsity, **kwargs).train()
    model.set_grad_checkpointing()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    baked = bake(model)
    assert error(model, baked) < 1e-5
    assert error(model.double(), bake(model)) < 1e-10
    assert not [name for name, _ in baked.named_buffers() if 'running' in name]
    assert not any(module.training or getattr(module, 'grad_checkpointing', False) for module in baked.modules())
    assert not any(param.requires_grad for param in baked.parameters())
    assert all(param.dtype == torch.float32 for param in baked.parameters())

    assert all(torch.equal(tensor.to(before[name]), before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(param.requires_grad for param in model.parameters())
    shared = {param.data_ptr() for param in model.parameters()} & {param.data_ptr() for param in baked.parameters()}
    assert not shared

    size = (model.in_chans, 37, 42)
    was, now = model_cost(model, size), model_cost(baked, size)
    assert now.params < was.params
    assert now.macs <= was.macs
    # at the least, what nothing reads and what has a dead kernel goes
    left = sum(int(block.conv_pwl.weight.any(0).sum()) for block in blocks(baked))
    assert left <= sum(int((block.conv_pwl.weight.any(0).flatten() & kernels(block)).sum()) for block in blocks(model))


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(['supernet_mbv2_tiny', 'supernet_hr_tiny']),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.3, 0.8, 0.95]),
    st.sampled_from([(32, 32), (33, 47), (64, 32)]),
)
def test_whole_rows_columns_rings_and_scales_that_died(name, seed, share, size):
    model = trained(name, 0.5, width=0.5).double()
    generator = torch.Generator().manual_seed(seed)

    def dies(count):
        return torch.rand(count, generator=generator) < share * torch.rand(1, generator=generator)

    with torch.no_grad():
        for weight in prunable(model).values():
            weight[dies(weight.shape[0])] = 0
            weight[:, dies(weight.shape[1])] = 0
            if weight.shape[-1] > 3:
                weight[dies(weight.shape[0])] *= F.pad(torch.ones(3, 3), [(weight.shape[-1] - 3) // 2] * 4)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[dies(len(module.weight))] = 0
                module.bias[dies(len(module.bias))] = 0
    baked = same(model, size)
    again = bake(baked)
    assert error(model, again, size) < 1e-10
    assert hidden(again) == hidden(baked)


@pytest.mark.parametrize('sparsity', [50, 80, 90])
def test_the_shipped_tickets_keep_their_scores(sparsity):
    model = timm.create_model(f'superticket_mbv2_s{sparsity}', pretrained=True)
    baked = bake(model)
    assert error(model, baked, (64, 64)) < 1e-5
    assert error(model.double(), bake(model), (64, 64)) < 1e-10
    # few of their channels are dead, so that filling up steps of eight can cost more than what goes
    assert model_cost(baked, (3, 64, 64)).macs <= (1 + SURPLUS) * model_cost(model, (3, 64, 64)).macs


def test_costs_by_hand():
    model = net()
    with torch.no_grad():
        blocks(model)[0].conv_pwl.weight[:, 0] = 0
    size = (3, 32, 32)
    # a hidden channel of the first block: 4 weights on 16x16, 9 and 6 on 8x8
    assert model_cost(model, size).macs - model_cost(bake(model), size).macs == 4 * 256 + 15 * 64


@torch.no_grad()
@pytest.mark.parametrize('name', ['supernet_mbv2_tiny', 'supernet_hr_tiny'])
def test_feature_maps_are_those_of_the_model(name):
    model = trained(name, 0.9).double().eval()
    x = images(model, (64, 64))
    expected = model.forward_intermediates(x, intermediates_only=True)
    wrapped = FeatureGetterNet(bake(model), out_indices=tuple(range(len(model.feature_info))))
    assert [map.shape[1] for map in expected] == wrapped.feature_info.channels()
    for found, wanted in zip(wrapped(x), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))


@torch.no_grad()
@pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning')
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # the check of the image's size
@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning')
def test_tracing_scripting_exporting_compiling_and_copying():
    model = trained('supernet_mbv2_tiny', 0.9)
    baked = bake(model)
    x = images(model, (64, 64))
    expected = baked(x)
    torch.compiler.reset()
    for run in (
        torch.jit.trace(baked, x),
        torch.jit.script(baked),
        torch.export.export(baked, (x,)).module(),
        torch.compile(baked, fullgraph=True, backend='aot_eager'),
        copy.deepcopy(baked),
    ):
        assert torch.allclose(run(x), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize('kwargs', [{}, {'head': 'dense'}])
def test_exporting_parallel_branches(kwargs):
    model = trained('supernet_hr_tiny', 0.9, **kwargs)
    baked = bake(model)
    x = images(model, (64, 64))
    expected = baked(x)
    found = torch.export.export(baked, (x,)).module()(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@torch.no_grad()
def test_other_dtypes_stay():
    model = trained('supernet_mbv2_tiny', 0.5).to(torch.bfloat16)
    baked = bake(model)
    assert {param.dtype for param in baked.parameters()} == {torch.bfloat16}
    assert baked(images(model)).isfinite().all()


def test_what_can_not_be_baked():
    for model in (
        timm.create_model('test_resnet'),
        nn.Sequential(net()),
        timm.create_model('supernet_mbv2_tiny', features_only=True),
    ):
        with pytest.raises(ValueError, match=f'only members of the spaces hr and mbv2 .* got {type(model).__name__};'):
            bake(model)
    for norm in ('groupnorm1', partial(nn.BatchNorm2d, track_running_stats=False)):
        model = timm.create_model('supernet_mbv2_tiny', norm_layer=norm)
        with pytest.raises(
            ValueError, match=rf'only batch norm with running .* folded, got {type(model.bn1).__name__}'
        ):
            bake(model)
