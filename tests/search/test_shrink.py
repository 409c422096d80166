import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from timm_supertickets import Mask, prunable
from timm_supertickets.channels import take
from timm_supertickets.search.shrink import gate_, searchable, shrink, shrink_optimizer_

DROPPED = 'blocks.2.1'  # a residual block that loses all its channels
KERNEL_DIES = 'blocks.1.1'  # a residual block that loses kernel size 5
PARTS = {3: slice(0, 64), 5: slice(64, 128), 7: slice(128, 192)}  # of the axis of blocks.1.1 and blocks.2.*


def make_net(seed: int = 0, **kwargs) -> nn.Module:
    """A supernet in float64 whose batch norms do something."""
    torch.manual_seed(seed)
    net = timm.create_model('supernet_mbv2_tiny', dtype=torch.float64, **kwargs)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return net


def make_keep(net: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keep = {g.gate: torch.rand(g.channels, generator=generator) < 0.5 for g in net.channel_groups()}
    keep[f'{KERNEL_DIES}.bn2.weight'][PARTS[5]] = False
    keep[f'{DROPPED}.bn2.weight'][:] = False
    del keep['blocks.3.0.bn2.weight']  # a group without a plan stays whole
    return keep


def thinned(name: str, tensor: torch.Tensor, arch, keep: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """What becomes of a tensor, from its name and the arch alone; None if it goes."""
    if not name.startswith('blocks.'):
        return tensor
    _, stage, position, layer, *rest = name.split('.')
    alive = keep.get(f'blocks.{stage}.{position}.bn2.weight')
    if alive is None:
        return tensor
    if not alive.any():
        return None
    if layer == 'conv_pwl':
        return tensor[:, alive]
    if layer == 'conv_dw':
        depths = [depth for _, depth, _ in arch['stages']]
        kernels = arch.blocks[sum(depths[: int(stage)]) + int(position)]
        start = 0
        for kernel, channels in kernels:
            if rest[0] == f'k{kernel}':
                part = alive[start : start + channels]
                return tensor[part] if part.any() else None
            start += channels
    return tensor[alive] if layer in ('conv_pw', 'bn1', 'bn2') and tensor.ndim else tensor


def all_thinned(tensors, arch, keep):
    found = {name: thinned(name, tensor, arch, keep) for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize('training', [False, True])
def test_shrunk_net_equals_the_gated_net(seed, training):
    net = make_net(seed)
    keep = make_keep(net, seed)
    small = shrink(net, keep).train(training)
    gate_(net, keep)
    net.train(training)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    assert off(small(x), net(x)) < 1e-12
    if training:  # the statistics move alike, too
        for name, buffer in all_thinned(dict(net.named_buffers()), net.arch, keep).items():
            assert off(small.get_buffer(name).double(), buffer.double()) < 1e-12, name


def test_shrunk_net_has_the_tensors_of_the_living():
    net, x = make_net(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    keep = make_keep(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    expected = net.eval()(x)
    small = shrink(net, keep)

    assert_equal(dict(small.state_dict()), all_thinned(before, net.arch, keep))
    assert not any(name.startswith(f'{DROPPED}.') for name in small.state_dict())
    assert f'{KERNEL_DIES}.conv_dw.k5.weight' not in small.state_dict()
    assert_equal(dict(net.state_dict()), before)
    assert torch.equal(net(x), expected)
    shared = {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert not shared, 'the small net must own its memory'


def test_arch_of_the_shrunk_net_by_hand():
    net = make_net()
    keep = make_keep(net)
    arch = shrink(net, keep).arch
    assert arch.shape == net.arch.shape
    assert arch.blocks[2] == tuple(
        (kernel, int(keep[f'{KERNEL_DIES}.bn2.weight'][PARTS[kernel]].sum())) for kernel in (3, 7)
    )
    assert arch.blocks[4] == ()
    assert arch.blocks[5] == net.arch.blocks[5]


def test_shrinking_twice_equals_the_gated_net():
    net, x = make_net().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    small = shrink(net, make_keep(net))
    generator = torch.Generator().manual_seed(5)
    keep = {g.gate: torch.rand(g.channels, generator=generator) < 0.5 for g in small.channel_groups()}
    smaller = shrink(small, keep)
    gate_(small, keep)
    assert off(smaller(x), small(x)) < 1e-12


def test_gate_silences_in_place_and_leaves_the_living():
    net = make_net()
    keep = make_keep(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    gate_(net, keep)
    after = net.state_dict()
    silenced = {f'{DROPPED}.bn3.weight', f'{DROPPED}.bn3.bias'}
    for gate, alive in keep.items():
        for name in (gate, gate.replace('.weight', '.bias')):
            assert torch.equal(after[name], before[name] * alive)
            silenced.add(name)
    assert not after[f'{DROPPED}.bn3.weight'].any()
    assert not after[f'{DROPPED}.bn3.bias'].any()
    for name in set(before) - silenced:
        assert torch.equal(after[name], before[name]), name


def test_settings_and_modes_survive():
    net = make_net(num_classes=7, in_chans=1, output_stride=16, drop_rate=0.25, drop_path_rate=0.5)
    net.set_grad_checkpointing()
    net.conv_stem.requires_grad_(False)
    net.blocks[1].requires_grad_(False)
    net.eval()
    small = shrink(net, make_keep(net))
    assert (small.num_classes, small.in_chans, small.drop_rate, small.grad_checkpointing) == (7, 1, 0.25, True)
    assert [info['reduction'] for info in small.feature_info] == [2, 4, 8, 16, 16]
    rates = {name: m.drop_prob for name, m in net.named_modules() if hasattr(m, 'drop_prob')}
    assert {name: m.drop_prob for name, m in small.named_modules() if hasattr(m, 'drop_prob')} == {
        name: rate for name, rate in rates.items() if not name.startswith(DROPPED)
    }
    assert not small.training
    assert small.pretrained_cfg == net.pretrained_cfg
    trained = {name: param.requires_grad for name, param in net.named_parameters()}
    assert {name: param.requires_grad for name, param in small.named_parameters()} == {
        name: trained[name] for name, _ in small.named_parameters()
    }
    assert sum(trained.values()) < len(trained)


def test_what_was_done_to_norms_survives():
    net = convert_sync_batchnorm(timm.create_model('supernet_mbv2_tiny').half())
    net.bn1.float().eval()
    net.blocks[0][0].bn3.eps, net.blocks[0][0].bn3.momentum = 0.1, 0.5
    small = shrink(net, make_keep(net))
    assert isinstance(small.bn1, nn.SyncBatchNorm)
    assert not small.bn1.training
    assert small.bn2.training
    assert (small.bn1.weight.dtype, small.bn1.running_var.dtype) == (torch.float32, torch.float32)
    assert (small.bn2.weight.dtype, small.conv_stem.weight.dtype) == (torch.float16, torch.float16)
    assert (small.blocks[0][0].bn3.eps, small.blocks[0][0].bn3.momentum) == (0.1, 0.5)


def test_norms_that_are_none_any_more_are_refused():
    net = freeze_batch_norm_2d(make_net())
    message = 'bn1 is FrozenBatchNormAct2d, where its space has BatchNormAct2d; change it after shrinking'
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        shrink(net, make_keep(net))


def test_a_classifier_that_was_reset_survives():
    net = make_net()
    net.reset_classifier(4, 'max')
    small = shrink(net, make_keep(net))
    assert small.classifier.out_features == 4
    assert small.global_pool.pool_type == 'max'


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer, step: int, dead=()) -> None:
    """On data of its own; `dead` are (parameter, dead elements) that neither learn nor move."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 3, 40, 40, dtype=torch.float64, generator=generator)
    y = torch.randint(10, (6,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    for param, elements in dead:
        param.grad[elements] = 0
    optimizer.step()
    with torch.no_grad():
        for param, elements in dead:
            param[elements] = 0


def two_groups(net: nn.Module) -> list[dict]:
    params = list(net.parameters())
    return [
        {'params': [p for p in params if p.ndim > 1], 'weight_decay': 0.05},
        {'params': [p for p in params if p.ndim <= 1], 'weight_decay': 0.0, 'lr': 2e-3},
    ]


# The true gradient of a bn3 bias is zero, since batch norms further on take shifts away. AdamW would make steps of
# its rounding noise, about 1e-15, hence an eps well above that.
OPTIMIZERS = {
    'adamw': lambda groups: torch.optim.AdamW(groups, lr=1e-3, eps=1e-6),
    'sgd': lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize('kind', OPTIMIZERS)
def test_ten_more_steps_agree_with_the_gated_net(kind):
    net = make_net()
    optimizer = OPTIMIZERS[kind](two_groups(net))
    for step in range(3):
        train_step(net, optimizer, step)
    gated, gated_optimizer = copy.deepcopy((net, optimizer))
    keep = make_keep(net)
    groups = net.channel_groups()

    small = shrink(net, keep)
    shrink_optimizer_(optimizer, net, small, groups, keep)
    gate_(gated, keep)
    params = dict(gated.named_parameters())
    dead = [(params[gate], ~alive) for gate, alive in keep.items()]
    dead += [(params[group.shift], ~keep[group.gate]) for group in groups if group.gate in keep]
    dead += [(params[f'{DROPPED}.bn3.{end}'], slice(None)) for end in ('weight', 'bias')]

    for step in range(3, 13):
        train_step(small, optimizer, step)
        train_step(gated, gated_optimizer, step, dead)

    expected = all_thinned(gated.state_dict(), net.arch, keep)
    assert set(expected) == set(small.state_dict())
    for name, tensor in small.state_dict().items():
        assert off(tensor.double(), expected[name].double()) < 1e-9, name
    for name, param in small.named_parameters():
        state, reference = optimizer.state[param], gated_optimizer.state[params[name]]
        assert set(state) == set(reference)
        for key, value in state.items():
            left = reference[key] if key == 'step' else thinned(name, reference[key], net.arch, keep)
            if name.endswith('bn3.bias') and key != 'step':
                assert max(value.abs().max(), left.abs().max()) < 1e-12, (name, key)
            else:
                assert off(value, left) < 1e-9, (name, key)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert off(small.train()(x), gated.train()(x)) < 1e-9
    assert off(small.eval()(x), gated.eval()(x)) < 1e-9


def test_optimizer_has_exactly_the_shrunk_nets_params_in_their_groups():
    net = make_net()
    optimizer = OPTIMIZERS['adamw'](two_groups(net))
    train_step(net, optimizer, 0)
    old = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in net.named_parameters()}
    keep = make_keep(net)
    param_groups = optimizer.param_groups
    held = [value for state in optimizer.state.values() for value in state.values()]
    small = shrink(net, keep)
    shrink_optimizer_(optimizer, net, small, net.channel_groups(), keep)

    assert optimizer.param_groups is param_groups, 'a scheduler holds them'
    many, few = optimizer.param_groups
    assert [id(p) for p in many['params']] == [id(p) for p in small.parameters() if p.ndim > 1]
    assert [id(p) for p in few['params']] == [id(p) for p in small.parameters() if p.ndim <= 1]
    assert (many['weight_decay'], many['lr'], few['weight_decay'], few['lr']) == (0.05, 1e-3, 0.0, 2e-3)
    assert {id(p) for p in optimizer.state} == {id(p) for p in small.parameters()}
    for name, param in small.named_parameters():
        for key, value in optimizer.state[param].items():
            assert torch.equal(
                value, old[name][key] if key == 'step' else thinned(name, old[name][key], net.arch, keep)
            )
    memory = {value.data_ptr() for value in held}
    for state in optimizer.state.values():
        assert not memory & {value.data_ptr() for value in state.values()}, 'whoever held the old state keeps it'
        memory |= {value.data_ptr() for value in state.values()}
    train_step(small, optimizer, 1)
    assert {state['step'].item() for state in optimizer.state.values()} == {2}


def test_names_of_params_are_kept():
    net = make_net()
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1, momentum=0.9)
    keep = make_keep(net)
    small = shrink(net, keep)
    shrink_optimizer_(optimizer, net, small, net.channel_groups(), keep)
    assert optimizer.param_groups[0]['param_names'] == [name for name, _ in small.named_parameters()]
    assert not optimizer.state, 'it has not stepped yet'


def test_factored_moments_are_thinned_along_their_own_axes():
    net = make_net().float()
    optimizer = torch.optim.Adafactor(net.parameters())
    for param in net.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    name = 'blocks.1.1.conv_pwl.weight'
    state = optimizer.state[net.get_parameter(name)]
    row, col = state['row_var'].clone(), state['col_var'].clone()
    keep = make_keep(net)
    small = shrink(net, keep)
    shrink_optimizer_(optimizer, net, small, net.channel_groups(), keep)
    after = optimizer.state[small.get_parameter(name)]
    assert torch.equal(after['row_var'], row[:, keep[f'{KERNEL_DIES}.bn2.weight']])
    assert torch.equal(after['col_var'], col[:, keep[f'{KERNEL_DIES}.bn2.weight']])
    optimizer.step()


@pytest.mark.parametrize('name', ['lookahead_sgd', 'lookahead_adamw'])
def test_an_optimizer_that_looks_ahead(name):
    net = make_net()
    optimizer = create_optimizer_v2(net, opt=name, lr=0.01, momentum=0.9)
    for step in range(8):  # slow weights are kept every sixth
        train_step(net, optimizer, step)
    inner = optimizer._base_optimizer
    old = {name: {k: v.clone() for k, v in inner.state[p].items()} for name, p in net.named_parameters()}
    assert 'lookahead_slow_buff' in old['conv_head.weight']
    keep = make_keep(net)
    small = shrink(net, keep)
    shrink_optimizer_(optimizer, net, small, net.channel_groups(), keep)
    assert {id(p) for p in inner.state} == {id(p) for p in small.parameters()}
    for name, param in small.named_parameters():
        for key, value in inner.state[param].items():
            assert torch.equal(
                value, old[name][key] if key == 'step' else thinned(name, old[name][key], net.arch, keep)
            )
    optimizer.load_state_dict(optimizer.state_dict())
    train_step(small, optimizer, 8)


def test_optimizer_of_other_parameters_is_refused():
    net = make_net()
    foreign = nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.SGD([*net.parameters(), foreign], lr=0.1)
    keep = make_keep(net)
    message = 'the optimizer trains a parameter of shape (2, 3) that the model has not'
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        shrink_optimizer_(optimizer, net, shrink(net, keep), net.channel_groups(), keep)


@pytest.mark.parametrize(
    ('sketch', 'what'), [(torch.zeros(5, 5), 'has shape (5, 5)'), ([torch.zeros(5, 5)], 'is a list')]
)
def test_state_of_another_layout_is_refused(sketch, what):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.state[net.conv_head.weight] = {'sketch': sketch}
    keep = make_keep(net)
    message = f"optimizer state 'sketch' of 'conv_head.weight' {what}, cannot be thinned"
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        shrink_optimizer_(optimizer, net, shrink(net, keep), net.channel_groups(), keep)


def test_a_refusal_leaves_the_optimizer_as_it_was():
    net = make_net()
    optimizer = torch.optim.SGD(two_groups(net), lr=0.1, momentum=0.9)
    optimizer.state[net.bn2.bias] = {'sketch': torch.zeros(5, 5)}  # in the second group
    before = [id(p) for group in optimizer.param_groups for p in group['params']]
    keep = make_keep(net)
    with pytest.raises(ValueError, match='cannot be thinned'):
        shrink_optimizer_(optimizer, net, shrink(net, keep), net.channel_groups(), keep)
    assert [id(p) for group in optimizer.param_groups for p in group['params']] == before


def test_mask_is_taken_along():
    net = make_net()
    keep = make_keep(net)
    generator = torch.Generator().manual_seed(3)
    mask = Mask({name: torch.rand(p.shape, generator=generator) < 0.3 for name, p in prunable(net).items()})
    small = shrink(net, keep)
    taken = Mask(take(mask, net.channel_groups(), keep))
    taken.check(small)
    assert list(taken) == list(prunable(small))
    assert_equal(taken, all_thinned(mask, net.arch, keep))
    assert taken.alive == sum(int(m.sum()) for m in all_thinned(mask, net.arch, keep).values())

    # masked and shrunk is shrunk and masked
    taken.zero_weights_(small)
    mask.zero_weights_(net)
    assert_equal(dict(shrink(net, keep).state_dict()), dict(small.state_dict()))


def test_alive_count_of_one_masked_layer_by_hand():
    net = make_net()
    name = f'{KERNEL_DIES}.conv_dw.k3.weight'
    alive = torch.zeros(64, 1, 3, 3, dtype=torch.bool)
    alive[:, 0, 1, 1] = True  # the centre of every kernel
    alive[0] = True  # and all nine taps of the first
    keep = torch.zeros(192, dtype=torch.bool)
    keep[[0, 5, 63, 64, 191]] = True
    taken = take({name: alive}, net.channel_groups(), {f'{KERNEL_DIES}.bn2.weight': keep})
    assert taken[name].shape == (3, 1, 3, 3)
    assert Mask(taken).alive == 9 + 1 + 1


def test_ema_is_shrunk_alike():
    net = make_net()
    ema = ModelEmaV3(net, decay=0.9)
    optimizer = OPTIMIZERS['sgd'](two_groups(net))
    for step in range(2):
        train_step(net, optimizer, step)
        ema.update(net)
    keep = make_keep(net)
    before = {name: tensor.clone() for name, tensor in ema.module.state_dict().items()}
    small = shrink(ema.module, keep)
    assert_equal(dict(small.state_dict()), all_thinned(before, net.arch, keep))
    assert not torch.equal(small.conv_stem.weight, net.conv_stem.weight)
    assert not small.training

    # and it goes on averaging
    ema.module = small
    live = shrink(net, keep)
    ema.update(live)
    name = f'{KERNEL_DIES}.conv_pwl.weight'
    expected = 0.9 * thinned(name, before[name], net.arch, keep) + 0.1 * live.get_parameter(name)
    torch.testing.assert_close(ema.module.get_parameter(name).data, expected.detach())


def test_plans_that_do_not_fit_are_refused_before_anything_changes():
    net = make_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    keep = {'blocks.0.0.bn2.weight': torch.zeros(192, dtype=torch.bool)}
    for function in (gate_, shrink):
        with pytest.raises(ValueError, match='leaves no channel, and the block is not residual'):
            function(net, keep)
        with pytest.raises(ValueError, match="names 'gate', which is no gate"):
            function(net, {'blocks.1.1.bn2.weight': torch.zeros(192, dtype=torch.bool), 'gate': torch.ones(1) > 0})
    assert_equal(dict(net.state_dict()), before)


def test_other_models_cannot_be_searched():
    with pytest.raises(ValueError, match=r'^Linear cannot be searched; supernets are named supernet_\*$'):
        searchable(nn.Linear(1, 1))
