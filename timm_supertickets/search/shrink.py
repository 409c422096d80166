"""Shrink: build the smaller net that computes what the gated one does."""

from collections.abc import Sequence
from typing import Protocol, TypeVar, cast

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arch import Arch
from ..channels import ChannelGroup, Keep, check_keep, take


class Searchable(Protocol):
    """What a model of a space offers beyond timm's interface."""

    arch: Arch

    def channel_groups(self) -> tuple[ChannelGroup, ...]:
        """The groups of coupled channels."""

    def rebuild(self, arch: Arch) -> nn.Module:
        """A net of another member with the same settings."""


ModelT = TypeVar('ModelT', bound=nn.Module)


def searchable(model: nn.Module) -> Searchable:
    """The model, typed as one that can be searched.

    Raises:
        ValueError: It is not of a space.
    """
    if not (hasattr(model, 'channel_groups') and hasattr(model, 'rebuild') and hasattr(model, 'arch')):
        raise ValueError(f'{type(model).__name__} cannot be searched; supernets are named supernet_*')
    return cast(Searchable, model)


@torch.no_grad()
def gate_(model: nn.Module, keep: Keep) -> None:
    """Silence the dying channels in place: scale and shift zero, and those of a whole block that goes.

    The gated net computes what the shrunk one will.
    """
    groups = searchable(model).channel_groups()
    check_keep(groups, keep)
    params = dict(model.named_parameters())
    for group in groups:
        if group.gate in keep:
            dying = ~keep[group.gate].to(params[group.gate].device)
            for name in (group.gate, group.shift):
                params[name][dying] = 0
            if dying.all():
                for name in group.output:
                    params[name].zero_()


@torch.no_grad()
def shrink(model: ModelT, keep: Keep) -> ModelT:
    """A new net without the dying channels, with the weights and buffers of those that live on.

    Modes, frozen parameters, dtypes and the settings of batch norms are kept, synchronised ones stay so.

    Args:
        model: A member of a space; left as it is.
        keep: Keep plan.

    Returns:
        The smaller net. To rounding it computes what the model does once gated (`gate_`).

    Raises:
        ValueError: The plan does not fit the model, or the model has batch norms of another kind than its space.
    """
    space = searchable(model)
    groups = space.channel_groups()
    check_keep(groups, keep)
    small = space.rebuild(space.arch.shrunk(groups, keep))
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        small = convert_sync_batchnorm(small)
    layers = dict(model.named_modules())
    for name, module in small.named_modules():
        before = layers[name]
        module.training = before.training
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            if type(module) is not type(before):
                kinds = f'{type(before).__name__}, where its space has {type(module).__name__}'
                raise ValueError(f'{name} is {kinds}; change it after shrinking')
            module.eps, module.momentum = before.eps, before.momentum
    weights = take(model.state_dict(), groups, keep)
    for name, tensor in small.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(weights[name].dtype)  # norms may be kept in another one
    small.load_state_dict(weights, strict=True)
    trained = {name: param.requires_grad for name, param in model.named_parameters()}
    for name, param in small.named_parameters():
        param.requires_grad_(trained[name])
    return cast(ModelT, small)


@torch.no_grad()
def shrink_optimizer_(
    optimizer: Optimizer, model: nn.Module, small: nn.Module, groups: Sequence[ChannelGroup], keep: Keep
) -> None:
    """Move an optimizer from a model to its shrunk successor, in place: momentum and every other state survive.

    Args:
        optimizer: Trains parameters of `model`; afterwards their successors in `small`, in the same groups.
        model: The model before.
        small: What `shrink` made of it.
        groups: The channel groups of `model`.
        keep: The keep plan.

    Raises:
        ValueError: The optimizer has a parameter that is not the model's, or state of a layout that cannot be thinned.
    """
    optimizer = getattr(optimizer, '_base_optimizer', optimizer)  # timm's Lookahead keeps all state there
    names = {id(param): name for name, param in model.named_parameters()}
    new = dict(small.named_parameters())
    state: dict[Tensor, dict[str, object]] = {}
    kept: list[list[str]] = []
    for group in optimizer.param_groups:
        for param in group['params']:
            if id(param) not in names:
                raise ValueError(
                    f'the optimizer trains a parameter of shape {tuple(param.shape)} that the model has not'
                )
            name = names[id(param)]
            if name in new and param in optimizer.state:
                state[new[name]] = _taken_state(name, param, optimizer.state[param], groups, keep)
        kept.append([names[id(param)] for param in group['params'] if names[id(param)] in new])
    for group, left in zip(optimizer.param_groups, kept, strict=True):
        group['params'] = [new[name] for name in left]
        if 'param_names' in group:
            group['param_names'] = left
    optimizer.state.clear()
    optimizer.state.update(state)


def _taken_state(
    name: str, param: Tensor, state: dict[str, object], groups: Sequence[ChannelGroup], keep: Keep
) -> dict[str, object]:
    taken: dict[str, object] = {}
    for key, value in state.items():
        if isinstance(value, list | tuple | dict) and value:
            raise ValueError(f'optimizer state {key!r} of {name!r} is a {type(value).__name__}, cannot be thinned')
        if isinstance(value, Tensor) and value.ndim > 0 and value.numel() > 1:
            fits = value.ndim == param.ndim and all(v in (1, p) for v, p in zip(value.shape, param.shape, strict=True))
            if not fits:
                raise ValueError(
                    f'optimizer state {key!r} of {name!r} has shape {tuple(value.shape)}, cannot be thinned'
                )
            value = take({name: value}, groups, keep)[name]
        taken[key] = value.clone() if isinstance(value, Tensor) else value
    return taken
