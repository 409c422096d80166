"""Backbone: a head over the maps of any timm model, which is searched and pruned as the model alone would be."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from timm_supertickets import Arch, Mask
from timm_supertickets.channels import ChannelGroup
from timm_supertickets.cost import Cost
from timm_supertickets.models.stock import inverted_residual_groups
from timm_supertickets.search.shrink import searchable

PREFIX = 'backbone.'


class OnBackbone(nn.Module):
    """A net with a timm model as `backbone`, of which all but the head is used; nothing else is searched or pruned.

    Args:
        backbone: A model that gives maps by `forward_intermediates`. Weights that no map needs are frozen.
        finest: The smallest reduction that is of use.
        heads: Names of the modules that the subclass adds.

    Raises:
        ValueError: The model gives no maps, or none that coarse.
    """

    def __init__(self, backbone: Any, finest: int, heads: tuple[str, ...]) -> None:
        super().__init__()
        info, name = getattr(backbone, 'feature_info', None), type(backbone).__name__
        if not info or not hasattr(backbone, 'forward_intermediates'):
            raise ValueError(f'{name} gives no maps: it has no feature_info or no forward_intermediates')
        self.levels = [index for index, level in enumerate(info) if level['reduction'] >= finest]
        self.channels = [info[index]['num_chs'] for index in self.levels]
        self.reductions = [info[index]['reduction'] for index in self.levels]
        if not self.levels:
            found = ', '.join(f'1/{level["reduction"]}' for level in info)
            raise ValueError(f'{name} has maps at {found} of the input, and the head wants 1/{finest} or coarser')
        self.backbone = backbone
        cfg = dict(getattr(backbone, 'pretrained_cfg', None) or {})
        self.pretrained_cfg = {**cfg, 'first_conv': _prefixed(cfg.get('first_conv')), 'classifier': heads}
        self._freeze_unused_()

    def maps(self, x: Tensor) -> list[Tensor]:
        """The levels, finest first."""
        found: list[Tensor] = self.backbone.forward_intermediates(x, indices=self.levels, intermediates_only=True)
        return found

    def _freeze_unused_(self) -> None:
        """Ask no gradient for what no map needs: processes would wait for it."""
        params, training = list(self.backbone.parameters()), self.backbone.training
        self.backbone.eval()  # or batch norm would see the zeros
        size = self.backbone.pretrained_cfg['input_size']
        total = sum(level.sum() for level in self.maps(params[0].new_zeros(1, *size)))
        for param, grad in zip(params, torch.autograd.grad(total, params, allow_unused=True), strict=True):
            param.requires_grad_(grad is not None)
        self.backbone.train(training)

    @property
    def arch(self) -> Arch:
        """The backbone's; an AttributeError where it has none, as of any other attribute."""
        found: Arch = self.backbone.arch
        return found

    def channel_groups(self) -> tuple[ChannelGroup, ...]:
        """The backbone's, by the names that their tensors have here."""
        backbone = self.backbone
        groups = backbone.channel_groups() if is_searchable(backbone) else inverted_residual_groups(backbone)
        return tuple(_prefixed_group(group) for group in groups)

    def rebuild(self, arch: Arch) -> 'OnBackbone':
        """The same head over another member of the backbone's space."""
        backbone = self.backbone
        small = copy.deepcopy(self, {id(backbone): None})  # but for the backbone
        small.backbone = searchable(backbone).rebuild(arch)
        return small


def is_searchable(net: nn.Module) -> bool:
    """Whether a net, or what it stands on, is a member of a space."""
    return hasattr(net.backbone if isinstance(net, OnBackbone) else net, 'rebuild')


def ticket_part(net: nn.Module, mask: Mapping[str, Tensor]) -> tuple[nn.Module, Mask]:
    """What a ticket is drawn of: the net itself, or its backbone, and the mask by the names of that."""
    if not isinstance(net, OnBackbone):
        return net, Mask(mask)
    inside = {name.removeprefix(PREFIX): alive for name, alive in mask.items() if name.startswith(PREFIX)}
    return net.backbone, Mask(inside)


def searched_macs(net: nn.Module, cost: Cost) -> int:
    """Multiply-accumulates of what a ticket is drawn from; a head is none of the supernet's that a budget is about.

    Args:
        net: The net.
        cost: What it costs.
    """
    return sum(layer.macs for layer in cost.layers if not isinstance(net, OnBackbone) or layer.name.startswith(PREFIX))


def _prefixed(names: Any) -> Any:
    if names is None:
        return None
    return PREFIX + names if isinstance(names, str) else tuple(PREFIX + name for name in names)


def _prefixed_group(group: ChannelGroup) -> ChannelGroup:
    return replace(
        group,
        gate=PREFIX + group.gate,
        shift=PREFIX + group.shift,
        members=tuple(member._replace(name=PREFIX + member.name) for member in group.members),
        inside=PREFIX + group.inside,
        output=_prefixed(group.output),
        shared=_prefixed(group.shared),
    )
