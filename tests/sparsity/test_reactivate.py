import pytest
import torch
from torch import nn

from timm_supertickets import Mask
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.reactivate import regrow, reset


def test_reset_opens_everything():
    mask = Mask({'a': torch.tensor([[True, False]]), 'b': torch.zeros(3, dtype=torch.bool)})
    opened = reset(mask)
    assert opened['a'].tolist() == [[True, True]]
    assert opened['b'].tolist() == [True, True, True]
    assert mask['a'].tolist() == [[True, False]]


MASK = Mask({'a': torch.tensor([True, True, True, False]), 'b': torch.tensor([[True, False], [False, False]])})
SCORES = {'a': torch.tensor([4.0, 1.0, 3.0, 0.0]), 'b': torch.tensor([[2.0, 0.0], [0.0, 0.0]])}


def test_regrow_by_hand():
    # four live; a quarter is one: the weakest (score 1) dies, the dead weight with gradient -9 comes back
    gradients = {'a': torch.tensor([50.0, 60.0, 70.0, 0.5]), 'b': torch.tensor([[80.0, 3.0], [-9.0, 2.0]])}
    mask = regrow(MASK, SCORES, gradients, 0.25)
    assert mask['a'].tolist() == [True, False, True, False]
    assert mask['b'].tolist() == [[True, False], [True, False]]
    # half is two: scores 1 and 2 die, but 2 is the last of b and 3 dies instead; gradients -9 and 3 come back
    mask = regrow(MASK, SCORES, gradients, 0.5)
    assert mask['a'].tolist() == [True, False, False, False]
    assert mask['b'].tolist() == [[True, True], [True, False]]
    # the mask that went in is as it was
    assert MASK['a'].tolist() == [True, True, True, False]


def test_regrow_brings_back_weights_without_a_gradient_rather_than_none():
    zeros = {name: torch.zeros_like(score) for name, score in SCORES.items()}
    mask = regrow(MASK, SCORES, zeros, 0.25)
    assert mask.sparsity == MASK.sparsity
    assert mask['a'].tolist() == [True, False, True, False]


def test_nothing_to_trade_returns_the_mask():
    gradients = {name: torch.ones_like(score) for name, score in SCORES.items()}
    assert regrow(MASK, SCORES, gradients, 0.0) is MASK
    full = Mask.dense(SCORES)
    assert regrow(full, SCORES, gradients, 0.5) is full


@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('share', [0.05, 0.3, 0.6])
def test_regrow_keeps_the_sparsity_and_trades_exactly(seed, share):
    torch.manual_seed(seed)
    shapes = {'a': (30,), 'b': (8, 9), 'c': (2, 3, 5, 5)}
    scores = {name: torch.randint(5, shape).float() for name, shape in shapes.items()}
    gradients = {name: torch.randint(-4, 5, shape).float() for name, shape in shapes.items()}
    mask = prune(scores, 0.7)
    after = regrow(mask, scores, gradients, share)
    traded = round(share * mask.alive)
    gone = {name: mask[name] & ~after[name] for name in mask}
    back = {name: ~mask[name] & after[name] for name in mask}
    assert after.alive == mask.alive
    assert sum(int(g.sum()) for g in gone.values()) == sum(int(b.sum()) for b in back.values()) == traded
    # nobody who died scores above one who stayed (but for the last of a tensor); likewise the gradients
    for name in mask:
        stayed = (mask[name] & after[name]).sum() > 1
        if gone[name].any() and stayed:
            assert scores[name][gone[name]].max() <= scores[name][mask[name] & after[name]].min()
    smallest_back = min(float(gradients[n][back[n]].abs().min()) for n in back if back[n].any())
    left = [gradients[n][~mask[n] & ~after[n]].abs().max() for n in mask if (~mask[n] & ~after[n]).any()]
    assert smallest_back >= max(map(float, left))


def test_regrow_trades_no_more_than_there_is_dead():
    mask = Mask({'a': torch.tensor([True] * 9 + [False])})
    after = regrow(mask, {'a': torch.arange(10.0)}, {'a': torch.ones(10)}, 0.5)
    assert after['a'].tolist() == [False] + [True] * 9


@pytest.mark.parametrize('share', [-0.1, 1.0, 2.0])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=rf'share of weights to regrow must be in \[0, 1\), got {share}'):
        regrow(MASK, SCORES, SCORES, share)


@pytest.mark.parametrize(('reactivation', 'comes_back'), [('none', False), ('reset', True), ('regrow', True)])
def test_what_becomes_of_a_weight_that_should_not_have_died(reactivation, comes_back):
    # y = 3 * x0 + x1, and the weight of x0 dies young, when it is still small
    torch.manual_seed(0)
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.01, 0.9, 0.2, 0.1]]))
    x = torch.randn(64, 4)
    y = x @ torch.tensor([[3.0], [1.0], [0.0], [0.0]])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)

    def event(share):
        mask = prune({'weight': layer.weight.abs()}, 0.5)
        mask.zero_weights_(layer)
        if reactivation == 'reset':
            return mask, reset(mask)
        if reactivation == 'regrow':
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            grown = regrow(mask, {'weight': layer.weight.abs()}, {'weight': layer.weight.grad}, share)
            grown.zero_weights_(layer)
            return grown, grown
        return mask, mask

    dead_first = prune({'weight': layer.weight.abs()}, 0.5)
    assert dead_first['weight'].tolist() == [[False, True, True, False]]
    for share in (0.5, 0.0):
        drawn, trained = event(share)
        assert drawn.sparsity == 0.5
        for _ in range(30):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            trained.zero_grads_(layer)
            optimizer.step()
            trained.zero_weights_(layer)
    final = prune({'weight': layer.weight.abs()}, 0.5)
    final.zero_weights_(layer)
    assert bool(final['weight'][0, 0]) is comes_back
    assert (layer.weight[0, 0].item() == pytest.approx(3, abs=0.1)) is comes_back
    assert layer.weight.count_nonzero() <= 2
