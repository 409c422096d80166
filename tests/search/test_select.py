import pytest
import torch

from timm_supertickets.layers import block_group
from timm_supertickets.search.select import select_by_budget, select_by_threshold

# 'a' is not residual, 'b' is
A, B = 'a.bn2.weight', 'b.bn2.weight'
GROUPS = [block_group('a', 0, ((3, 2), (5, 1)), False), block_group('b', 1, ((3, 3),), True)]
SCORES = {A: torch.tensor([0.3, 0.1, 0.2]), B: torch.tensor([0.15, 0.9, 0.05])}
MACS = {A: torch.tensor([10.0, 10.0, 30.0]), B: torch.tensor([20.0, 20.0, 20.0])}
FIXED = 40.0
TOTAL = FIXED + 50 + 60
# dying order: b2 (20), a1 (10), b0 (20), a2 (30), b1 (20); a0 is the last of its block and lives


def budget(limit, scores=SCORES, groups=GROUPS):
    keep = select_by_budget(groups, scores, MACS, TOTAL, limit)
    assert all(alive.dtype == torch.bool for alive in keep.values())
    return {gate: ''.join(str(int(a)) for a in alive) for gate, alive in keep.items()}


@pytest.mark.parametrize(
    ('limit', 'a', 'b'),
    [
        (200, '111', '111'),
        (150, '111', '111'),
        (149, '111', '110'),
        (130, '111', '110'),
        (129.5, '101', '110'),
        (120, '101', '110'),
        (119, '101', '010'),
        (100, '101', '010'),
        (99, '100', '010'),
        (70, '100', '010'),
        (69, '100', '000'),
        (50, '100', '000'),
    ],
)
def test_budget_by_hand(limit, a, b):
    assert budget(limit) == {A: a, B: b}


@pytest.mark.parametrize('limit', [49, 0, -10])
def test_budget_out_of_reach(limit):
    message = f'budget of {limit} MACs is out of reach: with the fewest channels 50 are left'
    with pytest.raises(ValueError, match=f'^{message}$'):
        budget(limit)


def test_budget_with_nothing_to_search():
    assert select_by_budget([], {}, {}, 100, 100) == {}
    with pytest.raises(ValueError, match=r'^budget of 99 MACs is out of reach: the model costs 100, none of it'):
        select_by_budget([], {}, {}, 100, 99)


def test_budget_out_of_reach_where_every_channel_is_the_last_of_its_block():
    groups = [block_group('a', 0, ((3, 1),), False)]
    with pytest.raises(ValueError, match=r'^budget of 5 MACs is out of reach: with the fewest channels 8 are left$'):
        select_by_budget(groups, {A: torch.zeros(1)}, {A: torch.tensor([3.0])}, 8, 5)


def test_budget_is_met_and_overshot_by_less_than_the_last_channel():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        groups = [block_group('a', 0, ((3, 9), (5, 4)), False), block_group('b', 1, ((3, 7),), True)]
        scores = {group.gate: torch.rand(group.channels, generator=generator) for group in groups}
        macs = {group.gate: torch.randint(1, 30, (group.channels,), generator=generator).double() for group in groups}
        total = sum(m.sum().item() for m in macs.values()) + 10
        limit = total * (0.3 + 0.7 * torch.rand((), generator=generator).item())
        keep = select_by_budget(groups, scores, macs, total, limit)
        dead = sorted(
            (scores[g.gate][i].item(), macs[g.gate][i].item())
            for g in groups
            for i in range(g.channels)
            if not keep[g.gate][i]
        )
        left = total - sum(m for _, m in dead)
        assert left <= limit < left + dead[-1][1]
        assert keep[A].any()
        # whoever lives on beats every dead channel, but for the best of the block that may not go
        best = scores[A].argmax()
        alive = [scores[g.gate][i].item() for g in groups for i in range(g.channels) if keep[g.gate][i]]
        assert min(s for s in alive if s != scores[A][best].item()) >= dead[-1][0]


def test_a_block_that_is_not_residual_keeps_its_best_whatever_it_scores():
    scores = {A: torch.tensor([0.01, 0.02, 0.0]), B: torch.tensor([5.0, 6.0, 7.0])}
    assert budget(100, scores) == {A: '010', B: '011'}


def test_ties_die_in_order():
    scores = {A: torch.zeros(3), B: torch.zeros(3)}
    assert budget(105, scores) == {A: '100', B: '011'}


@pytest.mark.parametrize(
    ('threshold', 'a', 'b'),
    [(0.0, '111', '111'), (0.1, '111', '110'), (0.11, '101', '110'), (0.16, '101', '010'), (1.0, '100', '000')],
)
def test_threshold_by_hand(threshold, a, b):
    keep = select_by_threshold(GROUPS, SCORES, threshold)
    assert {gate: ''.join(str(int(x)) for x in alive) for gate, alive in keep.items()} == {A: a, B: b}
    assert all(alive.dtype == torch.bool for alive in keep.values())


def test_gates_with_gradients_can_be_given():
    scores = {gate: score.clone().requires_grad_() for gate, score in SCORES.items()}
    assert budget(119, scores) == budget(119)
    assert select_by_threshold(GROUPS, scores, 1.0)[A].tolist() == [True, False, False]
