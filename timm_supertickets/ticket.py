"""Ticket: arch + mask + weights + facts; draw it, check it, save it, load it, build it."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .arch import Arch
from .files import dump_json, dump_safetensors, read_json, read_safetensors, write_atomic
from .packing import ARCH, DIGEST, arch_tensor, is_packed, pack, tensor_hash, unpack
from .sparsity.mask import Mask

FORMAT_VERSION = 1
CONFIG = 'config.json'
PACKED = 'ticket.safetensors'
DENSE = 'model.safetensors'

# what create_model takes for itself: none of it may come from a file
_RESERVED = {*inspect.signature(timm.create_model).parameters} | {'features_only', 'feature_cls', 'feature_cfg'}
# what a member of a space may be made with that changes its function, but not its shapes
_FUNCTION_ARGS = ('act_layer', 'norm_layer', 'global_pool', 'output_stride')
_CFG_KEYS = (
    'tag', 'input_size', 'fixed_input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std', 'num_classes',
    'label_names', 'pool_size', 'first_conv', 'classifier', 'license', 'description',
)  # fmt: skip


@dataclass
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
            ValueError: The mask does not fit the model.
        """
        held = Mask({name: alive.detach().cpu().clone() for name, alive in mask.items()})
        held.check(model)
        weights = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in model.state_dict().items()
        }
        for name, alive in held.items():
            weights[name].masked_fill_(~alive, 0)
        source = {**getattr(model, 'pretrained_cfg', {}), **(data_config or {})}
        cfg = {key: source[key] for key in _CFG_KEYS if source.get(key) is not None}
        cfg['num_classes'] = getattr(model, 'num_classes', cfg.get('num_classes'))
        if 'input_size' in cfg:
            cfg['input_size'] = (getattr(model, 'in_chans', cfg['input_size'][0]), *cfg['input_size'][1:])
        arch = getattr(model, 'arch', None)
        made_with = getattr(model, '_model_args', {})
        if isinstance(arch, Arch):
            name, args = f'superticket_{arch.space}', {'arch': arch.to_json()}
            args |= {key: made_with[key] for key in _FUNCTION_ARGS if key in made_with}
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
        extra = {} if self.arch is None else {ARCH: arch_tensor(self.arch)}
        packed = pack({**self.weights, **extra}, self.mask)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DENSE).unlink(missing_ok=True)
        write_atomic(folder / PACKED, dump_safetensors(packed, self._metadata(config, packed)))
        if dense or self.arch is None:
            write_atomic(folder / DENSE, dump_safetensors(self.weights, self._metadata(config, self.weights)))
        write_atomic(folder / CONFIG, dump_json(config))
        return folder

    def _metadata(self, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
        hashes = {name: tensor_hash(name, tensor).hex() for name, tensor in tensors.items() if name != DIGEST}
        return {
            'format': 'pt',
            'format_version': str(FORMAT_VERSION),
            'sparsity': repr(self.sparsity),
            'alive': json.dumps({name: int(alive.sum()) for name, alive in sorted(self.mask.items())}),
            'sha256': json.dumps(hashes, sort_keys=True),
            'config': json.dumps(config),
        }

    @classmethod
    def load(cls, path: str | Path) -> 'Ticket':
        """Read a ticket and verify every tensor.

        Args:
            path: A ticket's folder, or one of its safetensors files. In a folder the packed file is read, the dense
                one if there is no other; a dense file has no mask of its own, so the weights that are zero count
                as dead where its header says that there are dead ones.

        Raises:
            ValueError: Something is missing, truncated, altered, of a newer format, or does not fit together.
        """
        path = Path(path)
        if not path.exists():
            raise ValueError(f'{path} does not exist; a ticket is a folder with {CONFIG} and {PACKED}')
        file = path
        if path.is_dir():
            file = path / (DENSE if (path / DENSE).exists() and not (path / PACKED).exists() else PACKED)
            config = read_json(path / CONFIG)
            tensors, metadata = read_safetensors(file)
        else:
            tensors, metadata = read_safetensors(file)
            config = _parsed(metadata, 'config', file)
        section = config.get('supertickets') if isinstance(config, dict) else None
        if not isinstance(section, dict):
            raise ValueError(f'{path} is not a ticket: {CONFIG} has no "supertickets" section')
        version = section.get('format_version')
        if not isinstance(version, int) or version < 1:
            raise ValueError(f'{path}: format_version must be a whole number, got {version!r}')
        if version > FORMAT_VERSION:
            raise ValueError(
                f'{path} has format version {version}; this package reads up to {FORMAT_VERSION}: upgrade it'
            )
        for key, kind in (('architecture', str), ('model_args', dict), ('pretrained_cfg', dict)):
            if not isinstance(config.get(key), kind):
                raise ValueError(f'{path}: {CONFIG} must have {key!r} as a {kind.__name__}, got {config.get(key)!r}')
        header = _parsed(metadata, 'config', file) if 'config' in metadata else config
        for key in ('architecture', 'model_args'):
            if config[key] != header.get(key):
                raise ValueError(f'{path}: {key!r} in {CONFIG} is not what {file.name} was saved for')
        cfg = {key: value for key, value in config['pretrained_cfg'].items() if key != 'hf_hub_filename'}
        unknown = sorted(set(cfg) - set(_CFG_KEYS))
        if unknown:
            raise ValueError(f'{path}: pretrained_cfg in {CONFIG} must not set {", ".join(unknown)}')
        facts = section.get('facts', {})
        if not isinstance(facts, dict):
            raise ValueError(f'{path}: facts in {CONFIG} must be a dict, got {facts!r}')
        ticket = cls(config['architecture'], config['model_args'], cfg, {}, Mask(), facts)
        try:
            if is_packed(tensors):
                weights, mask = unpack(tensors, _shapes(ticket), ticket.arch)
            else:
                weights, mask = tensors, _zero_pattern(tensors, metadata, file)
            ticket.weights, ticket.mask = weights, Mask(mask)
            ticket.check()
        except ValueError as error:
            raise ValueError(f'{file}: {error}') from None
        return ticket


def _shapes(ticket: Ticket) -> dict[str, tuple[int, ...]]:
    """The shapes of the state_dict that the architecture asks for, without allocating it."""
    if not timm.is_model(ticket.architecture):
        raise ValueError(f'ticket: {ticket.architecture!r} is not an architecture that timm knows')
    reserved = sorted(_RESERVED & set(ticket.model_args))
    if reserved:
        raise ValueError(f'ticket: model_args must not set {", ".join(reserved)}')
    try:
        with torch.device('meta'):
            cfg = {**ticket.pretrained_cfg, 'architecture': ticket.architecture}
            model = timm.create_model(ticket.architecture, pretrained_cfg=cfg, **ticket.model_args)
    except Exception as error:  # what a model makes of bad arguments is up to the model
        raise ValueError(f'ticket: {ticket.architecture} cannot be built: {error}') from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _holds_ticket(folder: Path) -> bool:
    """Whether a folder is empty, holds a ticket, or what is left of one whose saving was cut short."""
    if not folder.is_dir():
        return False
    if (folder / CONFIG).exists():
        config = read_json(folder / CONFIG)
        return isinstance(config, dict) and 'supertickets' in config
    names = {path.name.removeprefix('.').removesuffix('.tmp') for path in folder.iterdir()}
    return names <= {CONFIG, PACKED, DENSE}


def _zero_pattern(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: Path) -> dict[str, Tensor]:
    """Verify a dense file by its header, and read the mask off the zeros of the tensors that it names as masked."""
    hashes = _parsed(metadata, 'sha256', file)
    names = set(hashes) ^ set(tensors)
    if names:
        raise ValueError(f'tensor {min(names)!r} was added or removed')
    for name, tensor in tensors.items():
        if tensor_hash(name, tensor).hex() != hashes[name]:
            raise ValueError(f'tensor {name!r} is not what was saved')
    return {name: tensors[name] != 0 for name in _parsed(metadata, 'alive', file) if name in tensors}


def _parsed(metadata: Mapping[str, str], key: str, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(metadata[key])
    except (KeyError, json.JSONDecodeError):
        raise ValueError(f'{file} is not a ticket: its header has no readable {key!r}') from None
    if not isinstance(value, dict):
        raise ValueError(f'{file}: header entry {key!r} is not a mapping')
    return value


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON would give it back, so that a ticket equals itself after a round trip."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(f'ticket: facts and settings must be plain JSON values: {error}') from None
    return plain


load_ticket = Ticket.load
