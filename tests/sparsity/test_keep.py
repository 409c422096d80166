import copy
import inspect

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.utils import clip_grad_norm_

from timm_supertickets import Mask, keep_sparse

OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and kind not in (torch.optim.Optimizer, torch.optim.SparseAdam)  # the latter takes sparse gradients only
}
SETTINGS = {
    'SGD': [{}, {'momentum': 0.9, 'weight_decay': 0.01}, {'momentum': 0.9, 'nesterov': True}, {'foreach': False}],
    'AdamW': [{}, {'amsgrad': True, 'weight_decay': 0.1}],
    'RMSprop': [{}, {'momentum': 0.9, 'centered': True}],
    'LBFGS': [{}, {'line_search_fn': 'strong_wolfe'}],
}
CASES = [
    pytest.param(name, settings, id='-'.join([name, *settings]))
    for name in OPTIMIZERS
    for settings in SETTINGS.get(name, [{}])
]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def half(model, ndim=(2, 4)):
    """A random half of every weight lives."""
    torch.manual_seed(1)
    return Mask({name: torch.rand_like(param) > 0.5 for name, param in model.named_parameters() if param.ndim in ndim})


def train(model, optimizer, steps, clip=None, data_seed=2, micro_batches=1):
    data = torch.Generator().manual_seed(data_seed)
    for _ in range(steps):
        x, y = torch.randn(8, 2, 4, 4, generator=data), torch.randn(8, 4, generator=data)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            for part, target in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
                loss = (model(part) - target).square().mean()
                loss.backward()
            if clip:
                clip_grad_norm_(model.parameters(), clip)
            return loss

        closure()
        optimizer.step(closure)


def revived(model, mask):
    params = dict(model.named_parameters())
    return sum(int(params[name].detach()[~alive].count_nonzero()) for name, alive in mask.items())


def make(name, settings, model):
    kind = OPTIMIZERS[name]
    params = [p for p in model.parameters() if name != 'Muon' or p.ndim == 2]  # Muon takes matrices only
    # with larger steps LBFGS fits the data to the last digit, and then divides by nothing
    return kind(params, **{'lr': 0.001 if name == 'LBFGS' else 0.01, **settings})


def test_the_common_optimizers_are_among_those_tried():
    common = 'SGD Adam AdamW Adamax NAdam RAdam RMSprop Rprop ASGD Adagrad Adadelta Adafactor LBFGS'
    assert set(common.split()) <= set(OPTIMIZERS)


@pytest.mark.parametrize('clip', [None, 0.1])
@pytest.mark.parametrize(('name', 'settings'), CASES)
def test_ten_steps_of_any_optimizer_revive_nothing(name, settings, clip):
    model = net()
    optimizer = make(name, settings, model)
    for _ in range(3):
        train(model, optimizer, 1, clip)  # moments for everything, the dead-to-be included
    mask = half(model, ndim=(2,) if name == 'Muon' else (2, 4))
    keep_sparse(model, optimizer, mask)
    assert revived(model, mask) == 0
    before = copy.deepcopy(dict(model.named_parameters()))
    for step in range(10):
        train(model, optimizer, 1, clip, data_seed=2 if name == 'LBFGS' else step)  # LBFGS diverges on changing data
        assert revived(model, mask) == 0, f'step {step}'
    assert all(param.isfinite().all() for param in model.parameters())
    for key, alive in mask.items():
        assert (dict(model.named_parameters())[key] != before[key])[alive].any(), key


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'lamb', 'rmsproptf', 'lion', 'adopt', 'lookahead_adam'])
def test_optimizers_of_timm(name):
    model = net()
    optimizer = create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.05)
    train(model, optimizer, 3)
    mask = half(model)
    keep_sparse(model, optimizer, mask)
    train(model, optimizer, 12)  # the slow weights of Lookahead come in at the sixth step
    assert revived(model, mask) == 0


@pytest.mark.parametrize('name', ['SGD', 'AdamW'])
def test_without_it_the_dead_come_back(name):
    # so that the tests above can fail
    model = net()
    optimizer = make(name, {}, model)
    train(model, optimizer, 3)
    mask = half(model)
    mask.zero_weights_(model)
    train(model, optimizer, 1)
    assert revived(model, mask) > 0


@pytest.mark.parametrize('settings', [{'momentum': 0.9, 'weight_decay': 0.01}, {'momentum': 0.9, 'nesterov': True}])
def test_equals_masking_by_hand_bit_for_bit(settings):
    tied, by_hand = net(), net()
    mask = half(tied)
    optimizer = make('SGD', settings, tied)
    keep_sparse(tied, optimizer, mask)
    train(tied, optimizer, 10, clip=0.1)
    optimizer = make('SGD', settings, by_hand)
    mask.zero_weights_(by_hand)
    data = torch.Generator().manual_seed(2)
    for _ in range(10):
        x, y = torch.randn(8, 2, 4, 4, generator=data), torch.randn(8, 4, generator=data)
        for _ in range(2):  # as `train` evaluates it: before the step and in the closure
            optimizer.zero_grad()
            (by_hand(x) - y).square().mean().backward()
            mask.zero_grads_(by_hand)
            clip_grad_norm_(by_hand.parameters(), 0.1)
        optimizer.step()
        mask.zero_weights_(by_hand)
    for key, value in tied.state_dict().items():
        assert torch.equal(value, by_hand.state_dict()[key]), key


def test_clipping_sees_only_the_living():
    layer = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    keep_sparse(layer, optimizer, Mask({'weight': torch.tensor([[True, True, False]])}))
    layer(torch.tensor([[3.0, 4.0, 12.0]])).sum().backward()
    assert layer.weight.grad.tolist() == [[3.0, 4.0, 0.0]]
    # 5 and not 13
    assert clip_grad_norm_(layer.parameters(), 1e9).item() == 5


def test_gradients_accumulate_masked():
    layer = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    keep_sparse(layer, optimizer, Mask({'weight': torch.tensor([[True, False]])}))
    layer(torch.tensor([[1.0, 5.0]])).sum().backward()
    layer(torch.tensor([[2.0, 7.0]])).sum().backward()
    assert layer.weight.grad.tolist() == [[3.0, 0.0]]


def test_micro_batches_revive_nothing():
    model = net()
    optimizer = make('AdamW', {}, model)
    mask = half(model)
    keep_sparse(model, optimizer, mask)
    train(model, optimizer, 10, clip=0.1, micro_batches=4)
    assert revived(model, mask) == 0


def test_what_is_there_when_it_is_tied_is_masked_at_once():
    layer = nn.Linear(2, 1, bias=False)
    layer(torch.tensor([[1.0, 5.0]])).sum().backward()
    mask = Mask({'weight': torch.tensor([[True, False]])})
    kept = layer.weight[0, 0].item()
    keep_sparse(layer, torch.optim.SGD(layer.parameters(), lr=1.0), mask)
    assert layer.weight.tolist() == [[kept, 0.0]]
    assert layer.weight.grad.tolist() == [[1.0, 0.0]]


def test_remove_undoes_it():
    model = net()
    optimizer = make('SGD', {}, model)
    mask = half(model)
    handle = keep_sparse(model, optimizer, mask)
    train(model, optimizer, 1)
    assert revived(model, mask) == 0
    handle.remove()
    handle.remove()  # a second time does no harm
    params = dict(model.named_parameters())
    train(model, optimizer, 1)
    assert all(params[name].grad[~alive].any() for name, alive in mask.items())
    assert all(params[name][~alive].any() for name, alive in mask.items())


def test_leaving_a_with_block_undoes_it():
    model = net()
    optimizer = make('SGD', {}, model)
    mask = half(model)
    with keep_sparse(model, optimizer, mask) as kept:
        train(model, optimizer, 2)
        assert revived(model, kept.mask) == 0
    train(model, optimizer, 1)
    assert revived(model, mask) > 0


def test_an_error_in_a_with_block_undoes_it_and_is_not_swallowed():
    model = net()
    optimizer = make('SGD', {}, model)
    mask = half(model)
    with pytest.raises(KeyError), keep_sparse(model, optimizer, mask):
        raise KeyError
    train(model, optimizer, 1)
    assert revived(model, mask) > 0


def test_by_default_the_zeros_of_the_weights_are_kept():
    model = net()
    mask = half(model)
    mask.pop('6.weight')
    mask.zero_weights_(model)
    with torch.no_grad():
        model[6].weight.zero_()  # a layer that starts silent must be free to learn
        model[4].bias[:3] = 0
    optimizer = make('AdamW', {}, model)
    handle = keep_sparse(model, optimizer)
    assert handle.mask.keys() == mask.keys() == {'0.weight', '4.weight'}
    assert all(torch.equal(handle.mask[name], mask[name]) for name in mask)
    train(model, optimizer, 3)
    assert revived(model, mask) == 0
    assert model[6].weight.all()
    assert model[4].bias.all()


def test_warns_when_there_is_nothing_to_keep():
    model = net()
    with pytest.warns(UserWarning, match='Sequential has no zero weights to keep'):
        handle = keep_sparse(model, make('SGD', {}, model))
    before = model[0].weight.detach().clone()
    train(model, make('SGD', {}, model), 1)
    assert not torch.equal(before, model[0].weight)
    assert handle.mask == {}


def test_holds_a_mask_of_its_own():
    model = net()
    optimizer = make('SGD', {}, model)
    mask = half(model)
    held = copy.deepcopy(mask)
    keep_sparse(model, optimizer, mask)
    for alive in mask.values():
        alive.fill_(True)
    train(model, optimizer, 2)
    assert revived(model, held) == 0


def test_an_optimizer_prepared_by_accelerate():
    AcceleratorState._reset_state(True)
    try:
        accelerator = Accelerator(cpu=True)
        model = net()
        model, optimizer = accelerator.prepare(model, make('AdamW', {}, model))
        mask = half(model)
        keep_sparse(model, optimizer, mask)
        data = torch.Generator().manual_seed(0)
        for _ in range(10):
            loss = model(torch.randn(8, 2, 4, 4, generator=data)).square().mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        assert revived(model, mask) == 0
    finally:
        AcceleratorState._reset_state(True)


def test_a_copy_of_the_model_is_free():
    model = net()
    optimizer = make('SGD', {}, model)
    mask = half(model)
    keep_sparse(model, optimizer, mask)
    train(model, optimizer, 1)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 2, 4, 4)
    assert torch.equal(twin.eval()(x), model.eval()(x))
    train(twin, make('SGD', {}, twin), 1)
    assert revived(twin, mask) > 0
    assert revived(model, mask) == 0


def test_keys_and_optimizer_state_do_not_change():
    model = net()
    optimizer = make('AdamW', {}, model)
    train(model, optimizer, 2)
    keys = list(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()['state'])
    keep_sparse(model, optimizer, half(model))
    assert list(model.state_dict()) == keys
    after = optimizer.state_dict()['state']
    assert all(torch.equal(state[i][key], after[i][key]) for i in state for key in state[i])


def test_frozen_weights_stay_as_they_are():
    model = net()
    mask = half(model)
    model[0].weight.requires_grad_(False)
    optimizer = make('SGD', {}, model)
    keep_sparse(model, optimizer, mask)
    before = model[0].weight.clone()
    train(model, optimizer, 2)
    assert torch.equal(model[0].weight, before)
    assert revived(model, mask) == 0


def test_a_mask_on_another_device_is_brought_along():
    # the meta device stands in for an accelerator: what matters is where the held mask lies
    model = nn.Linear(4, 4, device='meta')
    handle = keep_sparse(model, torch.optim.SGD(model.parameters()), Mask({'weight': torch.eye(4).bool()}))
    assert handle.mask['weight'].device.type == 'meta'


def test_an_optimizer_of_another_model_is_refused():
    model = net()
    with pytest.raises(ValueError, match='optimizer trains none of the masked weights of Sequential'):
        keep_sparse(model, make('SGD', {}, copy.deepcopy(model)), half(model))


@pytest.mark.parametrize(
    ('mask', 'message'),
    [
        ({'9.weight': torch.ones(2).bool()}, "'9.weight', which Sequential has not"),
        ({'0.weight': torch.ones(2).bool()}, r"'0.weight' has shape \(2,\)"),
        ({'0.weight': torch.ones(6, 2, 3, 3)}, "'0.weight' must be torch.bool"),
    ],
)
def test_a_wrong_mask_is_refused_and_nothing_is_touched(mask, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        keep_sparse(model, make('SGD', {}, model), Mask(mask))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_frozen_weight_that_thaws_has_masked_gradients():
    model = net()
    mask = half(model)
    model[0].weight.requires_grad_(False)
    optimizer = make('SGD', {}, model)
    keep_sparse(model, optimizer, mask)
    assert not model[0].weight.requires_grad
    model[0].weight.requires_grad_(True)
    train(model, optimizer, 1)
    assert (model[0].weight.grad != 0).any()
    assert not (model[0].weight.grad[~mask['0.weight']] != 0).any()
