"""Plan: what a configuration says for a step of the trunk. Pure numbers."""

from parts.config import Config

from timm_supertickets.sparsity import schedule


def choosing(config: Config, step: int) -> bool:
    """Whether channels die at the event at this step."""
    return searching(config, step) and step % (config.search_every * config.round_steps) == 0


def searching(config: Config, step: int) -> bool:
    """Whether channels may still die at this step."""
    return config.search != 'none' and step <= config.search_until * config.steps


def budget(config: Config, step: int) -> float:
    """Share of the supernet's MACs that the net may cost after the event at this step."""
    return schedule.cubic(step, 0, last_choice(config), config.budget, initial=1.0)


def last_choice(config: Config) -> int:
    """The step of the last event at which channels die; 0 if there is none."""
    every = config.search_every * config.round_steps
    return int(config.search_until * config.steps) // every * every


def penalty(config: Config, step: int) -> float:
    """Weight of the gates' penalty at this step."""
    if not searching(config, step):
        return 0.0
    return schedule.warmup(step, config.penalty_warmup * config.steps, config.penalty)


def sparsity(config: Config, step: int) -> float:
    """Sparsity of the trunk after the event at this step."""
    start, stop, final = config.prune_from * config.steps, config.prune_until * config.steps, config.targets[-1]
    every = config.prune_every * config.round_steps
    if step >= stop:
        return final
    step -= step % every  # the last prune
    if config.schedule == 'cubic':
        return schedule.cubic(step, start, stop, final)
    prunes = max(1, round((stop - start) / every))
    return schedule.steps(step, every, final / prunes, final, start)


def due(config: Config, step: int, drawn: int) -> list[float]:
    """The targets that the trunk has reached at this step and that have not been drawn; a dense one waits."""
    reached, ended = sparsity(config, step), step >= config.prune_until * config.steps
    return [target for target in config.targets[drawn:] if target <= reached and (target > 0 or ended)]


def reactivating(config: Config, step: int) -> bool:
    """Whether dead weights may come back after the event at this step."""
    return config.reactivation != 'none' and step < config.reactivate_until * config.steps


def regrow_share(config: Config, step: int) -> float:
    """Share of the living weights that `regrow` trades at this step."""
    start, stop = config.prune_from * config.steps, config.reactivate_until * config.steps
    return schedule.cosine(step, start, stop, config.regrow_share)
