"""Cells: runs of the recipes, each in a folder and a process of its own, that a comparison is made of."""

import datetime
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import timm
import torch
from parts.config import Setup
from parts.program import keep_freed_memory
from parts.report import TRUNK, read_summary

import timm_supertickets
from timm_supertickets.files import dump_json, read_json, write_atomic


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        recipe: Which one, by its module's name.
        folder: Its output.
        args: Its `key=value`, once `after` has run.
        after: What must have run before.
        builds_on: Whether what `after` cost in training counts for this one too.
    """

    recipe: str
    folder: Path
    args: Callable[[], list[str]]
    after: 'Cell | None' = None
    builds_on: bool = True

    @property
    def marker(self) -> Path:
        """A file that says that nothing is left to do."""
        return self.folder / 'finished'

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Its summary."""
        return read_summary(self.folder)

    def ticket(self, target: float) -> dict[str, Any]:
        """The row of its ticket of a sparsity."""
        tickets = [row for row in self.rows if row['name'] != TRUNK]
        return min(tickets, key=lambda row: abs(row['sparsity'] - target))

    def living(self, target: float) -> int:
        """How many prunable weights live in that ticket."""
        row = self.ticket(target)
        dead = row['sparsity_all'] * row['params']
        return round(dead / row['sparsity'] - dead) if dead else 0

    def path(self, target: float, suffix: str = '') -> str:
        """`key=value` that starts another recipe from that ticket."""
        return f'ticket={self.folder / self.ticket(target)["name"]}{suffix}'

    def train_macs(self, target: float) -> float:
        """Multiply-accumulates of all training that led to that ticket."""
        return float(sum(cell.ticket(target)['train_macs'] for cell in self.chain))

    @property
    def chain(self) -> list['Cell']:
        """The runs that it builds on, and then itself."""
        return [*(self.after.chain if self.after and self.builds_on else []), self]

    def run_macs(self) -> float:
        """Multiply-accumulates of this run: its trunk, and every branch from where it left the trunk."""
        trunk = {row['round']: row['train_macs'] for row in self.rows if row['name'] == TRUNK}
        branches = [row['train_macs'] - trunk.get(row['round'], 0.0) for row in self.rows if row['name'] != TRUNK]
        return float(max(trunk.values(), default=0.0) + sum(branches))


def claim(config: Any, free: tuple[str, ...]) -> None:
    """Take the folder of the runs for one comparison.

    Args:
        config: What is compared, a dataclass with an `output`.
        free: What may differ when a comparison goes on: which cells there are is no part of any of them.

    Raises:
        ValueError: The folder holds the runs of another one.
    """
    path = Path(config.output) / 'compare.json'
    ours = {key: value for key, value in asdict(config).items() if key not in (*free, 'output', 'results', 'jobs')}
    theirs = read_json(path) if path.exists() else ours
    for key, value in ours.items():
        if isinstance(value, dict):  # what one of them names alone is no part of the other
            ours[key], theirs[key] = {**theirs.get(key, {}), **value}, {**value, **theirs.get(key, {})}
    differ = [key for key in ours if theirs.get(key) != ours[key]]
    if differ:
        pairs = ', '.join(f'{key} is {theirs.get(key)!r} there, {ours[key]!r} here' for key in differ)
        raise ValueError(
            f'output {config.output} holds the runs of another comparison ({pairs}); choose another output='
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, dump_json(ours))


def arguments(setup: Setup, kind: type[Setup]) -> list[str]:
    """The settings of a configuration that another recipe shares, as `key=value`."""
    names = {one.name for one in fields(kind)} - {'seed', 'output', 'resume', 'threads', 'targets'}
    said = {name: value for name, value in asdict(setup).items() if name in names}
    return [f'{name}={value if isinstance(value, str) else json.dumps(value)}' for name, value in said.items()]


def run_cells(cells: list[Cell], jobs: int) -> None:
    """Run cells, several at a time, each in a process of its own; what it prints is in a file beside its folder.

    Raises:
        ValueError: A run failed; the last line of what it printed is quoted.
    """
    waiting, running = list(cells), {}
    server = multiprocessing.get_context('forkserver')  # a fork of this process could not train if this one has
    server.set_forkserver_preload(['timm_supertickets', 'accelerate', 'datasets'])
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                process = server.Process(target=run_cell, args=(cell.recipe, cell.args(), cell.folder))
                process.start()
                running[process.sentinel] = (process, cell)
            for sentinel in wait(list(running)):
                process, cell = running.pop(int(sentinel))
                process.join()
                if process.exitcode:
                    said = log_of(cell.folder).read_text(encoding='utf-8').splitlines() or ['it was killed']
                    raise ValueError(f'{cell.folder}: {said[-1]}')
                cell.marker.touch()
                print(f'{cell.folder} is done; {len(waiting) + len(running)} runs to go', flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()


def run_cell(recipe: str, args: list[str], folder: Path) -> None:
    """Run one cell, in a process of its own."""
    keep_freed_memory()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(log_of(folder), 'w', encoding='utf-8') as log, redirect_stdout(log), redirect_stderr(log):
        try:
            import_module(recipe).main([*args, 'threads=1', f'output={folder}'])
        except Exception as error:
            if not isinstance(error, ValueError):
                traceback.print_exc()
            print(f'error: {error}')
            sys.exit(1)


def log_of(folder: Path) -> Path:
    """Where a run's prints go."""
    return folder.with_name(f'{folder.name}.log')


def where_and_when() -> dict[str, Any]:
    """Hardware, versions, commit and date."""
    git = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, check=False)
    cpu = f'{os.cpu_count()} cores, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}'
    return {
        'hardware': torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        'versions': {module.__name__: module.__version__ for module in (timm_supertickets, torch, timm)},
        'commit': git.stdout.strip() or 'unknown',
        'date': datetime.date.today().isoformat(),
    }


def write_results(folder: Path, about: dict[str, Any], config: Any, results: list[dict[str, Any]], page: str) -> None:
    """Write every number as results.json, and the page that shows them as README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / 'results.json', dump_json({**about, 'config': asdict(config), 'results': results}))
    write_atomic(folder / 'README.md', page.encode())


def spread(values: list[float]) -> str:
    """Mean and standard deviation, to two digits."""
    if not values:
        return ''
    return f'{statistics.mean(values):.2f}' + (f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else '')


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    lines = [head, ['---'] + ['---:'] * (len(head) - 1), *rows]
    return [f'| {" | ".join(line)} |' for line in lines]
