"""Transfer: tickets drawn on every task, put to work on every task, and the dense nets of the same runs beside them.

python recipes/transfer.py [--config recipes/configs/transfer_scenes.yaml] [key=value ...]

Every cell is a run of train.py or of a task's own recipe, in a folder whose config.yaml repeats it. Run again, it goes
on with what is there.
"""

import math
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import finetune
import train
from parts.cells import Cell, arguments, claim, markdown, run_cells, spread, where_and_when, write_results
from parts.config import CONFIGS, Checked, parse
from parts.task import TASKS

RECIPES = {'classify': 'finetune', 'segment': 'segment', 'keypoints': 'keypoints', 'detect': 'detect'}
KINDS = ('sparse', 'dense')


@dataclass
class Config(Checked):
    """What a table of transfer is made of.

    Args:
        draw: By task, the configuration of train.py that tickets are drawn by, a file in `configs/`.
        use: By task, the configuration that they are fine-tuned by, mask kept, a file in `configs/`.
        changes: What all runs share, as `key=value`.
        drawn: What all runs of train.py share, likewise.
        used: What all other runs share, likewise.
        sparsity: That of the tickets.
        dense: Tasks whose dense nets, searched alike with all weights alive, are drawn and used beside the tickets.
        seeds: So many seeds, from 0.
        jobs: Runs at a time, each on one thread of a CPU.
        output: Folder of the runs.
        results: Folder that results.json and README.md are written to.
    """

    draw: dict[str, str] = field(default_factory=dict)
    use: dict[str, str] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    sparsity: float = 0.8
    dense: list[str] = field(default_factory=lambda: list(RECIPES))
    seeds: int = 3
    jobs: int = 2
    output: str = 'output/transfer_scenes'
    results: str = 'recipes/results/transfer_scenes'

    def __post_init__(self) -> None:
        self.within(1, math.inf, 'seeds', 'jobs')
        self.within(0, 1, 'sparsity', start=False, end=False)
        for name, files in (('draw', self.draw), ('use', self.use)):
            unknown = [task for task in files if task not in RECIPES]
            if unknown or not files:
                raise ValueError(f'{name} must have tasks out of {", ".join(RECIPES)}, got {list(files)}')
        if unknown := [task for task in self.dense if task not in RECIPES]:
            raise ValueError(f'dense: {unknown[0]!r} is unknown; choose from {", ".join(RECIPES)}')


def main(argv: list[str]) -> None:
    """Draw on every task; use everywhere; write what it gave."""
    config = parse(argv, Config, 'transfer_scenes.yaml', 'transfer.py')
    seeds = range(config.seeds)
    draws = {(seed, kind, task): draw(config, seed, kind, task) for seed in seeds for kind in KINDS
             for task in config.draw if kind == 'sparse' or task in config.dense}  # fmt: skip
    uses = {(*key, task): use(config, key, cell, task) for key, cell in draws.items() for task in config.use}
    claim(config, ('seeds', 'dense'))
    for wave in (draws, uses):
        run_cells([cell for cell in wave.values() if not cell.marker.exists()], config.jobs)
    results = [measured(config, key, cell) for key, cell in (*draws.items(), *uses.items())]
    about = {'command': shlex.join(['python', 'recipes/transfer.py', *argv]), **where_and_when()}
    text = tables(config, about, results)
    write_results(Path(config.results), about, config, results, text)
    print(text)


def draw(config: Config, seed: int, kind: str, task: str) -> Cell:
    """A run of train.py that draws one ticket: at the sparsity, or, searched alike, with all weights alive."""
    target = config.sparsity if kind == 'sparse' else 0.0
    setup = parse(['--config', str(CONFIGS / config.draw[task]), *config.changes, *config.drawn], train.Config)
    args = [*arguments(setup, train.Config), f'seed={seed}', f'targets=[{target}]']
    return Cell('train', Path(config.output) / f'seed_{seed}/{kind}/{task}/drawn', lambda: args)


def use(config: Config, key: tuple[int, str, str], drawn: Cell, task: str) -> Cell:
    """A run that puts that ticket, its mask kept, to work on a task."""
    seed, kind, _ = key
    target = config.sparsity if kind == 'sparse' else 0.0

    def args() -> list[str]:
        file, ticket = str(CONFIGS / config.use[task]), drawn.path(target)
        setup = parse(['--config', file, *config.changes, *config.used, ticket], finetune.Config)
        said = [arg for arg in arguments(setup, finetune.Config) if not arg.startswith('ticket=')]
        return [*said, ticket, f'seed={seed}']

    return Cell(RECIPES[task], drawn.folder.parent / f'used_to_{task}', args, drawn)


def measured(config: Config, key: tuple[Any, ...], cell: Cell) -> dict[str, Any]:
    """What one run gave; `used` is None for the ticket as it was drawn."""
    seed, kind, drawn, *used = key
    metric = TASKS[used[0] if used else drawn].metric
    row = cell.ticket(config.sparsity if kind == 'sparse' else 0.0)
    return {
        'drawn': drawn, 'used': used[0] if used else None, 'kind': kind, 'seed': seed, 'metric': metric,
        'score': row[metric], 'n': int(row['n']), 'sparsity': row['sparsity'], 'params': int(row['params']),
        'macs': int(row['macs']), 'sparse_macs': int(row['sparse_macs']), 'train_macs': int(row['train_macs']),
    }  # fmt: skip


def tables(config: Config, about: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """The results as a page: tickets as they were drawn, and where they were used."""

    def points(kind: str, drawn: str, used: str | None) -> list[float]:
        rows = [row for row in results if (row['kind'], row['drawn'], row['used']) == (kind, drawn, used)]
        return [100 * row['score'] for row in sorted(rows, key=lambda row: row['seed'])]

    def less(drawn: str, used: str | None) -> list[float]:
        if drawn not in config.dense:
            return []
        return [a - b for a, b in zip(points('sparse', drawn, used), points('dense', drawn, used), strict=True)]

    name, scores = f's{100 * config.sparsity:g}', {row['used'] or row['drawn']: row for row in results}
    drawn = [
        [f'{task} ({scores[task]["metric"]}, n = {scores[task]["n"]:,})', spread(points('sparse', task, None)),
         spread(points('dense', task, None)), spread(less(task, None))]
        for task in config.draw
    ]  # fmt: skip
    how = {'sparse': 'mask kept', 'dense': 'dense'}
    used = [
        [f'{task}, {how[kind]}', *(spread(points(kind, task, to)) for to in config.use)]
        for task in config.draw
        for kind in KINDS
        if kind == 'sparse' or task in config.dense
    ]
    losses = [-statistics.mean(gap) for task in config.draw for to in (None, *config.use) if (gap := less(task, to))]
    worst = f'The largest mean loss of a ticket against its dense counterpart is {max([0.0, *losses]):.2f} points.'
    lines = [
        f'# Transfer: tickets at {name}',
        '',
        f'Scores in percent on held-out images, mean ± standard deviation over {config.seeds} seeds.',
        '',
        'As they were drawn: search and pruning together, and the same run with all weights alive.',
        '',
        *markdown(['drawn on', name, 'dense', 'difference'], drawn),
        '',
        'Put to work: rows are where a ticket was drawn, columns where it was fine-tuned, under a new head.',
        '',
        *markdown(['drawn on', *(f'used to {task} ({TASKS[task].metric})' for task in config.use)], used),
        '',
        *([worst, ''] if losses else []),
        f'`{about["command"]}`, commit {about["commit"]}, {about["date"]}, {about["hardware"]}, torch '
        f'{about["versions"]["torch"]}. Every number: [results.json](results.json).',
        '',
    ]  # fmt: skip
    return '\n'.join(lines)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f'error: {error}')
