import math
import random

import pytest

from timm_supertickets.sparsity.schedule import cosine, cubic, steps, warmup


@pytest.mark.parametrize(
    ('step', 'value'),
    [(-5, 0.0), (0, 0.0), (2, 0.0), (7, 0.7), (12, 0.8), (13, 0.8), (10**9, 0.8)],
)
def test_cubic_by_hand(step, value):
    # from 2 to 12; half of the way at 7: 0.8 * (1 - 0.5^3) = 0.7
    assert cubic(step, 2, 12, 0.8) == pytest.approx(value)


def test_cubic_from_another_beginning():
    # a quarter of the way: 1 + (0.2 - 1) * 0.75^3 = 1 - 0.8 * 0.421875
    assert cubic(2.5, 0, 10, 1.0, initial=0.2) == pytest.approx(0.6625)
    assert cubic(0, 0, 10, 1.0, initial=0.2) == pytest.approx(0.2)


def test_cubic_arrives_at_the_very_number():
    assert cubic(10, 0, 10, 0.9) == 0.9
    assert cubic(11, 0, 10, 0.9, initial=0.3) == 0.9


def test_cubic_without_a_way_jumps():
    assert cubic(4, 5, 5, 0.9) == 0
    assert cubic(5, 5, 5, 0.9) == 0.9


@pytest.mark.parametrize(
    ('step', 'value'),
    [(0, 0.0), (24, 0.0), (25, 0.1), (49, 0.1), (50, 0.2), (124, 0.4), (125, 0.45), (1000, 0.45)],
)
def test_steps_by_hand(step, value):
    assert steps(step, every=25, amount=0.1, final=0.45) == pytest.approx(value)


def test_steps_rise_one_interval_after_start():
    assert [steps(s, 5, 0.1, 0.9, start=10) for s in (0, 10, 14, 15, 20)] == pytest.approx([0, 0, 0, 0.1, 0.2])


@pytest.mark.parametrize('every', [0, -1])
def test_steps_that_never_come_are_refused(every):
    with pytest.raises(ValueError, match=f'every must be above 0, got {every}'):
        steps(1, every, 0.1, 0.9)


def test_cosine_by_hand():
    # the cosine of an eighth of a turn is sqrt(1/2)
    values = [cosine(s, 4, 12, 0.3) for s in (0, 4, 6, 8, 12, 99)]
    assert values == pytest.approx([0.3, 0.3, 0.15 * (1 + math.sqrt(0.5)), 0.15, 0.0, 0.0])


def test_warmup_by_hand():
    assert [warmup(s, 4, 0.2) for s in (0, 1, 2, 4, 5)] == pytest.approx([0, 0.05, 0.1, 0.2, 0.2])
    assert warmup(0, 0, 0.2) == 0.2


SCHEDULES = {
    'cubic': lambda step: cubic(step, 3, 77, 0.9, 0.1),
    'steps': lambda step: steps(step, 7, 0.1, 0.9, 3),
    'cosine': lambda step: -cosine(step, 3, 77, 0.3),
    'warmup': lambda step: warmup(step, 50, 0.1),
}


@pytest.mark.parametrize('name', SCHEDULES)
def test_schedules_never_turn_back(name):
    values = [SCHEDULES[name](step) for step in range(100)]
    assert values == sorted(values)
    assert values[0] < values[-1]


@pytest.mark.parametrize('name', SCHEDULES)
def test_schedules_depend_on_the_step_alone(name):
    # a resumed run asks in another order, and must get the same numbers to the bit
    values = [SCHEDULES[name](step) for step in range(100)]
    order = list(range(100))
    random.Random(0).shuffle(order)
    assert all(SCHEDULES[name](step) == values[step] for step in order)
