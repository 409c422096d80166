"""Ticket: arch + mask + weights + facts; draw it, check it, save it, load it, build it."""

import base64
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from .arch import Arch
from .files import dump_json, dump_safetensors, parse_json, read_json, read_safetensors, write_atomic
from .packing import (
    CFG_KEYS,
    FORMAT_VERSION,
    check_config,
    check_same,
    check_version,
    decode_mask,
    dump_config,
    encode_mask,
    is_packed,
    pack,
    read_config,
    tensor_hash,
    unpack,
)
from .sparsity.mask import Mask

CONFIG = 'config.json'
PACKED = 'ticket.safetensors'
DENSE = 'model.safetensors'

# what timm takes for itself while it makes a model: none of it may come from a file
_RESERVED = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    'features_only', 'feature_cls', 'feature_cfg', 'pruned', 'device', 'dtype',
} - {'kwargs'}  # fmt: skip
# what a member of a space may be made with that changes its function, but not its shapes
_FUNCTION_ARGS = ('act_layer', 'norm_layer', 'global_pool', 'output_stride')
# no number that makes a model is larger; some would cost memory before the model is there to be compared
_MAX_NUMBER = 2**20
_MAX_ERROR = 500


@dataclass(eq=False)  # tensors have no equality that is a bool
class Ticket:
    """What is left of a supernet: an architecture, a mask, weights and facts.

    Args:
        architecture: timm name that builds the model, e.g. `'superticket_mbv2'`.
        model_args: What `create_model` needs besides classes and input channels, e.g. `{'arch': {...}}`.
        pretrained_cfg: timm's description of the weights: input size, mean, std, classes.
        weights: The state_dict, zeros in place.
        mask: `{parameter name: bool tensor}`, True = alive.
        facts: Where it came from and what it scores; plain JSON values.
    """

    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    weights: dict[str, Tensor]
    mask: Mask
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def arch(self) -> Arch | None:
        """The arch; None for a stock timm architecture."""
        return Arch.from_json(self.model_args['arch']) if 'arch' in self.model_args else None

    @property
    def sparsity(self) -> float:
        """Dead share of the prunable weights."""
        return self.mask.sparsity

    @classmethod
    def draw(
        cls,
        model: nn.Module,
        mask: Mapping[str, Tensor],
        *,
        facts: Mapping[str, Any] | None = None,
        data_config: Mapping[str, Any] | None = None,
    ) -> 'Ticket':
        """Take a ticket out of a model; the model stays as it is.

        Args:
            model: A member of a space, or any model made by `timm.create_model`. Unwrapped.
            mask: What lives. Dead weights become zero in the ticket.
            facts: Plain JSON values to keep with it.
            data_config: Entries that override the model's `pretrained_cfg`: `input_size`, `mean`, `std`,
                `label_names`, ...

        Raises:
            ValueError: The mask does not fit the model, or the model has a setting that is no plain JSON value.
        """
        held = Mask({name: alive.detach().cpu().clone() for name, alive in mask.items()})
        held.check(model)
        weights = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in model.state_dict().items()
        }
        names = {param: name for name, param in model.named_parameters()}
        for name, param in model.named_parameters(remove_duplicate=False):  # a shared weight is saved under each name
            if names[param] in held:
                weights[name].masked_fill_(~held[names[param]], 0)
        # tag and description tell of the weights that the model was registered with, not of these
        source = {**getattr(model, 'pretrained_cfg', {}), 'tag': None, 'description': None, **(data_config or {})}
        cfg = {key: source[key] for key in CFG_KEYS if source.get(key) is not None}
        made_with = getattr(model, '_model_args', {})
        _fit_images_(cfg, model, made_with.get('img_size'), data_config or {})
        arch = getattr(model, 'arch', None)
        if isinstance(arch, Arch):
            name, args = f'superticket_{arch.space}', {'arch': arch.to_json(), **_function_args(model)}
        else:
            name = source.get('architecture', '')
            args = {key: made_with[key] for key in made_with if key not in ('num_classes', 'in_chans', *_RESERVED)}
            if not timm.is_model(name):
                raise ValueError(
                    f'{type(model).__name__} was not made by timm.create_model: its architecture is {name!r}'
                )
        ticket = cls(name, _plain(args), _plain(cfg), weights, held, _plain(dict(facts or {})))
        ticket.check()
        return ticket

    def check(self) -> None:
        """Check that the parts agree: the architecture builds, weights and mask fit it, dead weights are zero.

        Raises:
            ValueError: They do not; what differs is named.
        """
        expected = _shapes(self)
        missing = sorted(set(expected) - set(self.weights))
        surplus = sorted(set(self.weights) - set(expected))
        if missing or surplus:
            what = f'lacks {missing[0]!r}' if missing else f'has {surplus[0]!r}, which its architecture has not'
            raise ValueError(f'ticket: weights do not fit the architecture: it {what}')
        for name, shape in expected.items():
            if tuple(self.weights[name].shape) != shape:
                raise ValueError(
                    f'ticket: {name!r} has shape {tuple(self.weights[name].shape)}, the architecture wants {shape}'
                )
        for name, alive in self.mask.items():
            if name not in self.weights:
                raise ValueError(f'ticket: the mask names {name!r}, which the weights lack')
            if alive.dtype != torch.bool or alive.shape != self.weights[name].shape:
                raise ValueError(
                    f'ticket: mask of {name!r} is {alive.dtype} {tuple(alive.shape)}, '
                    f'the weight has shape {tuple(self.weights[name].shape)}'
                )
            if self.weights[name][~alive].any():
                raise ValueError(f'ticket: {name!r} has dead weights that are not zero')

    def build(self, **kwargs: Any) -> nn.Module:
        """The model with these weights, in eval mode.

        Args:
            kwargs: Go to `timm.create_model`: `num_classes`, `in_chans`, `features_only`, ...
        """
        cfg = {**self.pretrained_cfg, 'architecture': self.architecture, 'state_dict': dict(self.weights)}
        model: Any = timm.create_model(
            self.architecture, pretrained=True, pretrained_cfg=cfg, **{**self.model_args, **kwargs}
        )
        model.pretrained_cfg.pop('state_dict', None)
        built: nn.Module = model.eval()
        return built

    def config(self) -> dict[str, Any]:
        """The content of config.json, in timm's format."""
        cfg = dict(self.pretrained_cfg)
        if self.arch is not None:
            cfg['hf_hub_filename'] = PACKED
        return {
            'architecture': self.architecture,
            'num_classes': cfg['num_classes'],
            'model_args': self.model_args,
            'pretrained_cfg': cfg,
            'supertickets': {'format_version': FORMAT_VERSION, 'sparsity': self.sparsity, 'facts': self.facts},
        }

    def save(self, folder: str | Path, *, dense: bool = False) -> Path:
        """Write the ticket's folder: config.json and ticket.safetensors. Every file is written whole or not at all.

        Args:
            folder: Made if need be. A ticket that it holds is replaced.
            dense: Also write model.safetensors, for clients that cannot unpack; timm's `local-dir:` then loads that
                one. Always written for a stock timm architecture.

        Raises:
            ValueError: The parts do not agree, or the folder holds something else.
        """
        self.check()
        folder = Path(folder)
        if folder.exists() and not _holds_ticket(folder):
            raise ValueError(f'{folder} holds something that is not a ticket; choose another folder')
        config = self.config()
        packed = dump_safetensors(pack(self.weights, self.mask, config), self._words())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DENSE).unlink(missing_ok=True)
        write_atomic(folder / PACKED, packed)
        if dense or self.arch is None:
            weights = _zeroed(self.weights, self.mask)
            write_atomic(folder / DENSE, dump_safetensors(weights, self._dense_words(weights)))
        write_atomic(folder / CONFIG, dump_json(config))
        return folder

    def _words(self) -> dict[str, str]:
        """The header of a packed file: nothing that its tensors do not say."""
        return {'format': 'pt', 'format_version': str(FORMAT_VERSION), 'sparsity': repr(self.sparsity)}

    def _dense_words(self, weights: Mapping[str, Tensor]) -> dict[str, str]:
        """The header of a dense file, where no further tensor may be: config, mask, and what vouches for all of it."""
        masks = {
            name: '' if torch.equal(alive, weights[name] != 0) else base64.b64encode(encode_mask(alive)).decode()
            for name, alive in self.mask.items()
        }
        hashes = {name: tensor_hash(name, weight).hex() for name, weight in weights.items()}
        words = {
            **self._words(),
            'config': dump_config(self.config()).decode(),
            'mask': json.dumps(masks, separators=(',', ':'), sort_keys=True),
            'sha256': json.dumps(hashes, separators=(',', ':'), sort_keys=True),
        }
        return {**words, 'metadata': json.dumps(_hashed(words), separators=(',', ':'))}

    @classmethod
    def load(cls, path: str | Path) -> 'Ticket':
        """Read a ticket and verify every byte.

        Args:
            path: A ticket's folder, or one of its safetensors files, or the name of a model that has pretrained
                weights here, as `superticket_mbv2_s50`. In a folder the packed file is read, the dense one if there
                is no other, and config.json must say the same as the file.

        Raises:
            ValueError: Something is missing, truncated, altered, of a newer format, or does not fit together.
        """
        path = locate(path)
        file, outside = path, None
        where = str(path / CONFIG)
        if path.is_dir():
            file = path / (DENSE if (path / DENSE).exists() and not (path / PACKED).exists() else PACKED)
        try:
            if path.is_dir():
                outside = check_config(read_json(path / CONFIG), where)
            return cls._verified(*read_safetensors(file), outside, where)
        except ValueError as error:
            text = ' '.join(str(error).split())
            text = text if len(text) <= _MAX_ERROR else f'{text[:_MAX_ERROR]}...'
            raise ValueError(text if text.startswith(str(path)) else f'{file}: {text}') from None

    @classmethod
    def _verified(
        cls, tensors: dict[str, Tensor], words: dict[str, str], outside: dict[str, Any] | None, where: str
    ) -> 'Ticket':
        """A ticket from the tensors and the header of a file, and the config.json beside it, if there is one."""
        if is_packed(tensors):
            check_version(tensors)
            weights, mask = unpack(tensors)
            config = read_config(tensors)
        else:
            config, weights, mask = _from_dense(tensors, words)
        if outside is not None:
            check_same(config, outside, where)
        cfg = {key: value for key, value in config['pretrained_cfg'].items() if key != 'hf_hub_filename'}
        section = config['supertickets']
        ticket = cls(config['architecture'], config['model_args'], cfg, weights, Mask(mask), section['facts'])
        ticket.check()
        check_same({'sparsity': ticket.sparsity}, {'sparsity': section.get('sparsity')}, where)
        expected = ticket._words()
        check_same(expected, words if is_packed(tensors) else {key: words.get(key) for key in expected}, 'header')
        return ticket


def _fit_images_(cfg: dict[str, Any], model: nn.Module, img_size: Any, given: Mapping[str, Any]) -> None:
    """Let timm's description of the weights say of images and classes what is true of the model, in place.

    Args:
        cfg: The description.
        model: The model.
        img_size: That it was made for, if it was made for one.
        given: What stays as it is, but for numbers of channels and classes.
    """
    classes = cfg['num_classes'] = getattr(model, 'num_classes', cfg.get('num_classes'))
    if 'label_names' not in given and len(cfg.get('label_names', ())) != classes:
        cfg.pop('label_names', None)
    if 'input_size' in cfg:
        chans, *size = cfg['input_size']
        if img_size is not None and 'input_size' not in given:
            size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
        chans = getattr(model, 'in_chans', chans)
        cfg['input_size'] = (chans, *size)
        for key in {'mean', 'std'} & cfg.keys() - given.keys():
            if len(cfg[key]) != chans:  # as timm's weights for other channels are: all alike
                cfg[key] = (sum(cfg[key]) / len(cfg[key]),) * chans


def _function_args(model: Any) -> dict[str, Any]:
    """The settings of a member of a space that change its function, where they are not those of a new one."""
    settings, pool = dict(model._settings), model.global_pool.pool_type
    if pool or not model.num_classes:  # what scores pixels has classes and no pooling, whatever it is made with
        settings['global_pool'] = pool
    new = {key: known.default for key, known in inspect.signature(type(model).__init__).parameters.items()}
    # as they are written: a partial that was copied with its model equals none
    return {key: settings[key] for key in _FUNCTION_ARGS if key in settings and repr(settings[key]) != repr(new[key])}


def locate(name: str | Path) -> Path:
    """Where a ticket lies.

    Args:
        name: A path, which is given back, or the name of a model that has pretrained weights in this package.

    Raises:
        ValueError: It is neither.
    """
    path = Path(name)
    if path.exists():
        return path
    try:
        cfg = timm.get_pretrained_cfg(str(name))
    except RuntimeError:  # of no such tag
        cfg = None
    file = Path(cfg.file) if cfg is not None and cfg.file else path
    if file.name != PACKED or not file.exists():
        names = ', '.join(timm.list_models('superticket*', pretrained=True))
        raise ValueError(f'{name} does not exist; a ticket is a folder with {CONFIG} and {PACKED}, or one of: {names}')
    return file.parent


def verify_ticket(path: str | Path) -> Ticket:
    """Check every byte of a ticket: all files in its folder, and that they hold the same ticket.

    Args:
        path: A ticket's folder, one of its safetensors files, or a name as for `load_ticket`.

    Raises:
        ValueError: Something is missing, altered, or does not fit together; file and tensor are named.
    """
    path = locate(path)
    ticket = Ticket.load(path)
    if (path / PACKED).exists() and (path / DENSE).exists():
        twin = Ticket.load(path / DENSE)
        try:
            check_same(ticket.config(), twin.config(), 'its config')
            for name in sorted(ticket.weights):
                same_mask = name not in ticket.mask or torch.equal(ticket.mask[name], twin.mask[name])
                if not same_mask or tensor_hash(name, ticket.weights[name]) != tensor_hash(name, twin.weights[name]):
                    raise ValueError(f'tensor {name!r} is not that of {PACKED}')
        except ValueError as error:
            raise ValueError(f'{path / DENSE}: {error}') from None
    return ticket


def _shapes(ticket: Ticket) -> dict[str, tuple[int, ...]]:
    """The shapes of the state_dict that the architecture asks for, without allocating it."""
    if not timm.is_model(ticket.architecture):
        raise ValueError(f'ticket: {ticket.architecture!r} is not an architecture that timm knows')
    reserved = sorted(_RESERVED & set(ticket.model_args))
    if reserved:
        raise ValueError(f'ticket: model_args must not set {", ".join(reserved)}')
    _check_numbers(ticket.model_args)
    _check_numbers(ticket.pretrained_cfg)
    try:
        with torch.device('meta'), _at_most(len(ticket.weights)):
            cfg = {**ticket.pretrained_cfg, 'architecture': ticket.architecture}
            model = timm.create_model(ticket.architecture, pretrained_cfg=cfg, **ticket.model_args)
    except Exception as error:  # what a model makes of bad arguments is up to the model
        said = ' '.join(f'{type(error).__name__}: {error}'.split())
        raise ValueError(f'ticket: {ticket.architecture} cannot be built: {said}') from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_numbers(value: Any) -> None:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            _check_numbers(part)
    elif isinstance(value, (int, float)) and not abs(value) <= _MAX_NUMBER:
        raise ValueError(f'ticket: no model is made with a number as large as {value}')


@contextmanager
def _at_most(tensors: int) -> Iterator[None]:
    """While a model is built: refuse one with many more modules and parameters than a file has tensors."""
    left = 8 * tensors + 1000

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f'it has many more layers than the {tensors} tensors are for')

    hooks = register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _holds_ticket(folder: Path) -> bool:
    """Whether a folder is empty, holds a ticket, or what is left of one whose saving was cut short."""
    if not folder.is_dir():
        return False
    if (folder / CONFIG).exists():
        config = read_json(folder / CONFIG)
        return isinstance(config, dict) and 'supertickets' in config
    names = {path.name.removeprefix('.').removesuffix('.tmp') for path in folder.iterdir()}
    return names <= {CONFIG, PACKED, DENSE}


def _from_dense(
    tensors: Mapping[str, Tensor], words: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Verify a dense file by its header; config, weights and mask."""
    said = {}
    for key in ('config', 'mask', 'sha256', 'metadata'):
        if key not in words:
            raise ValueError(f'it is not that of a ticket: its header has no {key!r}')
        said[key] = parse_json(words[key].encode(), f'header entry {key!r}')
        if not isinstance(said[key], dict):
            raise ValueError(f'header entry {key!r} is not a mapping')
    config, hashes = check_config(said['config'], "header entry 'config'"), said['sha256']
    check_same(said['metadata'], _hashed(words), 'header')
    for name in sorted({*hashes, *tensors}):
        if name not in hashes or name not in tensors:
            raise ValueError(f'tensor {name!r} was added or removed')
        if tensor_hash(name, tensors[name]).hex() != hashes[name]:
            raise ValueError(f'tensor {name!r} is not what was saved')
    mask = {}
    for name, bits in said['mask'].items():
        if name not in tensors:
            raise ValueError(f'the mask names {name!r}, which the weights lack')
        mask[name] = decode_mask(base64.b64decode(str(bits)), name, tensors[name].shape) if bits else tensors[name] != 0
    return config, dict(tensors), mask


def _hashed(words: Mapping[str, str]) -> dict[str, str]:
    """The sha256 of every entry of a header but the one that holds them."""
    return {key: hashlib.sha256(said.encode()).hexdigest() for key, said in sorted(words.items()) if key != 'metadata'}


def _zeroed(weights: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights whose dead ones are plain zeros: -0 is zero too, but other bytes."""
    return {name: weight.masked_fill(~mask[name], 0) if name in mask else weight for name, weight in weights.items()}


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON would give it back, so that a ticket equals itself after a round trip."""
    plain: dict[str, Any] = {}
    for key, said in value.items():
        try:
            plain |= json.loads(json.dumps({key: said}, allow_nan=False, ensure_ascii=False).encode())
        except (TypeError, ValueError, RecursionError) as error:
            hint = "; timm takes layers by name too, as 'silu'" if isinstance(said, type) else ''
            raise ValueError(f'ticket: facts and settings must be plain JSON values: {key!r}: {error}{hint}') from None
    return plain


load_ticket = Ticket.load
