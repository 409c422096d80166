"""Release tickets with the package: halve their values, score them again, write their cards and the index of all.

python recipes/release.py runs=[output/mbv2_fmnist_64] [references=[output/mobilenetv2_100_fmnist]] hardware='...'
"""

import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from evaluate import score
from parts.config import Config as TrainConfig
from parts.config import parse
from parts.pictures import draw_rounds
from parts.report import read_summary
from train import called, create_accelerator

from timm_supertickets import Ticket, load_ticket
from timm_supertickets.card import read_facts, write_released
from timm_supertickets.cost import model_cost
from timm_supertickets.files import write_atomic
from timm_supertickets.models.build import TICKETS
from timm_supertickets.pictures import DPI, create_figure
from timm_supertickets.ticket import CONFIG, PACKED

CARDS = Path(__file__).parents[1] / 'hub_cards'
REFERENCES = 'REFERENCES.yaml'
INDEX = 'README.md'
PICTURE = 'index.png'
ROUNDS = 'rounds.png'


@dataclass
class Config:
    """What is released.

    Args:
        runs: Folders of train.py whose tickets are released, for their images' tag.
        references: Folders of train.py whose tickets are listed beside them, and not shipped.
        tag: timm's tag of the weights.
        hardware: What the runs ran on.
        commit: The code that they ran.
    """

    runs: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    tag: str = 'st_fmnist'
    hardware: str = ''
    commit: str = ''


def main(argv: list[str]) -> None:
    """Every ticket of every run, the references, and the index."""
    config = parse(argv, Config, '', 'release.py')
    commit = config.commit or git('rev-parse', '--short', 'HEAD')
    said = {'commit': commit, **({'hardware': config.hardware} if config.hardware else {})}
    accelerator = None
    for run in map(Path, config.runs):
        setup = parse(['--config', str(run / 'config.yaml')], TrainConfig)
        accelerator = accelerator or create_accelerator(setup)
        for folder in tickets(run):
            release(f'{folder.name}.{config.tag}', load_ticket(folder), setup, said, accelerator)
        draw_rounds(CARDS / f'{run.name}.{ROUNDS}', read_summary(run), 'top1')
    known = read_rows(CARDS / REFERENCES)
    for run in map(Path, config.references):
        for folder in tickets(run):
            ticket = load_ticket(folder)
            name = f'{ticket.architecture}.{config.tag}'
            known[name] = {**row_of(ticket), 'command': ticket.facts['command'], **said}
    if known:
        write_atomic(CARDS / REFERENCES, yaml.safe_dump(known, sort_keys=True, width=120).encode())
    write_index(CARDS)


def tickets(run: Path) -> list[Path]:
    """The folders of a run's tickets."""
    found = sorted(path.parent for path in run.glob(f'*/{CONFIG}') if not path.parent.name.endswith('_initial'))
    if not found:
        raise ValueError(f'{run} holds no ticket; it should be the output of a finished run of train.py')
    return found


def release(name: str, ticket: Ticket, setup: TrainConfig, said: dict[str, Any], accelerator: Accelerator) -> None:
    """Ship one ticket: its values halved, its score measured again with those, its card."""
    before, _ = score(ticket, setup, accelerator)
    ticket = halved(ticket)
    after, n = score(ticket, setup, accelerator)
    ticket.facts |= {'top1': after, 'n': n, 'supernet': called(setup)}
    folder = ticket.save(TICKETS / name)
    facts = CARDS / f'{name}.yaml'
    known = read_facts(facts) if facts.exists() else {}
    told = {key: value for key, value in known.items() if key not in ticket.facts}  # by a person
    write_atomic(facts, yaml.safe_dump({**told, **said, 'shipped': True}, sort_keys=False).encode())
    write_released(facts, ticket)
    print(f'{name}: top-1 {before:.4f}, with halved values {after:.4f}, {(folder / PACKED).stat().st_size:,} bytes')


def halved(ticket: Ticket) -> Ticket:
    """A ticket with its floats in half precision; what reads it gets what it was built for."""
    weights = {name: t.half() if t.is_floating_point() else t for name, t in ticket.weights.items()}
    return replace(ticket, weights=weights, facts=dict(ticket.facts))


def row_of(ticket: Ticket) -> dict[str, Any]:
    """What the index says of a ticket."""
    cost = model_cost(ticket.build(), tuple(ticket.pretrained_cfg['input_size']), ticket.mask)
    return {
        'top1': ticket.facts['top1'],
        'n': ticket.facts['n'],
        'params': cost.params,
        'dead': cost.dead,
        'macs': cost.macs,
        'sparse_macs': cost.sparse_macs,
    }


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """A file of rows by name; none if it is not there."""
    return read_facts(path) if path.exists() else {}


def write_index(folder: Path) -> None:
    """The index of a folder of cards: a table, and a picture of accuracy over cost."""
    cards = {path.stem: read_facts(path) for path in sorted(folder.glob('superticket_*.yaml'))}
    references = read_rows(folder / REFERENCES)
    rounds = [path.name for path in sorted(folder.glob(f'*.{ROUNDS}'))]
    write_atomic(folder / INDEX, index(cards, references, rounds).encode())
    draw_index(folder / PICTURE, cards, references)


def index(cards: dict[str, dict[str, Any]], dense: dict[str, dict[str, Any]], rounds: list[str]) -> str:
    """The table of all cards, dataset by dataset, and of the dense references; and how the runs went."""
    lines = [
        '# Released tickets',
        '',
        '| ticket | top-1 (%) | test images | living parameters | parameters | MACs, living | MACs | bytes |',
        '| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for name, facts in {**cards, **dense}.items():
        shown = f'[`{name}`]({name}.md)' if name in cards else f'timm `{name}`, dense'
        size = f'{facts["packed_bytes"]:,}' if 'packed_bytes' in facts else ''
        numbers = (facts['params'] - facts['dead'], facts['params'], facts['sparse_macs'], facts['macs'])
        cells = [f'{100 * facts["top1"]:.2f}', f'{facts["n"]:,}', *(f'{number:,}' for number in numbers), size]
        lines.append(f'| {" | ".join([shown, *cells])} |')
    lines += [
        '',
        'Multiply-accumulates (MACs) are those of one image; living ones are those of weights that are not zero. Every',
        'card says by which command, on which hardware and from which commit its ticket was drawn.',
        '',
        f'![Accuracy over living parameters and over living multiply-accumulates]({PICTURE})',
        '',
    ]
    if dense:
        lines += ['Commands of the dense references, trained by the same recipe:', '']
        lines += [
            f'- `{name}`: `{row["command"]}`, {row["hardware"]}, commit {row["commit"]}' for name, row in dense.items()
        ]
        lines += ['']
    for picture in rounds:
        run = picture.removesuffix(f'.{ROUNDS}')
        lines += [f'The run `{run}`, round by round:', '', f'![Score and cost of {run} over its steps]({picture})', '']
    return '\n'.join(lines)


def draw_index(path: Path, cards: dict[str, dict[str, Any]], references: dict[str, dict[str, Any]]) -> None:
    """Top-1 over living parameters and over living MACs, for the images that the references were trained on."""
    tags = {name.rpartition('.')[2] for name in references}
    shown = {name: facts for name, facts in cards.items() if not tags or name.rpartition('.')[2] in tags}
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure = create_figure(9, 4)
    for axis, number, label in zip(
        figure.subplots(1, 2, sharey=True),
        (lambda facts: facts['params'] - facts['dead'], lambda facts: facts['sparse_macs']),
        ('living parameters', 'living multiply-accumulates'),
        strict=True,
    ):
        for marker, rows in (('o', shown), ('s', references)):
            for name, facts in rows.items():
                axis.plot(number(facts), 100 * facts['top1'], marker, linestyle='', label=name.partition('.')[0])
        axis.set(xscale='log', xlabel=label)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=''))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(linewidth=0.3)
    figure.axes[0].set(ylabel='top-1 (%)')
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside right upper', fontsize=8)
    figure.savefig(path, dpi=DPI)


def git(*args: str) -> str:
    """What git says of this clone."""
    return subprocess.run(['git', *args], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f'error: {error}')
