"""Pictures of a run: accuracy and MACs over rounds, which kernels survived where, density per layer."""

from pathlib import Path
from typing import Any

import matplotlib
from report import TRUNK

from timm_supertickets import Arch, load_ticket

matplotlib.use('Agg')
from matplotlib import pyplot as plt

KERNEL_COLORS = {3: '#4477aa', 5: '#ccbb44', 7: '#aa3377'}


def draw_pictures(output: Path, rows: list[dict[str, Any]], supernet: Arch | None) -> None:
    """Write rounds.png, kernels.png and density.png into a run's folder.

    Args:
        output: The run's folder, which holds its tickets.
        rows: The run's summary.
        supernet: What the search started from; None if there is nothing to search.
    """
    names = [row['name'] for row in rows if row['name'] != TRUNK]
    tickets = {name: load_ticket(output / name) for name in names}
    draw_rounds(output / 'rounds.png', rows)
    archs = {name: ticket.arch for name, ticket in tickets.items() if ticket.arch is not None}
    if supernet is not None and archs:
        draw_kernels(output / 'kernels.png', supernet, archs)
    draw_density(output / 'density.png', {name: ticket.mask for name, ticket in tickets.items()})


def draw_rounds(path: Path, rows: list[dict[str, Any]]) -> None:
    """Top-1 and MACs of the trunk over its steps, with the tickets where they were drawn."""
    trunk = [row for row in rows if row['name'] == TRUNK]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout='constrained')
    top.plot([r['step'] for r in trunk], [r['top1'] for r in trunk], '.-', color='#777777', label='trunk')
    for row in rows:
        if row['name'] != TRUNK:
            top.plot(row['step'], row['top1'], '*', markersize=12, label=f'{row["name"]}: {row["top1"]:.4f}')
    top.set(ylabel='top-1', title='Accuracy: the trunk after each event, and the tickets drawn from it')
    top.legend(loc='lower right')
    for key, label in (('macs', 'dense MACs'), ('sparse_macs', 'sparse MACs')):
        bottom.plot([r['step'] for r in trunk], [r[key] / 1e6 for r in trunk], '.-', label=label)
    bottom.set(xlabel='step of the trunk', ylabel='million MACs', yscale='log', title='Cost of the trunk')
    bottom.legend()
    _save(figure, path)


def draw_kernels(path: Path, supernet: Arch, archs: dict[str, Arch]) -> None:
    """Hidden channels per block and kernel size: what the supernet had (outline) and what each ticket kept."""
    figure, axes = plt.subplots(
        len(archs), 1, figsize=(9, 2.4 * len(archs)), sharex=True, layout='constrained', squeeze=False
    )
    places = range(len(supernet.blocks))
    for axis, (name, arch) in zip(axes[:, 0], archs.items(), strict=True):
        bottoms = [0] * len(arch.blocks)
        axis.bar(places, [sum(c for _, c in b) for b in supernet.blocks], fill=False, edgecolor='#bbbbbb')
        for kernel, color in KERNEL_COLORS.items():
            heights = [dict(block).get(kernel, 0) for block in arch.blocks]
            axis.bar(places, heights, bottom=bottoms, color=color, label=f'{kernel}x{kernel}')
            bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
        axis.set(ylabel='hidden channels', title=name)
    axes[0, 0].legend(ncols=3, loc='upper left')
    axes[-1, 0].set(xlabel='block', xticks=list(places))
    _save(figure, path)


def draw_density(path: Path, masks: dict[str, Any]) -> None:
    """Living share of every layer's weights, per ticket."""
    layers = list(dict.fromkeys(name for mask in masks.values() for name in mask))
    figure, axis = plt.subplots(figsize=(max(7, 0.16 * len(layers)), 4.5), layout='constrained')
    for name, mask in masks.items():
        there = [index for index, layer in enumerate(layers) if layer in mask]
        axis.plot(there, [mask[layers[i]].float().mean().item() for i in there], '.-', linewidth=0.7, label=name)
    axis.set(ylabel='density', ylim=(0, 1), title='Living share of the weights, per layer')
    axis.set_xticks(range(len(layers)), [layer.removesuffix('.weight') for layer in layers], rotation=90, fontsize=5)
    axis.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
