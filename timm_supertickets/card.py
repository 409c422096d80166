"""Card: a ticket's facts and a template -> the model card that travels with it."""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jinja2
import timm
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2.runtime import Undefined
from markupsafe import Markup

from .arch import Arch
from .channels import TOKENS
from .cost import model_cost
from .files import write_atomic
from .pictures import create_figure, draw_density, draw_kernels
from .ticket import DENSE, PACKED, Ticket

CARD = 'README.md'
TEMPLATE = 'TEMPLATE.md'
DATA = 'DATA.yaml'
CLASSIFY, SEGMENT, FEATURES = 'image-classification', 'image-segmentation', 'image-feature-extraction'
TASKS = (CLASSIFY, SEGMENT, FEATURES)

_HUB_NAME = r'[\w.-]+/[\w.-]+'
_HEADER = '# Facts of a released ticket. What the ticket knows of itself is written here by write_released.\n'


@dataclass(frozen=True)
class Kind:
    """What a fact must be.

    Args:
        what: In words, for the error.
        fits: Whether a value is that.
    """

    what: str
    fits: Callable[[Any], bool]


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) is not None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(fits, value))


def _fields(*needed: str, **kinds: Kind) -> Kind:
    """A mapping that has the needed keys, and in which every key that is there has its kind."""
    what = '; '.join(f'{key}: {kind.what}' for key, kind in kinds.items())
    return Kind(
        f'a mapping of {{{what}}}' + (f' with {", ".join(needed)}' if needed else ''),
        lambda value: (
            isinstance(value, Mapping)
            and bool(value)
            and all(key in value for key in needed)
            and all(key in kinds and kinds[key].fits(entry) for key, entry in value.items())
        ),
    )


TEXT = Kind('a text', lambda value: isinstance(value, str) and bool(_line(value)))
TEXTS = Kind('a list of texts', _each(TEXT.fits))
COUNT = Kind('a whole number from 0', _count)
COUNTS = Kind('a list of whole numbers from 0', _each(_count))
SHARE = Kind('a number from 0 to 1', lambda value: _number(value) and 0 <= value <= 1)
URL = Kind('an http(s) address', _matches(r'https?://[^\s<>()|`\\"]+'))
REPO = Kind("'owner/name'", _matches(_HUB_NAME))
FILE = Kind('the name of a png file', _matches(r'[\w.-]+\.png'))
SIZE = Kind('[C, H, W]', lambda value: COUNTS.fits(value) and len(value) == 3)
LAYER = _fields('name', 'density', name=TEXT, density=SHARE)

GIVEN: dict[str, Kind] = {
    'about': TEXT,
    'good_for': TEXTS,
    'limits': TEXTS,
    'license': TEXT,
    'dataset': TEXT,
    'data': _fields(name=TEXT, id=REPO, about=TEXT, source=URL, license=TEXT, license_url=URL, good_for=TEXTS,
                    limits=TEXTS),
    'top1': SHARE,
    'n': COUNT,
    'runs': _fields('seeds', 'mean', 'lowest', 'highest', seeds=COUNTS, mean=SHARE, lowest=SHARE, highest=SHARE,
                    about=TEXT),
    'supernet': TEXT,
    'seed': COUNT,
    'how': TEXT,
    'command': TEXT,
    'hardware': TEXT,
    'versions': Kind('a mapping of names to versions', lambda value: isinstance(value, Mapping) and bool(value)
                     and all(map(TEXT.fits, [*value, *value.values()]))),
    'commit': TEXT,
    'repo_id': REPO,
    'shipped': Kind('true or false', lambda value: isinstance(value, bool)),
}  # fmt: skip
"""Facts that a ticket cannot know of itself; its `facts` may hold them as well."""

DERIVED: dict[str, Kind] = {
    'name': TEXT,
    'architecture': TEXT,
    'task': Kind(f'one of {", ".join(TASKS)}', lambda value: value in TASKS),
    'input_size': SIZE,
    'num_classes': COUNT,
    'label_names': Kind('a list of names', _each(lambda value: isinstance(value, str))),
    'features': _fields('channels', 'reductions', channels=COUNTS, reductions=COUNTS),
    'params': COUNT,
    'prunable': COUNT,
    'dead': COUNT,
    'macs': COUNT,
    'sparse_macs': COUNT,
    'packed_bytes': COUNT,
    'dense_bytes': COUNT,
    'layers': _fields('count', 'sparsest', 'densest', count=COUNT, sparsest=LAYER, densest=LAYER),
    'space': TEXT,
    'kernels': COUNTS,
    'blocks': Kind('a list of blocks', _each(_fields('channels',
        name=TEXT, channels=COUNTS, tokens=COUNT, supernet=COUNT, density=SHARE).fits)),
    'pictures': _fields(kernels=FILE, density=FILE),
}  # fmt: skip
"""Facts that are read off a ticket."""

NEEDED = (
    'name', 'architecture', 'task', 'input_size', 'num_classes', 'params', 'prunable', 'dead', 'macs', 'sparse_macs',
    'packed_bytes', 'dense_bytes',
)  # fmt: skip


def write_card(
    folder: Path, ticket: Ticket, *, repo_id: str | None = None, facts: Mapping[str, Any] | None = None
) -> None:
    """Write README.md and its pictures into a ticket's folder. Without matplotlib the pictures are left out.

    Args:
        folder: Where the ticket is saved.
        ticket: The ticket.
        repo_id: `'owner/name'` that it can be loaded from; None to show how the folder is loaded.
        facts: What the ticket does not know of itself; see `gather_facts`.

    Raises:
        ValueError: A fact that is unknown or of the wrong kind.
    """
    given = {**(facts or {}), **({'repo_id': repo_id} if repo_id else {})}
    name = str(given.get('repo_id') or folder.resolve().name).rpartition('/')[2]
    known = gather_facts(ticket, name, given)
    known |= _draw(folder, '', ticket, known)
    write_atomic(folder / CARD, render(known).encode())


def write_released(path: Path, ticket: Ticket) -> None:
    """Write the card of a released ticket: facts, `<name>.md` and `<name>.<picture>.png` side by side.

    Args:
        path: The facts, `<name>.yaml`. What it says beyond what is read off the ticket is kept.
        ticket: The ticket.

    Raises:
        ValueError: A fact that is unknown or of the wrong kind.
    """
    known = gather_facts(ticket, path.stem, read_facts(path))
    known |= _draw(path.parent, f'{path.stem}.', ticket, known)
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    write_atomic(path.with_suffix('.md'), render(known).encode())
    write_atomic(path, (_HEADER + text).encode())


def read_facts(path: Path) -> dict[str, Any]:
    """Read a YAML file of facts.

    Raises:
        ValueError: It is missing, not YAML, or no mapping.
    """
    try:
        facts = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f'facts {path} cannot be read: {_line(str(error))}') from None
    if not isinstance(facts, dict):
        raise ValueError(f'facts {path} must be a mapping of names to values, got {_line(repr(facts))[:80]}')
    return facts


def gather_facts(ticket: Ticket, name: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All that a card shows, but for its pictures, as plain values.

    What is read off the ticket goes before `given`, and that before the facts that were saved with the ticket.

    Args:
        ticket: The ticket.
        name: What the card calls it.
        given: Facts by the names in `GIVEN`.

    Raises:
        ValueError: A fact that is unknown or of the wrong kind.
    """
    told = {key: value for key, value in ticket.facts.items() if key in GIVEN}
    told = {'license': ticket.pretrained_cfg.get('license'), **told, **(given or {})}
    told = {key: value for key, value in told.items() if key not in DERIVED and value is not None}
    facts = {'name': name, **told, **_derived(ticket, told.get('supernet'))}
    _check(facts)
    return facts


def render(facts: Mapping[str, Any]) -> str:
    """The card, metadata and Markdown; a fact that is not there has no line.

    Of a dataset that hub_cards/DATA.yaml knows, origin, licence and limits are shown as well. Every value is escaped,
    whatever it holds, so that it is text where the template says text.

    Args:
        facts: What `gather_facts` returned, or `write_released` wrote.

    Raises:
        ValueError: A fact that is missing, unknown or of the wrong kind.
    """
    _check(facts)
    shown = dict(facts)
    if 'dataset' in facts:
        shown['data'] = {**_data(facts['dataset']), **facts.get('data', {})}
    metadata = Markup(_metadata(shown).to_yaml())
    return str(ModelCard(_environment().get_template(TEMPLATE).render(**shown, metadata=metadata)))


def _check(facts: Mapping[str, Any]) -> None:
    kinds = {**GIVEN, **DERIVED}
    for key, value in facts.items():
        if key not in kinds:
            raise ValueError(f'card: unknown fact {key!r}; the facts that can be given are: {", ".join(GIVEN)}')
        if not kinds[key].fits(value):
            raise ValueError(f'card: fact {key!r} must be {kinds[key].what}, got {_line(repr(value))[:80]}')
    for key in NEEDED:
        if key not in facts:
            raise ValueError(f'card: the facts lack {key!r}; they need: {", ".join(NEEDED)}')


def _derived(ticket: Ticket, supernet: Any) -> dict[str, Any]:
    model: Any = ticket.build()
    size = ticket.pretrained_cfg.get('input_size') or model.pretrained_cfg['input_size']
    cost = model_cost(model, tuple(size), ticket.mask)
    classes = ticket.pretrained_cfg['num_classes']
    dense = ticket.arch is not None and dict(ticket.arch.shape).get('task') == 'dense'
    densities = {layer: float(alive.float().mean()) for layer, alive in ticket.mask.items()}
    found: dict[str, Any] = {
        'architecture': ticket.architecture,
        'task': SEGMENT if dense else CLASSIFY if classes else FEATURES,
        'input_size': list(size),
        'num_classes': classes,
        'label_names': ticket.pretrained_cfg.get('label_names'),
        'features': _features(ticket),
        'params': cost.params,
        'prunable': cost.prunable,
        'dead': cost.dead,
        'macs': cost.macs,
        'sparse_macs': cost.sparse_macs,
        **_file_sizes(ticket),
    }
    if densities:
        ranked = sorted(densities, key=densities.__getitem__)
        found['layers'] = {
            'count': len(ranked),
            'sparsest': {'name': ranked[0], 'density': round(densities[ranked[0]], 4)},
            'densest': {'name': ranked[-1], 'density': round(densities[ranked[-1]], 4)},
        }
    if ticket.arch is not None:
        found['space'] = ticket.arch.space
        found['kernels'] = sorted({kernel for block in ticket.arch.blocks for kernel, _ in block})
        found['blocks'] = _blocks(ticket, model, model.supernet_arch() if supernet else None)
    return {key: value for key, value in found.items() if value not in (None, [])}


def _blocks(ticket: Ticket, model: Any, supernet: Arch | None) -> list[dict[str, Any]]:
    arch = ticket.arch
    assert arch is not None
    kernels = sorted({kernel for block in arch.blocks for kernel, _ in block})
    groups = model.channel_groups()
    names = {group.block: group.inside.rstrip('.') for group in groups if TOKENS not in dict(group.kernels)}
    rows = []
    for index, block in enumerate(arch.blocks):
        row: dict[str, Any] = {'channels': [dict(block).get(kernel, 0) for kernel in kernels]}
        if arch.tokens:
            row['tokens'] = arch.tokens[index]
        if supernet is not None:
            row['supernet'] = sum(channels for _, channels in supernet.blocks[index])
        if index in names:
            row['name'] = names[index]
        inside = tuple(group.inside for group in groups if group.block == index)
        masks = [alive for name, alive in ticket.mask.items() if inside and name.startswith(inside)]
        if masks:
            alive = sum(int(mask.sum()) for mask in masks)
            row['density'] = round(alive / sum(mask.numel() for mask in masks), 4)
        rows.append(row)
    return rows


def _features(ticket: Ticket) -> dict[str, list[int]] | None:
    """What `features_only=True` gives; None for an architecture that cannot."""
    try:
        model = _meta_model(ticket, features_only=True)
    except Exception:  # which ones can is known by trying alone, and each refuses in its own way
        return None
    return {'channels': list(model.feature_info.channels()), 'reductions': list(model.feature_info.reduction())}


def _meta_model(ticket: Ticket, **kwargs: Any) -> Any:
    """The ticket's model without memory for its weights."""
    with torch.device('meta'):
        return timm.create_model(ticket.architecture, **ticket.model_args, **kwargs)


def _file_sizes(ticket: Ticket) -> dict[str, int]:
    with TemporaryDirectory() as folder:
        saved = ticket.save(Path(folder) / 'ticket', dense=True)
        return {'packed_bytes': (saved / PACKED).stat().st_size, 'dense_bytes': (saved / DENSE).stat().st_size}


def _data(dataset: str) -> dict[str, Any]:
    """What is known of a dataset by its name in a run's configuration."""
    known: dict[str, Any] = read_facts(_hub_cards() / DATA).get(dataset, {})
    name = re.sub(r'^(hfds|hfids)/', '', dataset)
    hub = {'id': name} if name != dataset and REPO.fits(name) else {}
    return {'name': name, **hub, **known}


def _draw(folder: Path, prefix: str, ticket: Ticket, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Draw the card's pictures; returns the fact that names them."""
    try:
        create_figure(1, 1)
    except ValueError as error:
        warnings.warn(f'the card is written without pictures: {error}', stacklevel=3)
        return {}
    drawn = {}
    if ticket.arch is not None:
        drawn['kernels'] = f'{prefix}kernels.png'
        supernet = _meta_model(ticket).supernet_arch() if 'supernet' in facts else None
        draw_kernels(folder / drawn['kernels'], {facts['name']: ticket.arch}, supernet)
    if ticket.mask:
        drawn['density'] = f'{prefix}density.png'
        draw_density(folder / drawn['density'], {facts['name']: ticket.mask})
    return {'pictures': drawn} if drawn else {}


def _metadata(facts: Mapping[str, Any]) -> ModelCardData:
    data = facts.get('data', {})
    results = None
    if 'top1' in facts and 'dataset' in facts:
        results = [
            EvalResult(
                task_type=facts['task'],
                dataset_type=data.get('id') or _line(facts['dataset']),
                dataset_name=_line(data.get('name') or facts['dataset']),
                dataset_args={'n': facts['n']} if 'n' in facts else None,
                metric_type='accuracy',
                metric_name='top-1',
                metric_value=facts['top1'],
            )
        ]
    return ModelCardData(
        library_name='timm',
        pipeline_tag=facts['task'],
        tags=['timm', 'superticket', 'sparsity', *([_line(facts['space'])] if 'space' in facts else [])],
        license=_line(facts['license']) if 'license' in facts else None,
        datasets=[data['id']] if 'id' in data else None,
        metrics=['accuracy'] if results else None,
        model_name=_line(facts['name']) if results else None,
        eval_results=results,
    )


def _hub_cards() -> Path:
    """The folder hub_cards: inside the package where a wheel put it, beside it in a clone."""
    inside = Path(__file__).parent / 'hub_cards'
    return inside if inside.is_dir() else Path(__file__).parents[1] / 'hub_cards'


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_hub_cards()),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_escaped,
    )
    environment.filters |= {
        'code': _code,
        'python': lambda value: Markup(repr(str(value))),
        'file': Markup,  # a fact of kind FILE
        'url': lambda value: Markup(f'<{value}>'),  # a fact of kind URL
        'count': lambda value: f'{value:,}',
        'percent': lambda value: f'{100 * value:.2f} %',
        'share': lambda value: f'{value:.4f}',
    }
    return environment


def _escaped(value: Any) -> Markup:
    """What the template puts into the card: text on one line, in which no character means anything to Markdown."""
    if isinstance(value, Undefined):
        raise ValueError(f'card: {TEMPLATE} shows {value._undefined_name!r}, which the facts lack')
    if isinstance(value, Markup):
        return value
    text = re.sub(r'([\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_]))', r'\\\1', _line(str(value)))
    return Markup(re.sub(r'^([-+=#]|\d+[.)](?=\s|$))', _line_start, text))


def _line_start(found: re.Match[str]) -> str:
    """Takes its meaning from what would begin a list, a heading or a rule."""
    return f'{found[0][:-1]}\\{found[0][-1]}'


def _code(value: Any) -> Markup:
    """A code span: fenced by more backticks than the text has in a row."""
    text = _line(str(value))
    fence = '`' * (1 + max((len(run) for run in re.findall('`+', text)), default=0))
    room = ' ' if '`' in text else ''
    return Markup(f'{fence}{room}{text}{room}{fence}')


def _line(text: str) -> str:
    """The text on one line, without characters that do not print."""
    return ' '.join(''.join(char if char.isprintable() else ' ' for char in text).split())
