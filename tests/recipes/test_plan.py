import pytest
from parts import plan
from parts.config import Config


def test_trunk_passes_every_target_once():
    config = Config(rounds=16, round_steps=40, targets=[0.5, 0.8, 0.9])
    drawn, at = 0, []
    for step in range(40, 641, 40):
        reached = plan.due(config, step, drawn)
        drawn += len(reached)
        at += [(step, target) for target in reached]
    # 0.9 (1 - (1 - t)^3) reaches 0.5 at t = 0.237, 0.8 at t = 0.519, 0.9 at t = 1
    assert at == [(160, 0.5), (360, 0.8), (640, 0.9)]


def test_one_event_draws_all_targets_that_it_jumps_over():
    config = Config(rounds=1, round_steps=40, targets=[0.1, 0.5, 0.9])
    assert plan.due(config, 40, 0) == [0.1, 0.5, 0.9]


def test_a_dense_target_waits_for_the_end_of_pruning():
    config = Config(rounds=8, round_steps=5, targets=[0.0], prune_until=0.75)
    assert [step for step in range(5, 41, 5) if plan.due(config, step, 0)] == [30, 35, 40]
    mixed = Config(rounds=8, round_steps=5, targets=[0.0, 0.4])
    assert plan.due(mixed, 35, 0) == []
    assert plan.due(mixed, 40, 0) == [0.0, 0.4]


def test_pruning_at_once_comes_at_the_end():
    config = Config(rounds=4, round_steps=5, targets=[0.5, 0.9], prune_from=1.0, prune_until=1.0)
    assert [plan.sparsity(config, step) for step in (5, 10, 15, 20)] == [0, 0, 0, 0.9]
    assert plan.due(config, 20, 0) == [0.5, 0.9]


def test_equal_steps_reach_the_last_target_in_equal_rises():
    config = Config(rounds=10, round_steps=5, targets=[0.9], schedule='steps', prune_from=0.1)
    rises = [plan.sparsity(config, step) for step in range(0, 51, 5)]
    assert rises == pytest.approx([0, 0] + [0.1 * i for i in range(1, 10)])


def test_events_come_every_so_many_rounds():
    config = Config(rounds=12, round_steps=5, search_every=2, search_until=0.5, prune_every=3, targets=[0.9])
    assert [step for step in range(5, 61, 5) if plan.choosing(config, step)] == [10, 20, 30]
    rises = [plan.sparsity(config, step) for step in range(5, 61, 5)]
    once = Config(rounds=4, round_steps=15, targets=[0.9])
    thirds = [plan.sparsity(once, step) for step in (0, 15, 30, 45, 60)]
    assert rises == [thirds[0]] * 2 + [thirds[1]] * 3 + [thirds[2]] * 3 + [thirds[3]] * 3 + [thirds[4]]


def test_ten_percent_more_at_every_prune():
    config = Config(rounds=70, round_steps=2, schedule='steps', prune_every=5, prune_until=45 / 70, targets=[0.9])
    assert [plan.sparsity(config, step) for step in (8, 10, 12, 20, 80, 88, 90, 140)] == pytest.approx(
        [0, 0.1, 0.1, 0.2, 0.8, 0.8, 0.9, 0.9]
    )


def test_search_spends_its_budget_by_its_end():
    config = Config(rounds=10, round_steps=10, budget=0.4, search_until=0.5)
    assert plan.budget(config, 0) == 1
    assert plan.budget(config, 25) == pytest.approx(0.4 + 0.6 * 0.5**3)
    assert plan.budget(config, 50) == 0.4
    assert plan.searching(config, 50)
    assert not plan.searching(config, 51)


def test_penalty_rises_and_ends_with_the_search():
    config = Config(rounds=10, round_steps=10, penalty=2.0, penalty_warmup=0.2, search_until=0.5)
    assert [plan.penalty(config, step) for step in (0, 10, 20, 50, 51)] == [0, 1, 2, 2, 0]


def test_no_search_no_penalty():
    config = Config(search='none', penalty=1.0)
    assert not plan.searching(config, 1)
    assert plan.penalty(config, 100) == 0


def test_reactivation_ends():
    config = Config(rounds=10, round_steps=10, regrow_share=0.4, reactivate_until=0.8)
    assert [plan.regrow_share(config, step) for step in (0, 40, 80, 100)] == pytest.approx([0.4, 0.2, 0, 0])
    assert [plan.reactivating(config, step) for step in (10, 70, 80, 100)] == [True, True, False, False]
    assert not plan.reactivating(Config(reactivation='none'), 40)


def test_the_last_event_of_the_search_reaches_the_budget():
    config = Config(rounds=4, round_steps=10, search_every=3, search_until=0.9, budget=0.4, search='budget')
    assert [step for step in range(10, 41, 10) if plan.choosing(config, step)] == [30]
    assert (plan.last_choice(config), plan.budget(config, 30)) == (30, 0.4)
    assert plan.last_choice(Config(rounds=18, round_steps=440, search_until=0.39)) == 7 * 440
    assert plan.last_choice(Config(rounds=1, round_steps=10, search_until=0.5)) == 0
