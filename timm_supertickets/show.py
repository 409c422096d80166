"""Show: tickets and models in a terminal, in colour there and as plain lines in a pipe."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .arch import Arch
from .card import SCORES
from .channels import ChannelGroup
from .cost import Cost, model_cost
from .files import dump_safetensors, read_json, read_safetensors
from .pictures import KERNEL_COLORS
from .sparsity.mask import Mask
from .ticket import CONFIG, DENSE, PACKED, Ticket

SHADES = {3: '█', 5: '▓', 7: '░'}
PLAIN = {3: '#', 5: '=', 7: '-'}
EIGHTHS = ' ▏▎▍▌▋▊▉'
# from which total on, how many MACs, their name, digits behind the point
UNITS = ((10**11, 10**9, 'G', 2), (10**8, 10**6, 'M', 2), (0, 10**3, 'k', 1))
# space between columns, length of channel bars, of density bars: the first that fits
LAYOUTS = ((2, 24, 12), (2, 18, 9), (2, 12, 6), (1, 8, 5), (1, 0, 6), (1, 0, 0))
LEAST_WIDTH, PIPE_WIDTH = 80, 1000
FACTS = ('dataset', *SCORES, 'n', 'seed', 'command')


@dataclass(frozen=True)
class Row:
    """A block or a layer in a table.

    Args:
        name: Module path, or what else it is.
        prunable: Weights that the mask may zero.
        alive: How many of them live.
        macs: Multiply-accumulates, dense.
        sparse_macs: With living weights.
        kernels: `{kernel size: hidden channels}`; empty where there are none.
        tokens: Tokens of the attention path.
    """

    name: str
    prunable: int
    alive: int
    macs: int
    sparse_macs: int
    kernels: Mapping[int, int]
    tokens: int = 0


@dataclass(frozen=True)
class Found:
    """A ticket's folder as it is listed: its files are whole, but not verified.

    Args:
        folder: Where.
        sparsity: Dead share of the prunable weights, as its config.json says; None if it does not.
        facts: Its facts.
        size: Bytes of the packed file, or of the dense one if there is no other.
    """

    folder: Path
    sparsity: Any
    facts: Mapping[str, Any]
    size: int


def make_console() -> Console:
    """A console for standard output: as wide as the terminal, but at least 80; wide where lines go elsewhere."""
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace')  # whatever the encoding lacks
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and 'COLUMNS' not in os.environ:
        console.width = PIPE_WIDTH
    console.width = max(console.width, LEAST_WIDTH)
    return console


def clean(value: Any) -> str:
    """A value from a file on one line, without anything that a terminal would obey."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return ''.join(char if char.isprintable() else '?' for char in ' '.join(text.split()))


def read_folder(folder: Path) -> Found:
    """What is listed of a ticket's folder.

    Raises:
        ValueError: The folder is half-written, or a file in it is cut short.
    """
    config = read_json(folder / CONFIG)
    section = config.get('supertickets') if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f'{folder / CONFIG} has no "supertickets" section')
    file = folder / (DENSE if (folder / DENSE).exists() and not (folder / PACKED).exists() else PACKED)
    read_safetensors(file)
    facts = section.get('facts')
    return Found(folder, section.get('sparsity'), facts if isinstance(facts, dict) else {}, file.stat().st_size)


def find_folders(root: Path) -> Iterator[Path]:
    """Folders at or below `root` that hold a ticket, or what is left of one; hidden ones are passed over.

    Raises:
        ValueError: There is no such folder.
    """
    if not root.is_dir():
        raise ValueError(f'{root} is not a folder')
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        if PACKED in files or f'.{PACKED}.tmp' in files or (CONFIG in files and _is_ours(Path(place) / CONFIG)):
            yield Path(place)


def _is_ours(config: Path) -> bool:
    try:
        data = read_json(config)
    except ValueError:
        return False
    return isinstance(data, dict) and 'supertickets' in data


def show_models(console: Console) -> None:
    """The models of this package, with the tags of the weights that timm finds for them."""
    names = [
        name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith(f'{__package__}.')
    ]
    tags: dict[str, list[str]] = {name: [] for name in names}
    for full in timm.list_pretrained():
        name, _, tag = full.partition('.')
        if name in tags:
            tags[name].append(tag)
    table = _table()
    table.add_column('model')
    table.add_column('pretrained weights', overflow='fold')
    for name in names:
        table.add_row(name, ', '.join(tags[name]) or '-')
    _print(console, table)


def show_folders(console: Console, found: Iterable[Found]) -> None:
    """A table of tickets: where, sparsity, score and size."""
    table = _table()
    table.add_column('ticket', overflow='fold')
    for name in ('sparsity', 'score', 'bytes'):
        table.add_column(name, justify='right', no_wrap=True)
    for row in found:
        scores = [f'{row.facts[key]:.4f} {SCORES[key][0]}' for key in SCORES if _is_share(row.facts.get(key))]
        table.add_row(
            clean(str(row.folder)),
            _percent(row.sparsity) if _is_share(row.sparsity) else '-',
            ', '.join(scores) or '-',
            f'{row.size:,}',
        )
    _print(console, table)


def show_ticket(console: Console, ticket: Ticket, name: str, size: int | None) -> None:
    """A ticket on a screen: what it is, what it costs, what it scores, and a row per block or layer.

    Args:
        console: Where to.
        ticket: Which.
        name: What the user calls it.
        size: Bytes of its packed file; None if it was not read from one.
    """
    model: Any = ticket.build().to('meta')  # shapes are enough to count
    input_size = tuple(ticket.pretrained_cfg.get('input_size') or model.pretrained_cfg['input_size'])
    cost = model_cost(model, input_size, ticket.mask)
    console.print(Text.assemble((ticket.architecture, 'bold'), '  ', (clean(name), 'dim')), soft_wrap=True)
    _print(console, _summary(ticket, cost, input_size, size))
    console.print()
    arch = ticket.arch
    rows = _layer_rows(cost, ticket.mask)
    if arch is not None:
        rows = _block_rows(arch, model.channel_groups(), cost, ticket.mask)
    _print(console, _row_table(console, rows))


def _summary(ticket: Ticket, cost: Cost, input_size: Sequence[int], size: int | None) -> Table:
    image = ' x '.join(map(str, input_size))
    packed = _saved_size(ticket) if size is None else size
    dense = len(dump_safetensors(ticket.weights, {'format': 'pt'}))  # as any other model is kept
    lines = [
        ('parameters', f'{cost.params:,}, of them {cost.prunable:,} prunable weights'),
        (
            'sparsity',
            f'{_percent(cost.sparsity)} over prunable weights, {_percent(cost.sparsity_all)} over all of them',
        ),
        ('MACs', f'{cost.macs:,} dense, {cost.sparse_macs:,} sparse, at {image}'),
        ('bytes', f'{packed:,} packed, {dense:,} dense ({dense / packed:.1f} times as many)'),
    ]
    facts = {key: _fact(value) for key, value in ticket.facts.items()}
    score = next((key for key in SCORES if key in facts), None)
    if score and 'n' in facts:
        facts[score] += f' (n = {facts.pop("n")})'
    lines += [(SCORES[key][0] if key in SCORES else key, facts.pop(key)) for key in FACTS if key in facts]
    lines += [(clean(key), value) for key, value in facts.items()]
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style='dim', no_wrap=True)
    grid.add_column(overflow='fold')
    for line in lines:
        grid.add_row(*line)
    return grid


def _saved_size(ticket: Ticket) -> int:
    with TemporaryDirectory() as folder:
        return (ticket.save(Path(folder) / 'ticket') / PACKED).stat().st_size


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ', '.join(f'{clean(key)} {_fact(entry)}' for key, entry in value.items())
    return ', '.join(map(_fact, value)) if isinstance(value, list) else clean(value)


def _block_rows(arch: Arch, groups: Iterable[ChannelGroup], cost: Cost, mask: Mask) -> list[Row]:
    """A row per block of the arch, one for all layers outside of them, and the total."""
    inside: dict[int, list[str]] = {index: [] for index in range(len(arch.blocks))}
    for group in groups:  # the one of a block's channels comes before the one of its tokens
        inside[group.block].append(group.inside)
    rows = []
    for index, prefixes in inside.items():
        name = _place(prefixes[0]) if prefixes else f'block {index}, dropped'
        tokens = arch.tokens[index] if arch.tokens else 0
        rows.append(_row(name, _below(prefixes), cost, mask, dict(arch.blocks[index]), tokens))
    in_blocks = _below([prefix for prefixes in inside.values() for prefix in prefixes])
    others = _row('other layers', lambda name: not in_blocks(name), cost, mask)
    sums = {size: sum(row.kernels.get(size, 0) for row in rows) for size in sorted({*_sizes(rows)})}
    return [*rows, others, _row('total', lambda _: True, cost, mask, sums, sum(arch.tokens))]


def _place(inside: str) -> str:
    """Where a block sits: `stages.1.grow.0.block.` is wrapped there in what stands beside it."""
    parts = inside.removesuffix('.').split('.')
    while parts[-1] in ('block', 'tokens'):
        parts.pop()
    return '.'.join(parts)


def _layer_rows(cost: Cost, mask: Mask) -> list[Row]:
    """A row per layer, and the total."""
    rows = [_row(layer.name, _below([f'{layer.name}.']), cost, mask) for layer in cost.layers]
    return [*rows, _row('total', lambda _: True, cost, mask)]


def _below(prefixes: Iterable[str]) -> Callable[[str], bool]:
    found = tuple(prefixes)
    return lambda name: name.startswith(found)


def _row(
    name: str,
    holds: Callable[[str], bool],
    cost: Cost,
    mask: Mask,
    kernels: Mapping[int, int] | None = None,
    tokens: int = 0,
) -> Row:
    """Sums over the weights whose parameter names `holds`."""
    layers = [layer for layer in cost.layers if holds(f'{layer.name}.weight')]
    masked = [alive for name, alive in mask.items() if holds(name)]
    return Row(
        name,
        sum(alive.numel() for alive in masked),
        sum(int(alive.sum()) for alive in masked),
        sum(layer.macs for layer in layers),
        sum(layer.sparse_macs for layer in layers),
        kernels or {},
        tokens,
    )


def _sizes(rows: Iterable[Row]) -> list[int]:
    return sorted({size for row in rows for size in row.kernels})


def _row_table(console: Console, rows: list[Row]) -> Table:
    """Numbers first; bars are as long as the rest of the width allows."""
    sizes = _sizes(rows)
    count, unit, digits = next(entry[1:] for entry in UNITS if rows[-1].macs >= entry[0])
    columns: dict[str, list[str]] = {'block' if sizes else 'layer': [row.name for row in rows]}
    for size in sizes:
        columns[f'{size}x{size}'] = [f'{row.kernels[size]:,}' if size in row.kernels else '-' for row in rows]
    if any(row.tokens for row in rows):
        columns['tokens'] = [str(row.tokens or '-') for row in rows]
    if not sizes:
        columns['prunable'] = [f'{row.prunable:,}' if row.prunable else '-' for row in rows]
    columns['alive'] = [_percent(row.alive / row.prunable) if row.prunable else '-' for row in rows]
    columns[f'{unit}MACs'] = [f'{row.macs / count:,.{digits}f}' for row in rows]
    columns['sparse'] = [f'{row.sparse_macs / count:,.{digits}f}' for row in rows]

    numbers = sum(max(map(len, [title, *cells])) for title, cells in columns.items())
    for gap, longest, density in LAYOUTS:
        channel = longest if sizes else 0
        gaps = gap * (len(columns) - 1 + (channel > 0) + (density > 0))
        if numbers + gaps + channel + density <= console.width:
            break

    table = _table(gap)
    most = max(sum(row.kernels.values()) for row in rows[:-1])
    drawn: list[list[Text]] = []
    for title, cells in columns.items():
        if title == 'alive' and channel:
            table.add_column(_legend(console, sizes, channel))
            drawn.append([_channel_bar(console, row.kernels, most, channel) for row in rows[:-1]])
        first = not drawn
        table.add_column(title, justify='left' if first else 'right', overflow='fold', no_wrap=not first)
        drawn.append([Text(cell) for cell in cells])
        if title == 'alive' and density:
            table.add_column('')
            drawn.append([_density_bar(console, row, density) for row in rows[:-1]])
    for index, row in enumerate(rows):
        style = 'bold' if row is rows[-1] else '' if row.prunable else 'dim'
        table.add_row(*(cells[index] if index < len(cells) else '' for cells in drawn), style=style)
    return table


def _channel_bar(console: Console, kernels: Mapping[int, int], most: int, width: int) -> Text:
    """The channels of a block, by kernel size, as long as their share of the largest block's."""
    bar, end, channels = Text(), 0, 0
    for size, count in sorted(kernels.items()):
        channels += count
        start, end = end, max(end, round(width * channels / most))
        bar.append(_shade(console, size) * (end - start), KERNEL_COLORS.get(size, ''))
    return bar


def _legend(console: Console, sizes: Iterable[int], width: int) -> Text:
    """What the shades of a channel bar stand for, where there is room."""
    legend = Text(' ').join(Text(f'{_shade(console, size)}{size}', KERNEL_COLORS.get(size, '')) for size in sizes)
    return legend if len(legend) <= width else Text()


def _density_bar(console: Console, row: Row, width: int) -> Text:
    """The living share of a row's weights; eighths of a character show what little is left."""
    if not row.prunable:
        return Text()
    share = row.alive / row.prunable
    if not _is_unicode(console):
        return Text('#' * round(width * share), 'green')
    whole, eighths = divmod(round(8 * width * share), 8)
    return Text('█' * whole + EIGHTHS[eighths].strip(), 'green')


def _shade(console: Console, size: int) -> str:
    return (SHADES if _is_unicode(console) else PLAIN).get(size, '#')


def _is_unicode(console: Console) -> bool:
    return console.encoding.startswith('utf')


def _table(gap: int = 2) -> Table:
    return Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style='bold')


def _print(console: Console, table: Table) -> None:
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        console.out(line.rstrip(), highlight=False)  # tables are padded to their last column's end


def _percent(share: float) -> str:
    return f'{100 * share:.2f} %'


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1
