import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_supertickets.channels import Member
from timm_supertickets.layers import DroppedBlock, MixedBlock, MixedDepthwiseConv2d, block_group, residual


def make_block(kernels: dict[int, int], **kwargs) -> MixedBlock:
    """In float64, with batch norms that do something."""
    torch.manual_seed(0)
    block = MixedBlock(4, 4 if kwargs.get('skip') else 6, kernels, dtype=torch.float64, **kwargs)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return block


def branches(x, tensors, kernels, stride, dilation, skip, training):
    """One inverted residual per kernel size, each of plain functions; their sum goes through one batch norm."""

    def norm(x, name, part=slice(None)):
        mean, var = tensors[f'{name}.running_mean'][part], tensors[f'{name}.running_var'][part]
        return F.batch_norm(x, mean, var, tensors[f'{name}.weight'][part], tensors[f'{name}.bias'][part], training)

    total, start = 0, 0
    for kernel, channels in kernels.items():
        part = slice(start, start + channels)
        hidden = F.relu6(norm(F.conv2d(x, tensors['conv_pw.weight'][part]), 'bn1', part))
        padding = dilation * (kernel - 1) // 2
        hidden = F.conv2d(
            hidden, tensors[f'conv_dw.k{kernel}.weight'], None, stride, padding, dilation, groups=channels
        )
        hidden = F.relu6(norm(hidden, 'bn2', part))
        total = total + F.conv2d(hidden, tensors['conv_pwl.weight'][:, part])
        start += channels
    out = norm(total, 'bn3')
    return out + x if skip else out


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    ('kernels', 'stride', 'dilation', 'skip'),
    [
        ({3: 5, 5: 3, 7: 4}, 1, 1, True),
        ({3: 5, 5: 3, 7: 4}, 2, 1, False),
        ({3: 2, 7: 1}, 1, 2, True),
        ({7: 2, 3: 3}, 1, 1, False),
        ({5: 1}, 2, 1, False),
    ],
)
def test_fused_block_equals_the_sum_of_branches(kernels, stride, dilation, skip, training):
    block = make_block(kernels, stride=stride, dilation=dilation, skip=skip).train(training)
    tensors = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    params = {name: tensors[name].requires_grad_() for name, _ in block.named_parameters()}
    x = torch.randn(3, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    x_ref = x.detach().clone().requires_grad_()

    out = block(x)
    expected = branches(x_ref, tensors, kernels, stride, dilation, skip, training)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)

    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, x_ref.grad, rtol=1e-11, atol=1e-11)
    for name, param in block.named_parameters():
        torch.testing.assert_close(param.grad, params[name].grad, rtol=1e-11, atol=1e-11)
    for name, buffer in block.named_buffers():
        if 'running' in name:
            torch.testing.assert_close(buffer, tensors[name], rtol=1e-12, atol=1e-12)


def test_depthwise_by_hand():
    conv = MixedDepthwiseConv2d({3: 1, 5: 2})
    assert [tuple(c.weight.shape) for c in conv.values()] == [(1, 1, 3, 3), (2, 1, 5, 5)]
    for scale, module in zip((1.0, 2.0), conv.values(), strict=True):
        nn.init.constant_(module.weight, scale)
    x = torch.zeros(1, 3, 7, 7)
    x[:, :, 3, 3] = torch.tensor([1.0, 10.0, 100.0])
    # an impulse spreads over the kernel's window, in its own channel only
    assert conv(x).sum((0, 2, 3)).tolist() == [1.0 * 9, 20.0 * 25, 200.0 * 25]
    assert conv(x).amax((0, 2, 3)).tolist() == [1.0, 20.0, 200.0]


def test_names_are_those_of_timms_inverted_residual():
    from timm.models._efficientnet_blocks import InvertedResidual

    theirs = dict(InvertedResidual(4, 6, exp_ratio=4.0).named_parameters())
    ours = dict(make_block({3: 16}).named_parameters())
    assert [name.replace('.k3', '') for name in ours] == list(theirs)
    assert [p.shape for p in ours.values()] == [p.shape for p in theirs.values()]


def test_act_and_norm_layers_are_used():
    block = MixedBlock(4, 6, {3: 2}, act_layer='silu', norm_layer=partial(nn.BatchNorm2d, eps=0.25))
    assert isinstance(block.bn1.act, nn.SiLU)
    assert isinstance(block.bn2.act, nn.SiLU)
    assert [bn.eps for bn in (block.bn1, block.bn2, block.bn3)] == [0.25] * 3


def test_drop_path_drops_the_branch_and_scales_what_stays():
    block = make_block({3: 2}, skip=True, drop_path_rate=0.5)
    plain = copy.deepcopy(block)
    plain.drop_path = nn.Identity()
    x = torch.randn(64, 4, 5, 5, dtype=torch.float64)
    branch, dropped = plain(x) - x, block(x) - x
    kept = dropped.flatten(1).any(1)
    assert 0 < int(kept.sum()) < 64
    torch.testing.assert_close(dropped[kept], 2 * branch[kept])
    assert torch.equal(block.eval()(x), plain.eval()(x))


def test_feature_info_of_blocks():
    block = make_block({3: 2, 5: 3})
    assert block.feature_info('expansion') == {'module': 'conv_pwl', 'hook_type': 'forward_pre', 'num_chs': 5}
    assert block.feature_info('bottleneck') == {'module': '', 'num_chs': 6}
    assert DroppedBlock(9).feature_info('bottleneck') == {'module': '', 'num_chs': 9}


def test_dropped_block_is_the_identity():
    block, x = DroppedBlock(4), torch.randn(1, 4, 2, 2)
    assert block(x) is x
    assert not block.state_dict()


def test_residual_takes_equal_widths_and_stride_one():
    assert residual(8, 8, 1)
    assert not residual(8, 8, 2)
    assert not residual(8, 9, 1)


def test_block_group_by_hand():
    group = block_group('blocks.1.0', 3, ((3, 5), (7, 2)), True)
    assert (group.block, group.gate, group.shift) == (3, 'blocks.1.0.bn2.weight', 'blocks.1.0.bn2.bias')
    assert group.inside == 'blocks.1.0.'
    assert group.output == ('blocks.1.0.bn3.weight', 'blocks.1.0.bn3.bias')
    assert set(group.members) == {
        Member('blocks.1.0.conv_pw.weight', 0, 0, 7),
        *(
            Member(f'blocks.1.0.{norm}.{tensor}', 0, 0, 7)
            for norm in ('bn1', 'bn2')
            for tensor in ('weight', 'bias', 'running_mean', 'running_var')
        ),
        Member('blocks.1.0.conv_dw.k3.weight', 0, 0, 5),
        Member('blocks.1.0.conv_dw.k7.weight', 0, 5, 7),
        Member('blocks.1.0.conv_pwl.weight', 1, 0, 7),
    }
    assert block_group('a', 0, ((3, 5),), False).output == ()
