import pytest
import timm
import torch
from torch import nn

import timm_supertickets  # noqa: F401  registers the models
from timm_supertickets.layers import block_group
from timm_supertickets.search.importance import GatePenalty, gate_importance, penalty_weights, shares_by_cost


class Gates(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({'bn2': nn.BatchNorm2d(3)})
        self.b = nn.ModuleDict({'bn2': nn.BatchNorm2d(2)})
        self.a['bn2'].weight.data = torch.tensor([0.5, -2.0, 0.0])
        self.b['bn2'].weight.data = torch.tensor([-1.0, 3.0])


GROUPS = [block_group('a', 0, ((3, 2), (5, 1)), True), block_group('b', 1, ((3, 2),), False)]


def test_importance_is_the_gates_magnitude():
    model = Gates()
    found = gate_importance(model, GROUPS)
    assert {gate: score.tolist() for gate, score in found.items()} == {
        'a.bn2.weight': [0.5, 2.0, 0.0],
        'b.bn2.weight': [1.0, 3.0],
    }
    assert not any(score.requires_grad for score in found.values())
    found['a.bn2.weight'].zero_()
    assert model.a['bn2'].weight.tolist() == [0.5, -2.0, 0.0]


def test_shares_by_cost_by_hand():
    gates = {'a': torch.tensor([0.5, 2.0, 0.0]), 'b': torch.tensor([3.0, 3.0, 4.0], requires_grad=True)}
    macs = {'a': torch.tensor([10.0, 10.0, 30.0]), 'b': torch.tensor([2.0, 1.0, 0.0])}
    found = shares_by_cost(gates, macs)
    assert found['a'].tolist() == pytest.approx([0.25 / 4.25 / 10, 0.1, 0.0])
    # of equals the later one goes first; what costs nothing is not divided by it
    assert found['b'].tolist() == pytest.approx([9 / 25 / 2, 9 / 34, 1.0])
    assert not found['b'].requires_grad


def test_shares_are_zero_where_all_gates_are():
    assert shares_by_cost({'a': torch.zeros(3)}, {'a': torch.ones(3)})['a'].tolist() == [0.0] * 3


def test_what_scales_all_gates_of_a_block_kills_none_of_its_channels():
    from timm_supertickets.cost import channel_macs, model_cost
    from timm_supertickets.search.select import select_by_budget

    torch.manual_seed(0)
    model = timm.create_model('supernet_mbv2_tiny')
    groups, cost = model.channel_groups(), model_cost(model, (3, 32, 32))
    macs = channel_macs(groups, cost)
    gates = {group.gate: torch.rand(group.channels).add(0.1) for group in groups}
    first, scaled = groups[0].gate, {**gates, groups[0].gate: gates[groups[0].gate] * 1e-3}
    keep, same = (
        select_by_budget(groups, shares_by_cost(g, macs), macs, cost.macs, 0.5 * cost.macs) for g in (gates, scaled)
    )
    assert all(torch.equal(alive, same[gate]) for gate, alive in keep.items())
    bare = select_by_budget(groups, scaled, macs, cost.macs, 0.5 * cost.macs)
    assert bare[first].sum() < 20 < keep[first].sum()
    shares = [alive.double().mean().item() for alive in keep.values()]
    assert shares[0] < 0.5 < 0.9 < shares[-1]  # the first block's channels cost 148 times as much as the last one's


def test_penalty_weights_by_hand():
    weights = penalty_weights({'a': torch.tensor([10.0, 30.0]), 'b': torch.tensor([20.0, 20.0, 70.0])})
    assert {gate: w.tolist() for gate, w in weights.items()} == {
        'a': pytest.approx([1 / 3, 1.0]),
        'b': pytest.approx([2 / 3, 2 / 3, 7 / 3]),
    }
    assert penalty_weights({}) == {}


def test_penalty_weights_of_a_supernet_have_a_mean_of_one():
    from timm_supertickets.cost import channel_macs, model_cost

    model = timm.create_model('supernet_mbv2_tiny')
    weights = penalty_weights(channel_macs(model.channel_groups(), model_cost(model, (3, 32, 32))))
    every = [w for part in weights.values() for w in part.tolist()]
    assert len(every) == sum(group.channels for group in model.channel_groups())
    assert sum(every) / len(every) == pytest.approx(1.0, rel=1e-12)


def test_penalty_and_gradient_by_hand():
    model = Gates()
    penalty = GatePenalty(model, {'b.bn2.weight': torch.tensor([4.0, 1.0]), 'a.bn2.weight': torch.tensor([1.0, 2, 3])})
    value = penalty()
    assert value.item() == 4 * 1 + 1 * 3 + 1 * 0.5 + 2 * 2 + 3 * 0
    (0.5 * value).backward()
    # a gate of exactly zero feels nothing
    assert model.a['bn2'].weight.grad.tolist() == [0.5, -1.0, 0.0]
    assert model.b['bn2'].weight.grad.tolist() == [-2.0, 0.5]
    assert model.a['bn2'].bias.grad is None


def test_penalty_follows_the_gates_through_training():
    model = Gates()
    penalty = GatePenalty(model, {'a.bn2.weight': torch.ones(3), 'b.bn2.weight': torch.ones(2)})
    assert penalty().item() == 6.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    penalty().backward()
    optimizer.step()
    assert penalty().item() == 6.5 - 4 * 0.25


def test_penalty_without_gates_is_zero():
    assert (torch.ones((), requires_grad=True) + GatePenalty(Gates(), {})()).item() == 1.0


def test_penalty_in_float64():
    model = Gates().double()
    assert GatePenalty(model, {'a.bn2.weight': torch.ones(3)})().dtype == torch.float64
