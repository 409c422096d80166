import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_supertickets  # noqa: F401  registers the models
from timm_supertickets.cost import channel_macs, model_cost
from timm_supertickets.search.shrink import shrink

TINY = (3, 32, 32)


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 4 * 4, 3))


def test_two_layers_by_hand():
    cost = model_cost(two_layers(), (1, 4, 4))
    conv, linear = cost.layers
    assert (conv.name, conv.weights, conv.alive, conv.positions) == ('0', 2 * 9, 18, 16)
    assert (linear.name, linear.weights, linear.alive, linear.positions) == ('2', 32 * 3, 96, 1)
    assert (conv.macs, linear.macs) == (288, 96)
    assert (cost.macs, cost.sparse_macs) == (384, 384)
    assert cost.params == 18 + 2 + 96 + 3
    assert (cost.dead, cost.prunable, cost.sparsity, cost.sparsity_all) == (0, 0, 0.0, 0.0)


def test_sparse_two_layers_by_hand():
    mask = {'0.weight': torch.ones(2, 1, 3, 3, dtype=torch.bool), '2.weight': torch.zeros(3, 32, dtype=torch.bool)}
    mask['0.weight'].flatten()[:5] = False
    mask['2.weight'].flatten()[:6] = True
    cost = model_cost(two_layers(), (1, 4, 4), mask)
    assert [layer.macs for layer in cost.layers] == [288, 96]
    assert [layer.sparse_macs for layer in cost.layers] == [16 * 13, 6]
    assert (cost.macs, cost.sparse_macs) == (384, 214)
    assert (cost.dead, cost.prunable) == (95, 114)
    assert cost.sparsity == 95 / 114
    assert cost.sparsity_all == 95 / 119


def test_a_layer_without_a_mask_entry_is_dense():
    cost = model_cost(two_layers(), (1, 4, 4), {'2.weight': torch.zeros(3, 32, dtype=torch.bool)})
    assert [layer.sparse_macs for layer in cost.layers] == [288, 0]
    assert (cost.dead, cost.prunable) == (96, 96)


def test_a_layer_used_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, stride=2, padding=1, groups=2)
            self.unused = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    cost = model_cost(Twice(), (2, 8, 8))
    assert [(layer.name, layer.macs) for layer in cost.layers] == [('conv', 18 * (4 * 4 + 2 * 2))]


@pytest.mark.parametrize(
    ('name', 'size', 'kwargs'),
    [
        ('supernet_mbv2_tiny', 32, {}),
        ('supernet_mbv2_tiny', 40, {'output_stride': 8, 'in_chans': 1, 'num_classes': 7}),
        ('resnet18', 64, {}),
        ('mobilenetv2_100', 64, {}),
        ('vit_tiny_patch16_224', 224, {}),
    ],
)
def test_macs_agree_with_torchs_flop_counter(name, size, kwargs):
    model = timm.create_model(name, **kwargs).eval()
    shape = (kwargs.get('in_chans', 3), size, size)
    with FlopCounterMode(display=False, depth=None) as counter, torch.no_grad():
        model(torch.zeros(1, *shape))
    counts = counter.get_flop_counts()
    layers = {
        name: sum(flops for op, flops in ops.items() if str(op).split('.')[-1] in ('convolution', 'addmm', 'mm'))
        for name, ops in counts.items()
    }
    cost = model_cost(model, shape)
    assert 2 * cost.macs == layers['Global'] > 0
    for layer in cost.layers:
        assert 2 * layer.macs == layers[f'{type(model).__name__}.{layer.name}'], layer.name
    assert cost.params == sum(p.numel() for p in model.parameters())


def test_killing_channels_saves_exactly_their_macs():
    torch.manual_seed(0)
    model = timm.create_model('supernet_mbv2_tiny')
    groups = model.channel_groups()
    cost = model_cost(model, TINY)
    macs = channel_macs(groups, cost)
    assert {gate: len(m) for gate, m in macs.items()} == {group.gate: group.channels for group in groups}

    plans = []
    for group in groups:
        first, last, some = (torch.ones(group.channels, dtype=torch.bool) for _ in range(3))
        first[0], last[-1] = False, False
        some &= torch.rand(group.channels) < 0.5
        plans += [{group.gate: first}, {group.gate: last}, {group.gate: some}]
        without_kernel = torch.ones(group.channels, dtype=torch.bool)
        without_kernel[: group.kernels[0][1]] = False
        plans.append({group.gate: without_kernel})
        if group.droppable:
            plans.append({group.gate: torch.zeros(group.channels, dtype=torch.bool)})
    plans.append({gate: alive for plan in plans[2::4] for gate, alive in plan.items()})
    for plan in plans:
        saved = sum(macs[gate][~alive].sum().item() for gate, alive in plan.items())
        assert saved > 0
        assert model_cost(shrink(model, plan), TINY).macs == cost.macs - saved


def test_channel_macs_by_hand():
    model = timm.create_model('supernet_mbv2_tiny')
    macs = channel_macs(model.channel_groups(), model_cost(model, TINY))
    # second stage, first block: 8 -> 16 channels, from 16x16 to 8x8, 32 hidden channels per kernel size
    block = macs['blocks.1.0.bn2.weight'].tolist()
    per_kernel = [8 * 16 * 16 + kernel**2 * 8 * 8 + 16 * 8 * 8 for kernel in (3, 5, 7)]
    assert block == [value for value in per_kernel for _ in range(32)]


def test_modes_are_restored_and_nothing_stays_hooked():
    model = timm.create_model('supernet_mbv2_tiny').train()
    model.blocks[1].eval()
    model.blocks[1][0].bn2.train()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model_cost(model, TINY)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    # a batch norm in train mode would have moved
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_modes_and_hooks_also_after_an_error():
    model = timm.create_model('supernet_mbv2_tiny').train()
    with pytest.raises(RuntimeError):
        model_cost(model, (5, 32, 32))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_other_dtypes():
    model = timm.create_model('supernet_mbv2_tiny', dtype=torch.float64)
    assert model_cost(model, TINY).macs == model_cost(model.float(), TINY).macs


def test_bytes_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2))
    alive = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    alive[0, 0, 0] = True
    cost = model_cost(net, (1, 5, 5), {'0.weight': alive})
    # 18 weights, 4 parameters, 4 running statistics of 4 bytes, one counter of 8 bytes
    assert cost.dense_bytes == (18 + 4 + 4) * 4 + 8
    # 3 living weights of 4 bytes and 18 bits in 3 bytes instead of the 18 weights
    assert cost.packed_bytes == cost.dense_bytes - 18 * 4 + 3 * 4 + 3
    assert (cost.dead, cost.prunable) == (15, 18)
