"""Pictures: which kernels and channels a ticket has in every block, and how dense every layer is."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from .arch import Arch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KERNEL_COLORS = {3: '#4477aa', 5: '#ccbb44', 7: '#aa3377'}
DPI = 120
ROOM = 0.16  # inches that a block or layer takes at least


def create_figure(width: float, height: float) -> 'Figure':
    """An empty figure that belongs to nobody else: pyplot, its windows and its state are not touched.

    Args:
        width: In inches.
        height: In inches.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            'pictures need matplotlib, which is not installed: pip install "timm_supertickets[card]"'
        ) from None
    return Figure(figsize=(width, height), layout='constrained')


def draw_kernels(path: Path, archs: Mapping[str, Arch], supernet: Arch | None = None) -> None:
    """Hidden channels per block and kernel size.

    Args:
        path: The png file.
        archs: By the name that each is labelled with; all of one supernet.
        supernet: What they were drawn from, shown as an outline.
    """
    blocks = max(len(arch.blocks) for arch in archs.values())
    figure = create_figure(max(9, ROOM * blocks), 0.6 + 2.2 * len(archs))
    axes = figure.subplots(len(archs), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, arch) in zip(axes, archs.items(), strict=True):
        places = range(len(arch.blocks))
        bottoms = [0] * len(arch.blocks)
        if supernet is not None:
            whole = [sum(channels for _, channels in block) for block in supernet.blocks]
            axis.bar(places, whole, fill=False, edgecolor='#999999', label='supernet')
        for kernel, color in KERNEL_COLORS.items():
            heights = [dict(block).get(kernel, 0) for block in arch.blocks]
            axis.bar(places, heights, bottom=bottoms, color=color, label=f'{kernel}x{kernel}')
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        axis.set(ylabel='hidden channels', xlim=(-1, blocks))
        axis.set_title(name, parse_math=False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper')
    axes[-1].set_xlabel('block')
    axes[-1].set_xticks(range(blocks), range(blocks), fontsize=10 if blocks <= 30 else 6)
    figure.savefig(path, dpi=DPI)


def draw_density(path: Path, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Living share of every layer's weights.

    Args:
        path: The png file.
        masks: By the name that each is labelled with.
    """
    layers = list(dict.fromkeys(name for mask in masks.values() for name in mask))
    figure = create_figure(max(9, ROOM * len(layers)), 4.5)
    axis = figure.subplots()
    for name, mask in masks.items():
        there = [index for index, layer in enumerate(layers) if layer in mask]
        axis.plot(there, [mask[layers[i]].float().mean().item() for i in there], '.-', linewidth=0.7, label=name)
    axis.set(ylabel='density', ylim=(0, 1), xlim=(-1, len(layers)), title='Living share of the weights, per layer')
    axis.set_xticks(range(len(layers)), [layer.removesuffix('.weight') for layer in layers], rotation=90, fontsize=6)
    axis.grid(axis='y', linewidth=0.3)
    if len(masks) > 1:
        axis.legend()
    figure.savefig(path, dpi=DPI)
