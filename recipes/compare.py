"""Compare: SuperTickets and what else one could do, side by side: same images, optimizer and counts of steps.

python recipes/compare.py [--config recipes/configs/compare_digits.yaml] [key=value ...]

Every cell is a run of train.py or finetune.py in a folder of its own, whose config.yaml repeats it. Run again, it goes
on with what is there.
"""

import math
import shlex
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import train
from parts.cells import Cell, arguments, claim, markdown, run_cells, spread, where_and_when, write_results
from parts.config import CONFIGS, Checked, Setup, parse

from timm_supertickets import prunable
from timm_supertickets.pictures import DPI, create_figure

ARMS = {
    'joint': 'SuperTickets: search and pruning together, one run per sparsity',
    'two_stage_1x': 'search, train, prune, retrain; the same steps',
    'two_stage_2x': 'search, train, prune, retrain; twice the steps',
    'no_retraining': 'search, train, prune; no retraining',
    'magnitude': "progressive magnitude pruning of timm's {baseline}, as many living weights",
    'dense': 'the found architecture, trained dense from scratch',
    'random_mask': 'the found architecture, a random mask of the same density per layer, trained from scratch',
    'family': 'SuperTickets: all sparsities from one run',
    'one_shot': 'a family, pruned at once after the trunk instead of progressively',
    'none': 'a family without reactivation',
    'reset': 'a family with reactivation by reset',
    'regrow': 'a family with reactivation by regrow',
    'threshold': 'a family searched by threshold',
    'retrained': 'the joint ticket, retrained shortly with its mask',
    'mask_fresh': "the joint ticket's mask, trained from fresh weights",
    'mask_initial': "the joint ticket's mask, trained from its own initial weights",
    'moved': 'the joint ticket of {other}, fine-tuned here with its mask, for as many steps as a joint run',
    'moved_short': 'the same, with as few steps as a short retraining',
    'moved_dense': 'the dense net of {other}, fine-tuned here without a mask, for as many steps',
    'moved_random': 'the joint ticket of {other}, its mask shuffled, fresh weights, trained here as long',
}
DENSE = ('dense', 'moved_dense')
PICTURES = {
    'accuracy': ['joint', 'two_stage_1x', 'two_stage_2x', 'no_retraining', 'magnitude', 'random_mask', 'dense'],
    'ablations': ['joint', 'family', 'one_shot', 'none', 'reset', 'regrow', 'threshold'],
    'retraining': ['joint', 'retrained', 'mask_fresh', 'mask_initial', 'random_mask'],
    'transfer': ['joint', 'moved', 'moved_short', 'moved_random', 'moved_dense'],
}
DIFFERENCES = (
    ('joint', 'two_stage_2x'), ('joint', 'two_stage_1x'), ('joint', 'magnitude'), ('joint', 'random_mask'),
    ('family', 'joint'), ('family', 'one_shot'), ('regrow', 'none'), ('reset', 'none'), ('threshold', 'family'),
    ('retrained', 'joint'), ('mask_fresh', 'joint'), ('mask_initial', 'joint'), ('moved', 'joint'),
    ('moved', 'moved_short'), ('moved', 'moved_random'),
)  # fmt: skip


@dataclass
class Config(Checked):
    """What a comparison does.

    Args:
        base: The configuration of train.py that the arms share, a file in `configs/`.
        changes: What else they share, as `key=value`.
        other: The configuration of train.py that tickets are moved from, a file in `configs/`.
        other_changes: What else that one has, as `key=value`.
        baseline: The model of timm that is pruned for comparison.
        baseline_changes: What it is trained with instead of what the arms share, as `key=value`.
        arms: Which arms; all by default.
        targets: Sparsities.
        seeds: So many seeds, from 0.
        retrain: Steps of a short retraining, as a share of those of a joint run.
        threshold: What the search by threshold has for settings, as `key=value`.
        jobs: Runs at a time, each on one thread of a CPU.
        output: Folder of the runs.
        results: Folder that results.json, README.md and pictures are written to.
    """

    base: str = 'mbv2_digits.yaml'
    changes: list[str] = field(default_factory=list)
    other: str = 'mbv2_fmnist_32.yaml'
    other_changes: list[str] = field(default_factory=list)
    baseline: str = 'mobilenetv2_035'
    baseline_changes: list[str] = field(default_factory=list)
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    targets: list[float] = field(default_factory=lambda: [0.5, 0.8, 0.9, 0.95])
    seeds: int = 3
    retrain: float = 0.2
    threshold: list[str] = field(default_factory=lambda: ['threshold=0.1', 'penalty=0.001'])
    jobs: int = 2
    output: str = 'output/compare_digits'
    results: str = 'recipes/results/compare_digits'

    def __post_init__(self) -> None:
        self.within(1, math.inf, 'seeds', 'jobs')
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown:
            raise ValueError(f'arms: {unknown[0]!r} is unknown; choose from {", ".join(ARMS)}')


def main(argv: list[str]) -> None:
    """Plan the cells, run those that have not run, and write what they gave."""
    config = parse(argv, Config, 'compare_digits.yaml', 'compare.py')
    grid = {(arm, t, seed): cell for seed in range(config.seeds) for (arm, t), cell in plan(config, seed).items()}
    cells = {cell.folder: cell for last in grid.values() for cell in (last.after, last) if cell is not None}
    claim(config, ('arms', 'seeds', 'targets'))
    for wave in ([c for c in cells.values() if c.after is None], [c for c in cells.values() if c.after is not None]):
        run_cells([cell for cell in wave if not cell.marker.exists()], config.jobs)
    results = [measured(arm, target, seed, grid) for arm, target, seed in grid]
    folder = Path(config.results)
    about = {'command': shlex.join(['python', 'recipes/compare.py', *argv]), **where_and_when()}
    text = tables(config, about, results)
    write_results(folder, about, config, results, text)
    for name, arms in PICTURES.items():
        shown = [arm for arm in arms if arm in config.arms]
        if len(shown) > 1:
            draw(folder / f'{name}.png', shown, results)
    print(text)


def plan(config: Config, seed: int) -> dict[tuple[str, float], Cell]:
    """Which run gives which arm at which sparsity, for one seed; cells that two arms share are there once."""
    home = parse(['--config', str(CONFIGS / config.base), *config.changes], train.Config)
    away = parse(['--config', str(CONFIGS / config.other), *config.other_changes], train.Config)
    root = Path(config.output) / f'seed_{seed}'
    whole = home.all_steps - (len(home.targets) - 1) * home.cooldown_steps  # of a run that draws one ticket
    short = round(config.retrain * whole)

    def drawn(name: str, targets: list[float], *changes: str, setup: train.Config = home) -> Cell:
        args = [*arguments(setup, train.Config), f'seed={seed}', f'targets={targets}', *changes]
        return Cell('train', root / name, lambda: args)

    def tuned(name: str, after: Cell, steps: int, *changes: str, suffix: str = '') -> dict[float, Cell]:
        shared = [*arguments(home, Setup), f'seed={seed}', f'rounds={min(1, steps)}', f'round_steps={max(1, steps)}']

        def cell(target: float) -> Cell:
            said = [change.replace('TARGET', f'{target:g}') for change in changes]
            return Cell(
                'finetune', root / name / f'{target:g}', lambda: [*shared, after.path(target, suffix), *said], after
            )

        return {target: cell(target) for target in config.targets}

    def matched(target: float, after: Cell) -> Cell:
        def args() -> list[str]:
            sparsity = 1 - after.living(target) / count_prunable(config.baseline)
            if sparsity <= 0:
                raise ValueError(f'baseline={config.baseline} has fewer weights than the ticket it is compared with')
            model = [f'model={config.baseline}', 'model_args={}', 'search=none', f'targets=[{sparsity}]']
            return [*arguments(home, train.Config), f'seed={seed}', *model, *config.baseline_changes]

        return Cell('train', root / 'magnitude' / f'{target:g}', args, after, builds_on=False)

    halved = [f'rounds={home.rounds // 2}', f'cooldown_steps={home.cooldown_steps // 2}']
    dense, dense_half = drawn('dense', [0.0]), drawn('dense_half', [0.0], *halved)
    joint = {t: drawn(f'joint/{t:g}', [t], 'keep_initial=true') for t in config.targets}
    family = {r: drawn(f'family_{r}', config.targets, f'reactivation={r}') for r in ('none', 'reset', 'regrow')}
    other, other_dense = drawn('other', config.targets, setup=away), drawn('other_dense', [0.0], setup=away)
    at_once = ['prune_from=1.0', 'prune_until=1.0', 'reactivation=none']
    one_shot = drawn('one_shot', config.targets, *at_once)
    threshold = drawn('threshold', config.targets, 'search=threshold', *config.threshold)

    def from_joint(name: str, steps: int, *changes: str, suffix: str = '') -> dict[float, Cell]:
        return {t: tuned(name, joint[t], steps, *changes, suffix=suffix)[t] for t in config.targets}

    def same(cell: Cell) -> dict[float, Cell]:
        return dict.fromkeys(config.targets, cell)

    arms = {
        'joint': joint,
        'two_stage_1x': tuned('two_stage_1x', dense_half, whole // 2, 'sparsity=TARGET'),
        'two_stage_2x': tuned('two_stage_2x', dense, whole, 'sparsity=TARGET'),
        'no_retraining': tuned('no_retraining', dense, 0, 'sparsity=TARGET'),
        'magnitude': {t: matched(t, joint[t]) for t in config.targets},
        'dense': from_joint('dense_arch', whole, 'weights=fresh', 'mask=dense'),
        'random_mask': from_joint('random_mask', whole, 'weights=fresh', 'mask=shuffle'),
        'family': same(family[home.reactivation]),
        'one_shot': same(one_shot),
        **{arm: same(cell) for arm, cell in family.items()},
        'threshold': same(threshold),
        'retrained': from_joint('retrained', short),
        'mask_fresh': from_joint('mask_fresh', whole, 'weights=fresh'),
        'mask_initial': from_joint('mask_initial', whole, suffix='_initial'),
        'moved': tuned('moved', other, whole),
        'moved_short': tuned('moved_short', other, short),
        'moved_dense': tuned('moved_dense', other_dense, whole, 'mask=dense'),
        'moved_random': tuned('moved_random', other, whole, 'weights=fresh', 'mask=shuffle'),
    }
    dense_ones = {arm: {max(config.targets): cells[max(config.targets)]} for arm, cells in arms.items() if arm in DENSE}
    return {(arm, t): cell for arm in config.arms for t, cell in {**arms, **dense_ones}[arm].items()}


def count_prunable(model: str) -> int:
    """Prunable weights of a model of timm."""
    with torch.device('meta'):
        return sum(weight.numel() for weight in prunable(timm.create_model(model)).values())


def measured(arm: str, target: float, seed: int, grid: Mapping[tuple[str, float, int], Cell]) -> dict[str, Any]:
    """What one arm gave at one sparsity with one seed."""
    cell = grid[arm, target, seed]
    row = cell.ticket(target)
    ours = [cell for (name, _, s), last in grid.items() if (name, s) == (arm, seed) for cell in last.chain]
    return {
        'arm': arm,
        'sparsity': 0.0 if arm in DENSE else target,
        'seed': seed,
        'top1': row['top1'],
        'n': int(row['n']),
        'params': int(row['params']),
        'nonzero': round(row['params'] * (1 - row['sparsity_all'])),
        'macs': int(row['macs']),
        'sparse_macs': int(row['sparse_macs']),
        'train_macs': int(cell.train_macs(target)),
        'arm_macs': int(sum(cell.run_macs() for cell in {cell.folder: cell for cell in ours}.values())),
    }


def tables(config: Config, about: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """The results as a page: top-1 and cost of every arm, and the differences that were expected."""
    n, other = results[0]['n'], Path(config.other).stem
    words = {'baseline': config.baseline, 'other': other}
    columns = [0.0, *config.targets] if any(row['sparsity'] == 0 for row in results) else config.targets
    head = ['arm', *(f's{100 * t:g}' for t in columns), 'compute, a ticket', 'all']
    top1, kinds = [], ('train_macs', 'arm_macs')
    first = [statistics.mean(row[kind] for row in results if row['arm'] == results[0]['arm']) for kind in kinds]
    for arm in config.arms:
        rows = [row for row in results if row['arm'] == arm]
        costs = [statistics.mean(row[kind] for row in rows) / of for kind, of in zip(kinds, first, strict=True)]
        cells = [spread([100 * row['top1'] for row in rows if row['sparsity'] == t]) for t in columns]
        top1.append([f'{ARMS[arm].format(**words)} (`{arm}`)', *cells, *(f'{cost:.2f}' for cost in costs)])
    differences = [
        [f'`{ours}` - `{theirs}`', *(spread(differ(results, ours, theirs, t)) for t in columns)]
        for ours, theirs in DIFFERENCES
        if ours in config.arms and theirs in config.arms
    ]
    lines = [
        f'# Comparison: {Path(config.base).stem}',
        '',
        f'Top-1 in percent on {n:,} test images, mean ± standard deviation over {config.seeds} seeds. Compute is that',
        'of all training that led to a ticket, and that led to the tickets of all sparsities together, in MACs,',
        f'against `{results[0]["arm"]}`.',
        '',
        *markdown(head, top1),
        '',
        'Differences in points, seed by seed:',
        '',
        *markdown(head[:-2], differences),
        '',
        f'`{about["command"]}`, commit {about["commit"]}, {about["date"]}, {about["hardware"]}, torch '
        f'{about["versions"]["torch"]}. Every number: [results.json](results.json).',
        '',
    ]
    return '\n'.join(lines)


def differ(results: list[dict[str, Any]], ours: str, theirs: str, target: float) -> list[float]:
    """Points of top-1 between two arms, seed by seed."""
    found = {(row['arm'], row['seed']): 100 * row['top1'] for row in results if row['sparsity'] == target}
    seeds = sorted({seed for _, seed in found})
    both = [seed for seed in seeds if (ours, seed) in found and (theirs, seed) in found]
    return [found[ours, seed] - found[theirs, seed] for seed in both]


def draw(path: Path, arms: list[str], results: list[dict[str, Any]]) -> None:
    """Errors of some arms over sparsity: every seed a dot, a line through the means, and across for a dense one."""
    figure = create_figure(8, 5)
    axis = figure.subplots()
    places = sorted({row['sparsity'] for row in results} - {0.0})
    for index, arm in enumerate(arms):
        found = [[100 - 100 * r['top1'] for r in results if r['arm'] == arm and r['sparsity'] == t] for t in places]
        if arm in DENSE:
            level = statistics.mean(100 - 100 * row['top1'] for row in results if row['arm'] == arm)
            axis.axhline(level, color='#777777', linestyle=':', label=arm)
            continue
        shift = 0.02 * (index - len(arms) / 2)  # beside each other
        axis.plot(range(len(places)), [statistics.mean(values) for values in found], color=f'C{index}', label=arm)
        for place, values in enumerate(found):
            axis.scatter([place + shift] * len(values), values, s=9, color=f'C{index}')
    axis.set_xticks(range(len(places)), [f's{100 * t:g}' for t in places])
    errors = [100 - 100 * row['top1'] for row in results if row['arm'] in arms]
    if max(errors) > 3 * min(errors):
        axis.set_yscale('symlog', linthresh=1)  # zero has a place
        ticks = [0, 0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100]
        axis.set_yticks(ticks, [f'{tick:g}' for tick in ticks])
        axis.set_ylim(0.9 * min(errors), 1.1 * max(errors))
    axis.set(xlabel='sparsity', ylabel='top-1 error (%)')
    axis.grid(axis='y', linewidth=0.3)
    axis.legend()
    figure.savefig(path, dpi=DPI)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f'error: {error}')
