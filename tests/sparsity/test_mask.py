import copy

import pytest
import timm
import torch
from timm.layers import CondConv2d, ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrizations

from timm_supertickets import Mask, prunable
from timm_supertickets.sparsity import mask as mask_module
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import magnitude


def net(conv=nn.Conv2d, linear=nn.Linear):
    torch.manual_seed(0)
    return nn.Sequential(
        conv(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        conv(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), linear(8 * 16, 10),
    )  # fmt: skip


class MaskedConv2d(nn.Conv2d):
    """The reference: the dead weights never enter the computation, so nothing reaches them."""

    alive = 1.0

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.alive, self.bias)


class MaskedLinear(nn.Linear):
    alive = 1.0

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.alive, self.bias)


OPTIMIZERS = {
    'sgd': lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    'nesterov': lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    'adamw': lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
}


def train(model, optimizer, steps, before_clip=None, after_step=None, clip=0.02):
    data = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 3, 4, 4, generator=data)
        target = torch.randint(10, (16,), generator=data)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        if before_clip:
            before_clip(model)
        if clip:
            norm = clip_grad_norm_(model.parameters(), clip)
            assert norm > clip  # so that clipping has a say
        optimizer.step()
        if after_step:
            after_step(model)


def reference(mask, name, steps):
    model = net(MaskedConv2d, MaskedLinear)
    for parameter, alive in mask.items():
        model.get_submodule(parameter.removesuffix('.weight')).alive = alive
    train(model, OPTIMIZERS[name](model.parameters()), steps)
    state = model.state_dict()
    return {key: value * mask[key] if key in mask else value for key, value in state.items()}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_masked_training_equals_masked_layers_bit_for_bit(name):
    model = net()
    mask = prune(magnitude(model), 0.7)
    mask.zero_weights_(model)
    train(model, OPTIMIZERS[name](model.parameters()), 30, mask.zero_grads_, mask.zero_weights_)
    expected = reference(mask, name, 30)
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_masking_only_the_weights_is_another_trajectory(name):
    # the dead gradients shrink the living ones through the clipping: why the test above can fail
    model = net()
    mask = prune(magnitude(model), 0.7)
    mask.zero_weights_(model)
    train(model, OPTIMIZERS[name](model.parameters()), 30, None, mask.zero_weights_)
    assert not torch.equal(model[0].weight, reference(mask, name, 30)['0.weight'])


def test_masking_once_lets_momentum_revive_the_dead():
    model = net()
    optimizer = OPTIMIZERS['sgd'](model.parameters())
    train(model, optimizer, 3)
    mask = prune(magnitude(model), 0.7)
    mask.zero_weights_(model)
    train(model, optimizer, 1, mask.zero_grads_)
    assert all((dict(model.named_parameters())[name][~alive] != 0).any() for name, alive in mask.items())


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_nothing_dead_revives_in_50_steps(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 3)  # momentum for everything, the dead-to-be included
    mask = prune(magnitude(model), 0.8)
    mask.zero_weights_(model)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 50, mask.zero_grads_, mask.zero_weights_)
    for key, alive in mask.items():
        weight = model.state_dict()[key]
        assert not weight[~alive].any()
        assert (weight[alive] != before[key][alive]).any()


def test_momentum_survives_masking():
    weight = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    model = nn.ParameterDict({'w': weight})
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.5)
    weight.grad = torch.tensor([[4.0, 8.0]])
    optimizer.step()
    assert weight.tolist() == [[-1.0, -2.0]]
    mask = Mask({'w': torch.tensor([[True, False]])})
    mask.zero_weights_(model)
    assert optimizer.state[weight]['momentum_buffer'].tolist() == [[4.0, 8.0]]
    weight.grad = torch.tensor([[2.0, 6.0]])
    mask.zero_grads_(model)
    assert weight.grad.tolist() == [[2.0, 0.0]]
    optimizer.step()
    mask.zero_weights_(model)
    # momentum 0.5 * 4 + 2 = 4, so -1 - 0.5 * 4
    assert weight.tolist() == [[-3.0, 0.0]]


def test_a_timm_state_dict_loads_strictly_before_and_after_masking():
    torch.manual_seed(0)
    stock = timm.create_model('resnet18', num_classes=4)
    model = timm.create_model('resnet18', num_classes=4)
    model.load_state_dict(stock.state_dict(), strict=True)
    mask = prune(magnitude(model), 0.5)
    mask.zero_weights_(model)
    assert list(model.state_dict()) == list(stock.state_dict())
    fresh = timm.create_model('resnet18', num_classes=4)
    fresh.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(stock.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), stock.eval()(x))
    assert not torch.equal(fresh.eval()(x), stock(x))


def test_zeroing_leaves_unmasked_tensors_and_missing_gradients_alone():
    model = net()
    before = copy.deepcopy(model.state_dict())
    mask = Mask({'0.weight': torch.zeros(8, 3, 3, 3, dtype=torch.bool)})
    mask.zero_grads_(model)
    assert all(param.grad is None for param in model.parameters())
    mask.zero_weights_(model)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ['0.weight']
    Mask().zero_weights_(model)


def test_counts_by_hand():
    mask = Mask({'a': torch.tensor([[True, False], [False, False]]), 'b': torch.ones(4, dtype=torch.bool)})
    assert (mask.total, mask.alive, mask.sparsity) == (8, 5, 0.375)
    assert Mask().sparsity == 0


def test_dense_masks_nothing():
    mask = Mask.dense(prunable(net()))
    assert {name: tuple(alive.shape) for name, alive in mask.items()} == {
        '0.weight': (8, 3, 3, 3), '3.weight': (8, 2, 3, 3), '7.weight': (10, 128),
    }  # fmt: skip
    assert mask.alive == mask.total == 216 + 144 + 1280
    assert all(alive.dtype == torch.bool for alive in mask.values())


def test_from_zeros_takes_the_zero_pattern_of_weights():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 1.0, 0.0], [2.0, -0.0, 3.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 1.0]))
        model[1].weight.zero_()
        model[2].weight.fill_(1)
    mask = Mask.from_zeros(model)
    assert list(mask) == ['0.weight']
    assert mask['0.weight'].tolist() == [[False, True, False], [True, False, True]]


@pytest.mark.parametrize(
    ('mask', 'message'),
    [
        ({'1.weight': torch.ones(2, 2).bool()}, "'1.weight', which Sequential has not; it has 0.weight"),
        ({'0.weight': torch.ones(2, 2)}, r"'0.weight' must be torch.bool, got torch.float32"),
        ({'0.weight': torch.ones(4).bool()}, r"'0.weight' has shape \(4,\), the parameter \(2, 2\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        Mask(mask).check(nn.Sequential(nn.Linear(2, 2)))


def test_prunable_of_a_resnet_is_all_convolutions_but_the_stem():
    model = timm.create_model('resnet18')
    convs = {f'{n}.weight' for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(prunable(model)) == convs - {'conv1.weight'}
    assert len(convs) == 20
    assert all(prunable(model)[name] is param for name, param in model.named_parameters() if name in prunable(model))


def test_prunable_of_a_transformer_is_its_linear_layers():
    model = timm.create_model('test_vit')
    names = set(prunable(model))
    blocks = len(model.blocks)
    inner = ('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2')
    assert names == {f'blocks.{i}.{part}.weight' for i in range(blocks) for part in inner}


def test_prunable_leaves_out_what_is_restandardised():
    model = timm.create_model('test_nfnet')
    kinds = {name: type(model.get_submodule(name.removesuffix('.weight'))) for name in prunable(model)}
    assert any(isinstance(m, ScaledStdConv2d) for m in model.modules())
    assert kinds
    assert not any(issubclass(kind, (StdConv2d, ScaledStdConv2d)) for kind in kinds.values())
    tiny = nn.Sequential(StdConv2d(2, 4, 3), nn.Conv2d(4, 4, 1), ScaledStdConv2d(4, 4, 3))
    assert list(prunable(tiny)) == ['1.weight']


def on_meta(name, **kwargs):
    with torch.device('meta'):
        return timm.create_model(name, **kwargs)


# by hand: (weights per block or stage, and how many)
STOCK = {
    # two 3x3 convolutions in each of 8 blocks, and 1x1 ones where the stages 2 to 4 begin; the stem conv1 is out
    'resnet18': sum(9 * c * (i + 3 * c) for i, c in ((64, 64), (64, 128), (128, 256), (256, 512)))
    + 64 * 128 + 128 * 256 + 256 * 512,
    # 7x7 depthwise, widening by 4 and back, 2, 2, 6 and 2 blocks; 2x2 convolutions between the stages; stem.0 is out
    'convnext_atto': sum(n * (49 * c + 8 * c * c) for n, c in ((2, 40), (2, 80), (6, 160), (2, 320)))
    + 4 * (40 * 80 + 80 * 160 + 160 * 320),
    # qkv, proj, fc1 and fc2 in each of 12 blocks; patch_embed.proj, pos_embed and head are out
    'vit_tiny_patch16_224': 12 * (3 + 1 + 4 + 4) * 192 * 192,
    # (repeats, expansion, kernel, out, in): 1x1, depthwise, squeeze and excite by in / 4, 1x1; conv_head at last
    'efficientnet_b0': sum(
        (h * i if e > 1 else 0) + h * k * k + 2 * h * (i // 4) + h * o
        for r, e, k, o, first in ((1, 1, 3, 16, 32), (2, 6, 3, 24, 16), (2, 6, 5, 40, 24), (3, 6, 3, 80, 40),
                                  (3, 6, 5, 112, 80), (4, 6, 5, 192, 112), (1, 6, 3, 320, 192))
        for i in [first, *[o] * (r - 1)]
        for h in [e * i]
    ) + 320 * 1280,
}  # fmt: skip


@pytest.mark.parametrize('name', STOCK)
def test_prunable_weights_of_stock_models_by_hand(name):
    assert sum(weight.numel() for weight in prunable(on_meta(name)).values()) == STOCK[name]


def test_all_classifiers_are_left_out():
    model = on_meta('deit_tiny_distilled_patch16_224')
    assert model.pretrained_cfg['classifier'] == ('head', 'head_dist')
    linear = {f'{name}.weight' for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(prunable(model)) == linear - {'head.weight', 'head_dist.weight'}


@pytest.mark.parametrize(
    ('cfg', 'left_out'),
    [
        (None, []),
        ({}, []),
        ({'first_conv': None, 'classifier': None}, []),
        ({'first_conv': [], 'classifier': ''}, []),
        ({'first_conv': '0', 'classifier': '7'}, ['0', '7']),
        ({'first_conv': ('0', '3'), 'classifier': ['7']}, ['0', '3', '7']),
        ({'first_conv': 'gone'}, []),
    ],
)
def test_stem_and_classifier_are_named_once_often_or_not_at_all(cfg, left_out):
    model = net()
    if cfg is not None:
        model.pretrained_cfg = cfg
    assert list(prunable(model)) == [f'{name}.weight' for name in ('0', '3', '7') if name not in left_out]


def test_a_stem_of_several_layers_is_left_out_and_its_namesake_is_not():
    model = nn.ModuleDict({'stem': nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), 'stem2': nn.Conv2d(4, 4, 3)})
    model.pretrained_cfg = {'first_conv': 'stem'}
    assert list(prunable(model)) == ['stem2.weight']


def test_every_kind_of_convolution_but_the_transposed():
    model = nn.ModuleDict({
        'one': nn.Conv1d(2, 2, 1), 'two': nn.Conv2d(2, 2, 1), 'three': nn.Conv3d(2, 2, 1),
        'grouped': nn.Conv2d(8, 4, 3, groups=2), 'depthwise': nn.Conv2d(4, 4, 3, groups=4),
        'up': nn.ConvTranspose2d(2, 2, 2), 'norm': nn.GroupNorm(1, 2), 'table': nn.Embedding(3, 2),
        'bilinear': nn.Bilinear(2, 2, 2), 'attention': nn.MultiheadAttention(4, 2),
    })  # fmt: skip
    assert {name: tuple(weight.shape) for name, weight in prunable(model).items()} == {
        'one.weight': (2, 2, 1), 'two.weight': (2, 2, 1, 1), 'three.weight': (2, 2, 1, 1, 1),
        'grouped.weight': (4, 4, 3, 3), 'depthwise.weight': (4, 1, 3, 3),
        'attention.out_proj.weight': (4, 4),  # in_proj_weight is a parameter of no linear layer
    }  # fmt: skip
    assert list(prunable(nn.Linear(2, 2))) == ['weight']


def test_a_shared_weight_counts_once_and_never_with_what_is_left_out():
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ('first', 'again', 'body', 'head', 'out')})
    model['table'] = nn.Embedding(4, 4)
    model['again'].weight = model['first'].weight
    model['head'].weight = model['body'].weight
    model['out'].weight = model['table'].weight
    model.pretrained_cfg = {'classifier': 'head'}
    weights = prunable(model)
    assert list(weights) == ['first.weight']
    assert weights['first.weight'] is model['again'].weight
    Mask({'first.weight': torch.eye(4).bool()}).zero_weights_(model)
    assert int((model['again'].weight != 0).sum()) == 4


def old_weight_norm(module):
    with pytest.warns(FutureWarning, match='weight_norm'):
        return nn.utils.weight_norm(module)


@pytest.mark.parametrize(
    'wrap', [parametrizations.weight_norm, parametrizations.spectral_norm, old_weight_norm, nn.utils.spectral_norm]
)
def test_a_weight_that_is_computed_from_others_is_left_out(wrap, caplog):
    model = nn.Sequential(wrap(nn.Conv2d(2, 4, 3)), nn.Conv2d(4, 4, 3))
    model.pretrained_cfg = {'architecture': f'net_{wrap.__module__}_{wrap.__name__}'}
    assert list(prunable(model)) == ['1.weight']
    assert 'not pruned: 0' in caplog.text


def test_experts_are_left_out(caplog):
    model = nn.ModuleDict({'mixed': CondConv2d(2, 2, 1, num_experts=2), 'plain': nn.Conv2d(2, 2, 1)})
    assert list(prunable(model)) == ['plain.weight']
    assert 'ModuleDict: layers that make their weight anew in forward are not pruned: mixed' in caplog.text


def test_what_is_left_out_is_said_in_one_line_and_once(caplog):
    mask_module._warn_once.cache_clear()
    model = on_meta('test_nfnet')
    layers = [name for name, m in model.named_modules() if isinstance(m, ScaledStdConv2d) and name != 'stem.conv1']
    for _ in range(3):
        magnitude(copy.deepcopy(model))
    said = 'test_nfnet: layers that make their weight anew in forward are not pruned: '
    assert caplog.messages == [f'{said}{", ".join(layers[:3])} and {len(layers) - 3} more']
    caplog.clear()
    assert prunable(on_meta('resnet18'))
    assert not caplog.messages


def test_restandardised_zeros_would_not_stay_zero():
    # why they are left out: half of the weights are zero, yet the output depends on all of the inputs
    conv = StdConv2d(4, 1, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, 2.0, 0.0, 0.0]).view(1, 4, 1, 1))
        quiet = conv(torch.zeros(1, 4, 1, 1))
        assert not torch.allclose(conv(torch.tensor([0.0, 0.0, 5.0, 5.0]).view(1, 4, 1, 1)), quiet)


def test_prunable_of_an_mbv2_supernet():
    model = timm.create_model('supernet_mbv2_tiny')
    convs = {f'{n}.weight' for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert set(prunable(model)) == convs - {'conv_stem.weight', 'classifier.weight'}


def test_a_shuffled_mask_has_as_many_living_weights_elsewhere():
    mask = Mask({'a': torch.arange(60).view(3, 4, 5) < 12, 'b': torch.ones(7, dtype=torch.bool)})
    shuffled = mask.shuffled(torch.Generator().manual_seed(0))
    assert {name: int(alive.sum()) for name, alive in shuffled.items()} == {'a': 12, 'b': 7}
    assert shuffled['a'].shape == (3, 4, 5)
    assert not torch.equal(shuffled['a'], mask['a'])
    assert int(shuffled['a'][0, :3].sum()) == 12  # the other channels, two out and one in, are dead and stay so
    again, other = (mask.shuffled(torch.Generator().manual_seed(seed))['a'] for seed in (0, 1))
    assert torch.equal(again, shuffled['a'])
    assert not torch.equal(other, shuffled['a'])
    assert int(mask['a'].flatten()[:12].sum()) == 12  # the mask itself is as it was


@pytest.mark.parametrize('call', ['zero_weights_', 'zero_grads_'])
def test_a_wrapper_with_other_names_is_refused_and_nothing_is_touched(call):
    model = net()
    mask = prune(magnitude(model), 0.7)
    before = copy.deepcopy(model.state_dict())
    message = "mask names '0.weight', which DataParallel has not; it has module.0.weight, module.3.weight"
    with pytest.raises(ValueError, match=message):
        getattr(mask, call)(nn.DataParallel(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
