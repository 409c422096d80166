"""When and how much: pure functions of the step."""

import math


def cubic(step: float, start: float, stop: float, final: float, initial: float = 0.0) -> float:
    """Fast at first, slow at the end: `final + (initial - final) * (1 - t)^3` with t the share of the way.

    Args:
        step: Where we are; before `start` the value is `initial`, from `stop` on it is `final`.
        start: Step at which the way begins.
        stop: Step at which it ends.
        final: Value at the end.
        initial: Value at the beginning.

    Source:
        Zhu and Gupta, To prune, or not to prune, https://arxiv.org/abs/1710.01878.
    """
    if step >= stop:
        return final
    return final + (initial - final) * (1 - _share(step, start, stop)) ** 3


def steps(step: float, every: float, amount: float, final: float, start: float = 0.0) -> float:
    """`amount` more after every `every` steps from `start` on, up to `final` (the schedule of SuperTickets).

    The first rise comes at `start + every`.
    """
    if every <= 0:
        raise ValueError(f'every must be above 0, got {every}')
    return min(final, amount * max(0, math.floor((step - start) / every)))


def cosine(step: float, start: float, stop: float, initial: float) -> float:
    """Half a cosine from `initial` at `start` down to 0 at `stop`."""
    return initial * 0.5 * (1 + math.cos(math.pi * _share(step, start, stop)))


def warmup(step: float, steps: float, final: float) -> float:
    """Straight from 0 to `final` within `steps` steps; `final` at once if `steps` is 0."""
    return final if step >= steps else final * step / steps


def _share(step: float, start: float, stop: float) -> float:
    if stop <= start:
        return float(step >= stop)
    return min(1.0, max(0.0, (step - start) / (stop - start)))
