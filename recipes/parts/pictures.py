"""Pictures of a run: accuracy and MACs over rounds, which kernels survived where, density per layer."""

from pathlib import Path
from typing import Any

from parts.report import TRUNK

from timm_supertickets import Arch, load_ticket
from timm_supertickets.pictures import DPI, create_figure, draw_density, draw_kernels


def draw_pictures(output: Path, rows: list[dict[str, Any]], supernet: Arch | None, metric: str) -> None:
    """Write rounds.png, kernels.png and density.png into a run's folder.

    Args:
        output: The run's folder, which holds its tickets.
        rows: The run's summary.
        supernet: What the search started from; None if there is nothing to search.
        metric: What the score is called.
    """
    names = [row['name'] for row in rows if row['name'] != TRUNK]
    tickets = {name: load_ticket(output / name) for name in names}
    draw_rounds(output / 'rounds.png', rows, metric)
    archs = {name: ticket.arch for name, ticket in tickets.items() if ticket.arch is not None}
    if supernet is not None and archs:
        draw_kernels(output / 'kernels.png', archs, supernet)
    draw_density(output / 'density.png', {name: ticket.mask for name, ticket in tickets.items()})


def draw_rounds(path: Path, rows: list[dict[str, Any]], metric: str) -> None:
    """Score and MACs of the trunk over its steps, with the tickets where they were drawn."""
    trunk = [row for row in rows if row['name'] == TRUNK]
    figure = create_figure(7, 6)
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot([r['step'] for r in trunk], [r[metric] for r in trunk], '.-', color='#777777', label='trunk')
    for row in rows:
        if row['name'] != TRUNK:
            top.plot(row['step'], row[metric], '*', markersize=12, label=f'{row["name"]}: {row[metric]:.4f}')
    top.set(ylabel=metric, title='Score: the trunk after each event, and the tickets drawn from it')
    top.legend(loc='lower right')
    for key, label in (('macs', 'dense MACs'), ('sparse_macs', 'sparse MACs')):
        bottom.plot([r['step'] for r in trunk], [r[key] / 1e6 for r in trunk], '.-', label=label)
    bottom.set(xlabel='step of the trunk', ylabel='million MACs', yscale='log', title='Cost of the trunk')
    bottom.legend()
    figure.savefig(path, dpi=DPI)
