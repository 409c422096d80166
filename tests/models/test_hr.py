import copy
import json

import pytest
import timm
import torch
from timm.models import group_parameters
from torch.nn import functional as F

from timm_supertickets import Arch, Ticket, load_ticket, prunable
from timm_supertickets.channels import check_keep
from timm_supertickets.cost import channel_macs, model_cost
from timm_supertickets.models.hr import block_places
from timm_supertickets.search.importance import gate_importance
from timm_supertickets.search.select import select_by_budget
from timm_supertickets.search.shrink import gate_, shrink
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import magnitude


@pytest.fixture(scope='module')
def tiny():
    torch.manual_seed(0)
    return timm.create_model('supernet_hr_tiny').eval()


@pytest.mark.parametrize(
    ('settings', 'size', 'params', 'gmacs', 'blocks', 'channels'),
    [
        ({'num_classes': 1000}, (3, 224, 224), 13_243_868, 2.4228, 67, 47_952),
        ({'num_classes': 19, 'head': 'dense'}, (3, 512, 1024), 10_110_235, 61.8366, 61, 44_928),
        ({'num_classes': 17, 'head': 'dense'}, (3, 256, 192), 10_110_053, 5.7966, 61, 44_928),
    ],
    ids=['classification', 'segmentation', 'keypoints'],
)
def test_costs_what_the_published_supernet_costs(settings, size, params, gmacs, blocks, channels):
    net = timm.create_model('supernet_hr', **settings)
    cost = model_cost(net, size)
    assert cost.params == params
    assert cost.macs / 1e9 == pytest.approx(gmacs, abs=5e-5)
    groups = net.channel_groups()
    assert (len(groups), sum(group.channels for group in groups)) == (blocks, channels)


def reference_block(block, x, residual, training):
    """A plain sum of one inverted residual per kernel size, one batch norm, and the input."""

    def norm(bn, x, rows=slice(None)):
        mean, var = bn.running_mean[rows].clone(), bn.running_var[rows].clone()
        return F.batch_norm(x, mean, var, bn.weight[rows], bn.bias[rows], training, bn.momentum, bn.eps)

    total, start = 0, 0
    for name, conv in block.conv_dw.items():
        rows = slice(start, start + conv.out_channels)
        y = F.relu(norm(block.bn1, F.conv2d(x, block.conv_pw.weight[rows]), rows))
        y = F.conv2d(y, conv.weight, stride=conv.stride, padding=int(name[1:]) // 2, groups=conv.groups)
        y = F.relu(norm(block.bn2, y, rows))
        total = total + F.conv2d(y, block.conv_pwl.weight[:, rows])
        start = rows.stop
    return norm(block.bn3, total) + (x if residual else 0)


def reference_net(net, x, training):
    """The whole net, written from its description with separate branches."""

    def bn(norm, x):
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        return F.relu(F.batch_norm(x, mean, var, norm.weight, norm.bias, training, norm.momentum, norm.eps))

    def edge(path, x):
        module = net.get_submodule(path)
        if hasattr(module, 'shortcut'):
            conv = module.shortcut
            projected = F.conv2d(x, conv.weight, stride=conv.stride, groups=conv.groups)
            return projected + reference_block(module.block, x, False, training)
        return reference_block(module, x, True, training)

    x = bn(net.bn1, F.conv2d(x, net.conv_stem.weight, stride=2, padding=1))
    xs = [bn(net.bn2, F.conv2d(x, net.conv2.weight, stride=2, padding=1))]
    for s, (depths, _) in enumerate(net.arch['stages']):
        ys = []
        for i in range(len(xs)):
            y = 0
            for k, j in enumerate(j for j in (i - 1, i, i + 1) if 0 <= j < len(xs)):
                part = edge(f'stages.{s}.fuse.{i}.{k}', xs[j])
                if j > i:
                    part = part.repeat_interleave(2, 2).repeat_interleave(2, 3)
                y = y + part
            ys.append(y)
        for g in range(len(depths) - len(xs)):
            ys.append(edge(f'stages.{s}.grow.{g}', ys[-1]))
        xs = ys
        for i, depth in enumerate(depths):
            for b in range(depth):
                xs[i] = edge(f'stages.{s}.branches.{i}.{b}', xs[i])
    if net.arch['task'] == 'dense':
        up = [F.interpolate(x, size=xs[0].shape[2:], mode='bilinear') for x in xs]
        y = edge('head.block', torch.cat(up, 1))
        return F.conv2d(y, net.classifier.weight, net.classifier.bias)
    y = edge('head.widen.0', xs[0])
    for i in range(1, len(xs)):
        y = edge(f'head.down.{i - 1}', y) + edge(f'head.widen.{i}', xs[i])
    y = bn(net.head.bn, F.conv2d(y, net.head.conv.weight))
    return F.linear(y.mean((2, 3)), net.classifier.weight, net.classifier.bias)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('head', ['classify', 'dense'])
def test_fused_net_equals_the_sum_of_branches(head, training):
    torch.manual_seed(0)
    net = timm.create_model('supernet_hr_tiny', head=head, num_classes=5).double().train(training)
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    expected = reference_net(net, x, training)
    assert expected.shape == ((3, 5) if head == 'classify' else (3, 5, 16, 16))
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-10)


def random_keep(net, seed=0):
    """Half of the channels die; so do a kernel size, a residual and a projected block as a whole, and one's tokens."""
    torch.manual_seed(seed)
    groups = net.channel_groups()
    keep = {group.gate: torch.rand(group.channels) > 0.5 for group in groups}
    places = {place.mixed: place for place in block_places(net.arch)}
    mixed = [group for group in groups if not group.gate.endswith('tokens.bn2.weight')]
    keep[mixed[3].gate][: mixed[3].kernels[0][1]] = False
    for residual in (True, False):
        dropped = next(g for g in mixed[1:] if places[g.gate.removesuffix('.bn2.weight')].is_residual == residual)
        keep[dropped.gate][:] = False
    for group in groups:
        if group.gate.endswith('tokens.bn2.weight') and group.block == 2:
            keep[group.gate][:] = False
    check_keep(groups, keep)
    return keep


@pytest.mark.parametrize('tokens', [0, 6])
@pytest.mark.parametrize('head', ['classify', 'dense'])
def test_shrunk_net_equals_the_gated_one(head, tokens):
    torch.manual_seed(0)
    net = timm.create_model('supernet_hr_tiny', head=head, tokens=tokens).double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    net(x)  # batch norm has seen something
    keep = random_keep(net)
    small = shrink(net, keep)
    gate_(net, keep)
    assert sum(g.channels for g in small.channel_groups()) < 0.6 * sum(g.channels for g in net.channel_groups())
    for training in (True, False):
        net.train(training), small.train(training)
        expected, out = net(x), small(x)
        assert ((out - expected).abs().max() / expected.abs().max()) < 1e-12


def test_tokens_stand_beside_every_block_and_are_searched():
    net = timm.create_model('supernet_hr_tiny', tokens=6)
    arch = net.arch
    assert arch.tokens == (6,) * len(arch.blocks)
    assert Arch.from_json(json.loads(json.dumps(arch.to_json()))) == arch
    groups = net.channel_groups()
    assert len(groups) == 2 * len(arch.blocks)
    keep = {group.gate: torch.ones(group.channels, dtype=torch.bool) for group in groups}
    first, second = (group for group in groups if group.gate.endswith('tokens.bn2.weight') and group.block in (1, 2))
    keep[first.gate][[0, 4]] = False
    keep[second.gate][:] = False
    small = shrink(net, keep).arch
    assert small.tokens == (6, 4, 0, *(6,) * (len(arch.blocks) - 3))
    assert small.blocks == arch.blocks


def test_without_tokens_the_net_has_no_trace_of_them(tiny):
    assert tiny.arch.tokens == ()
    assert 'tokens' not in tiny.arch.to_json()
    assert not [name for name in tiny.state_dict() if 'tokens' in name]


def test_a_dying_token_saves_what_it_costs():
    size = (3, 32, 32)
    net = timm.create_model('supernet_hr_tiny', tokens=6)
    groups, cost = net.channel_groups(), model_cost(net, size)
    macs = channel_macs(groups, cost)
    group = next(g for g in groups if g.gate == 'stages.1.grow.0.tokens.bn2.weight')
    # 64 long; query, output and both layers of the perceptron once per token, then 64 positions of 12 channels
    assert macs[group.gate].tolist() == [2 * 64 * 64 + 2 * 64 * 128 + 64 * 12] * 6
    keep = {group.gate: torch.tensor([True, False, False, True, True, True])}
    assert model_cost(shrink(net, keep), size).macs == cost.macs - 2 * macs[group.gate][0]


def test_dying_channels_save_what_they_cost(tiny):
    size = (3, 32, 32)
    groups, cost = tiny.channel_groups(), model_cost(tiny, size)
    macs = channel_macs(groups, cost)
    keep = select_by_budget(groups, gate_importance(tiny, groups), macs, cost.macs, 0.4 * cost.macs)
    saved = sum(macs[gate][~alive].sum() for gate, alive in keep.items())
    assert model_cost(shrink(tiny, keep), size).macs == cost.macs - saved
    assert model_cost(shrink(tiny, keep), size).macs <= 0.4 * cost.macs


@pytest.mark.parametrize('tokens', [0, 3])
@pytest.mark.parametrize('head', ['classify', 'dense'])
def test_ticket_goes_through_its_folder(tmp_path, head, tokens):
    torch.manual_seed(0)
    net = timm.create_model('supernet_hr_tiny', head=head, num_classes=7, tokens=tokens)
    net = shrink(net, random_keep(net))
    ticket = Ticket.draw(net, prune(magnitude(net), 0.8))
    folder = ticket.save(tmp_path / 'ticket')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert load_ticket(folder).arch == net.arch
    for name, tensor in ticket.weights.items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    dead = sum(int((weight == 0).sum()) for weight in prunable(loaded).values())
    assert dead == round(0.8 * ticket.mask.total)
    for settings in ({'num_classes': 3}, {'num_classes': 0}, {'in_chans': 1}, {'features_only': True}):
        timm.create_model(f'local-dir:{folder}', pretrained=True, **settings)


def test_prunable_weights_are_all_convolutions_but_stem_and_classifier():
    net = timm.create_model('supernet_hr', head='dense', num_classes=19)
    # the published supernet masks 9,921,330 weights, the 3 * 24 * 9 of its first convolution among them
    assert sum(weight.numel() for weight in prunable(net).values()) == 9_921_330 - 3 * 24 * 9


def test_features_are_the_branch_pyramid(tiny):
    x = torch.randn(2, 3, 64, 96)
    net = timm.create_model('supernet_hr_tiny', features_only=True)
    assert net.feature_info.reduction() == [4, 8, 16, 32]
    assert net.feature_info.channels() == [8, 12, 16, 24]
    assert [tuple(f.shape) for f in net(x)] == [(2, 8, 16, 24), (2, 12, 8, 12), (2, 16, 4, 6), (2, 24, 2, 3)]
    final, maps = tiny.forward_intermediates(x, indices=[1, 3])
    assert torch.equal(final, tiny.forward_features(x))
    assert all(torch.equal(a, b) for a, b in zip(maps, [tiny.forward_branches(x)[i] for i in (1, 3)], strict=True))


@pytest.mark.parametrize('indices', [(0,), (1,), (2,), (3,), (0, 3), (1, 2), (0, 1, 2, 3)])
def test_pruned_layers_leave_the_features_and_no_unused_parameter(tiny, indices):
    x = torch.randn(2, 3, 64, 64)
    expected = tiny.forward_intermediates(x, indices=list(indices), intermediates_only=True)
    net = copy.deepcopy(tiny)
    assert net.prune_intermediate_layers(list(indices)) == list(indices)
    maps = net.forward_intermediates(x, indices=list(indices), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    sum(f.sum() for f in maps).backward()
    assert [name for name, param in net.named_parameters() if param.grad is None] == []


@pytest.mark.parametrize('tokens', [0, 2])
def test_grad_checkpointing_and_scripting_change_nothing(tokens):
    net = timm.create_model('supernet_hr_tiny', tokens=tokens).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = net(x)
    with pytest.warns(FutureWarning, match='deprecated'):
        scripted = torch.jit.script(net)
    torch.testing.assert_close(scripted(x), expected)
    net.set_grad_checkpointing()
    torch.testing.assert_close(net(x), expected)


def test_odd_sizes_go_through(tiny):
    assert tiny(torch.randn(1, 3, 50, 70)).shape == (1, 10)


def changed(**changes):
    data = timm.create_model('supernet_hr_tiny').arch.to_json()
    data['shape'] |= changes.pop('shape', {})
    return data | changes


@pytest.mark.parametrize(
    ('arch', 'says'),
    [
        (changed(space='mbv2'), r'arch is of space \'mbv2\', this model takes space "hr"'),
        (changed(shape={'task': 'sing'}), r"task 'sing' is unknown; choose from classify, dense"),
        (changed(shape={'stem': [8]}), r'stem must be two numbers of channels'),
        (changed(shape={'stages': [[[1], [8, 8]]]}), r'a stage is \[\[blocks per branch\], \[channels per branch\]\]'),
        (changed(shape={'head': [1, 2]}), r"head for 'classify' must be 5 numbers of channels"),
        (changed(blocks=[]), r'arch has 0 blocks, but its stages ask for \d+'),
        (changed(shape={'width': 3}), r'shape of space "hr" has stem, stages, head and task, and may have tokens'),
        (changed(shape={'tokens': 3}), r'tokens per block and "tokens" in the shape belong together'),
        (changed(shape={'tokens': 0}), r'tokens must be a positive number, got 0'),
        (changed(tokens=[3]), r'tokens must be \d+ numbers from 0, one per block, got \[3\]'),
    ],
    ids=['space', 'task', 'stem', 'stage', 'head', 'blocks', 'shape', 'no tokens', 'zero tokens', "one block's tokens"],
)
def test_arch_of_another_kind_is_one_clear_line(arch, says):
    with pytest.raises(ValueError, match=says) as caught:
        timm.create_model('superticket_hr', arch=arch)
    assert '\n' not in str(caught.value)


def test_a_kernel_size_that_the_space_has_not():
    arch = changed()
    arch['blocks'][2] = {'9': 4}
    with pytest.raises(ValueError, match=r'stages.1.fuse.0.0 has kernel size 9; space "hr" has 3, 5, 7'):
        timm.create_model('superticket_hr', arch=arch)


def test_each_space_refuses_the_other(tiny):
    with pytest.raises(ValueError, match="is of space 'hr'"):
        timm.create_model('superticket_mbv2', arch=tiny.arch)
    with pytest.raises(ValueError, match='in_chans must be at least 1, got 0'):
        timm.create_model('supernet_hr_tiny', in_chans=0)
    with pytest.raises(ValueError, match='tokens must be at least 0, got -1'):
        timm.create_model('supernet_hr_tiny', tokens=-1)
    with pytest.raises(ValueError, match='an image of 64x31 is smaller than the stride of 32') as caught:
        tiny(torch.randn(1, 3, 64, 31))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('tokens', [0, 2])
def test_places_name_modules(tokens):
    net = timm.create_model('supernet_hr_tiny', tokens=tokens)
    for place in block_places(net.arch):
        assert net.get_submodule(place.mixed).conv_pwl.out_channels == place.out_chs
        assert not tokens or net.get_submodule(place.tokens).conv_out.out_channels == place.out_chs
    assert Arch.from_json(net.arch.to_json()) == net.arch


def test_parameter_groups_follow_the_forward_pass(tiny):
    ids = group_parameters(tiny, tiny.group_matcher(), reverse=True)
    first = {name.rsplit('.', 1)[0]: index for name, index in ids.items()}
    path = ['conv_stem', 'stages.1.fuse.0.0.conv_pwl', 'stages.1.grow.0.shortcut', 'stages.1.branches.1.0.conv_pwl']
    path += ['stages.2.fuse.0.1.shortcut', 'classifier']
    order = [first[name] for name in path]
    assert order == sorted(set(order))
    assert first['head.conv'] == first['stages.3.branches.0.0.conv_pwl']
    coarse = group_parameters(tiny, tiny.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) == 1 + 4 + 1


def test_a_dense_head_leaves_the_settings_of_the_net():
    net = timm.create_model('supernet_hr_tiny', drop_rate=0.3)
    net.requires_grad_(False)
    net.conv2.requires_grad_(True)
    net.set_grad_checkpointing()
    dense = net.with_dense_head(3)
    assert (dense.drop_rate, dense.stages[0].grad_checkpointing) == (0.3, True)
    trained = {name for name, param in dense.named_parameters() if param.requires_grad}
    assert trained == {name for name in trained if name.startswith(('conv2.', 'head.', 'classifier.'))}
    assert {'conv2.weight', 'classifier.weight'} <= trained
    dense.pretrained_cfg['num_classes'] = 3
    assert net.pretrained_cfg['num_classes'] == 10
