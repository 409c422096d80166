"""Report: what a person sees of a run: progress, summary.csv, the final table, and the folder it all lies in."""

import csv
import io
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from parts.config import Setup
from parts.state import find_checkpoint
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from timm_supertickets.files import write_atomic

COLUMNS = (
    'n', 'sparsity', 'sparsity_all', 'macs', 'sparse_macs', 'params', 'bytes', 'dense_bytes', 'train_macs', 'seconds',
)  # fmt: skip
TRUNK = 'trunk'
SUMMARY = 'summary.csv'


class Report:
    """What a person sees of a run.

    Args:
        config: The run's configuration.
        metric: What the score is called.
        main: Whether this process is the one that speaks and writes.

    Raises:
        ValueError: The output folder holds something else.
    """

    def __init__(self, config: Setup, metric: str, main: bool) -> None:
        self.config, self.metric, self.main = config, metric, main
        self.output = Path(config.output)
        self.rows: list[dict[str, Any]] = []
        self.started = time.monotonic()
        if main:
            self._claim_folder()
        self._bar = tqdm(total=config.all_steps, disable=not main, unit='step')

    def _claim_folder(self) -> None:
        path = self.output / 'config.yaml'
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f'output {self.output} is not a folder')
        if path.exists():
            theirs, ours = yaml.safe_load(path.read_text(encoding='utf-8')), asdict(self.config)
            differ = [key for key in ours if key not in ('resume', 'output') and theirs.get(key) != ours[key]]
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

    def step(self, text: str) -> None:
        """One more step; `text` says what is under way."""
        if not self._bar.disable:
            if self._bar.desc != text:
                self._bar.set_description_str(text, refresh=False)
            self._bar.update()

    def finite(self, loss: float, text: str) -> float:
        """The loss, if it is a number.

        Raises:
            ValueError: It is not; the last good checkpoint is named.
        """
        if math.isfinite(loss):
            return loss
        kept = find_checkpoint('auto', self.output)
        kept = f'the last good checkpoint is {kept}' if kept else 'there is no checkpoint yet'
        raise ValueError(f'the loss became {loss} in {text} (lr={self.config.lr}); {kept}')

    def add(self, **row: Any) -> None:
        """Add a row, and write summary.csv anew."""
        self.rows.append({**row, 'seconds': round(time.monotonic() - self.started, 1)})
        shown = {'loss': row['loss'], self.metric: row[self.metric], 'sparsity': row['sparsity']}
        self._bar.set_postfix_str(', '.join(f'{name} {value:.3f}' for name, value in shown.items()))
        if self.main:
            text = io.StringIO()
            writer = csv.DictWriter(text, ('name', 'round', 'step', 'loss', self.metric, *COLUMNS), lineterminator='\n')
            writer.writeheader()
            writer.writerows(self.rows)
            write_atomic(self.output / SUMMARY, text.getvalue().encode())

    def finish(self, title: str) -> None:
        """Print the table of tickets, and how to load them."""
        self._bar.close()
        if not self.main:
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
