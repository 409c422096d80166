"""Report: what a person sees of a run: progress, summary.csv, the final table, and the folder it all lies in.

What a person would stop a run for is seen here as well: a loss that is no number, a signal.
"""

import csv
import io
import math
import time
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from parts.config import Setup
from parts.program import Stopped, received
from parts.state import newest_checkpoint
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from timm_supertickets.files import write_atomic

COLUMNS = (
    'n', 'sparsity', 'sparsity_all', 'macs', 'sparse_macs', 'params', 'bytes', 'dense_bytes', 'train_macs', 'seconds',
)  # fmt: skip
TRUNK = 'trunk'
SUMMARY = 'summary.csv'
DIVERGED = 1000  # a mean loss, in those of the first round, that no run was seen to come back from
LOOK_EVERY = 10  # steps; a look waits for the device and for all processes
FREE = ('resume', 'output', 'tracker')  # what may change when a run goes on


class Report:
    """What a person sees of a run.

    Args:
        config: The run's configuration.
        metric: What the score is called.
        accelerator: Knows which process is the one that speaks and writes.

    Raises:
        ValueError: The output folder holds something else.
    """

    def __init__(self, config: Setup, metric: str, accelerator: Accelerator) -> None:
        self.config, self.metric, self.accelerator = config, metric, accelerator
        self.output = Path(config.output)
        self.rows: list[dict[str, Any]] = []
        self.started = time.monotonic()
        self._steps = 0
        self._tracking = False
        self._claim_folder()
        self._bar = tqdm(total=config.all_steps, disable=not accelerator.is_main_process, unit='step')

    def _claim_folder(self) -> None:
        refused: list[Exception | None] = [None]
        if self.accelerator.is_main_process:
            try:
                self._take_folder()
            except (ValueError, OSError) as error:
                refused = [error]
        broadcast_object_list(refused)  # or the others would wait, and fail for the missing one
        if refused[0]:
            raise refused[0]

    def _take_folder(self) -> None:
        path = self.output / 'config.yaml'
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f'output {self.output} is not a folder')
        if path.exists():
            theirs, ours = yaml.safe_load(path.read_text(encoding='utf-8')), asdict(self.config)
            theirs = {**defaults(self.config), **theirs}  # a key that is newer than the run had no effect on it
            differ = [key for key in ours if key not in FREE and theirs.get(key) != ours[key]]
            if differ:
                pairs = ', '.join(f'{key} is {theirs.get(key)!r} there, {ours[key]!r} here' for key in differ[:3])
                raise ValueError(f'output {self.output} already holds another run ({pairs}); choose another output=')
            if self.config.resume == 'never':
                raise ValueError(f'output {self.output} already holds this run; resume=auto goes on with it')
        elif self.output.exists() and any(self.output.iterdir()):
            raise ValueError(f'output {self.output} holds something that is not a run; choose another output=')
        else:
            self.output.mkdir(parents=True, exist_ok=True)
            write_atomic(path, self.config.to_yaml().encode())

    def resume(self, rows: list[dict[str, Any]], steps: int) -> None:
        """Go on after so many steps with the rows that were there, save tickets that this folder does not hold."""
        self.rows = [row for row in rows if row['name'] == TRUNK or (self.output / row['name']).exists()]
        self._bar.update(steps)

    def step(self, text: str, loss: Tensor) -> None:
        """One more step.

        Args:
            text: What is under way.
            loss: Anything that is no number once the loss is none, on the device; looked at every few steps.

        Raises:
            ValueError: The loss is no number, or the tracker cannot start.
            Stopped: A signal came, to whichever process.
        """
        self._start_tracker()
        if not self._bar.disable:
            if self._bar.desc != text:
                self._bar.set_description_str(text, refresh=False)
            self._bar.update()
        self._steps += 1
        asked = max(received, default=0)
        if self._steps % LOOK_EVERY == 0:
            mine = torch.stack([loss.detach().float(), loss.new_tensor(asked, dtype=torch.float)])
            seen = self.accelerator.gather(mine[None]).tolist()
            self.finite(sum(one for one, _ in seen), text)
            asked = int(max(number for _, number in seen))
        elif self.accelerator.num_processes > 1:
            return  # all stop at the same step, or the others would wait for this one for ever
        if asked:
            raise Stopped(asked, f'in {text}')

    def finite(self, loss: float, text: str) -> float:
        """The loss, if it is a number.

        Raises:
            ValueError: It is not; the last good checkpoint is named.
        """
        if math.isfinite(loss):
            return loss
        raise ValueError(f'the loss became {loss} in {text} ({self._where_to_go_on()}')

    def sound(self, loss: float, text: str) -> float:
        """The mean loss of a whole stretch of training, if that has not run away.

        Raises:
            ValueError: It is no number, or many times that of the first round; the last good checkpoint is named.
        """
        first = next((row['loss'] for row in self.rows if row['name'] == TRUNK), math.inf)
        if self.finite(loss, text) > DIVERGED * first > 0:
            raise ValueError(
                f'the loss diverged in {text}: {loss:.4g}, and {first:.4g} in the first round ({self._where_to_go_on()}'
            )
        return loss

    def _where_to_go_on(self) -> str:
        kept = newest_checkpoint(self.output)
        good = f'the last good checkpoint is {kept}' if kept else 'there is no checkpoint yet'
        return f'lr={self.config.lr}); {good}'

    def add(self, **row: Any) -> None:
        """Add a row to summary.csv, which is written anew, and to the tracker."""
        self.rows.append({**row, 'seconds': round(time.monotonic() - self.started, 1)})
        shown = {'loss': row['loss'], self.metric: row[self.metric], 'sparsity': row['sparsity']}
        self._bar.set_postfix_str(', '.join(f'{name} {value:.3f}' for name, value in shown.items()))
        if self.accelerator.is_main_process:
            text = io.StringIO()
            writer = csv.DictWriter(text, ('name', 'round', 'step', 'loss', self.metric, *COLUMNS), lineterminator='\n')
            writer.writeheader()
            writer.writerows(self.rows)
            write_atomic(self.output / SUMMARY, text.getvalue().encode())
        self._track(self.rows[-1])

    def _start_tracker(self) -> None:
        """Open the tracker's run before there is anything to lose, past what it was told of steps not made yet.

        Raises:
            ValueError: It cannot start.
        """
        if self._tracking or self.accelerator.log_with == []:
            return
        self._tracking = True
        last = self.rows[-1]['step'] + 1 if self.rows else 0
        own = {'tensorboard': {'purge_step': last}, 'wandb': {'dir': str(self.output)}}
        try:
            self.accelerator.init_trackers('timm_supertickets', init_kwargs=own)
        except Exception as error:  # what trackers make of their settings is up to them
            what = ' '.join(str(error).split())
            raise ValueError(
                f'tracker {self.config.tracker!r} cannot start: {what}; tracker=none goes without'
            ) from error

    def _track(self, row: dict[str, Any]) -> None:
        self._start_tracker()
        scalars = {f'{row["name"]}/{key}': value for key, value in row.items() if key not in ('name', 'step')}
        self.accelerator.log(scalars, step=row['step'])

    def finish(self, title: str) -> None:
        """Print the table of tickets, and how to load them."""
        self._bar.close()
        self.accelerator.end_training()
        if not self.accelerator.is_main_process:
            return
        table = Table(title=title)
        for column in ('ticket', 'sparsity', 'of all', 'MMACs', 'sparse', 'params', 'bytes', 'dense', self.metric, 'n'):
            table.add_column(column, justify='left' if column == 'ticket' else 'right', no_wrap=True)
        for row in self.tickets:
            table.add_row(
                row['name'], f'{row["sparsity"]:.4f}', f'{row["sparsity_all"]:.4f}', f'{row["macs"] / 1e6:.2f}',
                f'{row["sparse_macs"] / 1e6:.2f}', f'{row["params"]:,}', f'{row["bytes"]:,}',
                f'{row["dense_bytes"]:,}', f'{row[self.metric]:.4f}', str(row['n']),
            )  # fmt: skip
        console = Console(width=max(Console().width, 120), soft_wrap=True)
        console.print(table)
        console.print('import timm, timm_supertickets', highlight=False)
        for row in self.tickets:
            path = self.output / row['name']
            console.print(f"timm.create_model('local-dir:{path}', pretrained=True)", highlight=False, markup=False)

    @property
    def tickets(self) -> list[dict[str, Any]]:
        """The rows of tickets."""
        return [row for row in self.rows if row['name'] != TRUNK]


def read_summary(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's summary; what is not there is nan."""
    with open(folder / SUMMARY, encoding='utf-8', newline='') as file:
        lines = list(csv.DictReader(file))
    return [{key: value if key == 'name' else float(value or 'nan') for key, value in row.items()} for row in lines]


def defaults(config: Setup) -> dict[str, Any]:
    """What the keys of a configuration are if nothing is said of them."""
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config)}
