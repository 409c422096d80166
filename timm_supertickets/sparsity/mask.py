"""Mask: which weights live, by parameter name, kept outside the model."""

import logging
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from timm.layers import CondConv2d, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
# these re-standardise their weight in forward, or mix it from those of many experts: a zero does not stay one
REMADE = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, CondConv2d)

_logger = logging.getLogger(__name__)


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """The weights that a mask may zero: every convolution and linear weight in the body.

    Left out are the stem and the classifiers, as the model's `pretrained_cfg` names them, and layers whose weight is
    made anew in forward, which would fill the zeros again: re-standardised ones (`StdConv2d`, `ScaledStdConv2d`),
    weight norm and other parametrizations. A line in the log names those, once per model. Embeddings, norms, scales
    and transposed convolutions are none of the body's weights, nor are parameters that lie in no layer of their own.
    A weight that several layers share counts once, by the name that `named_parameters` gives it; one that is shared
    with anything left out does not count.

    Args:
        model: A timm model, or any module (then nothing counts as stem or classifier).

    Returns:
        `{parameter name: parameter}` in the model's order.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    ends: list[str] = []
    for key in ('first_conv', 'classifier'):
        names = cfg.get(key) or ()
        ends += [names] if isinstance(names, str) else list(names)
    body: set[Tensor | None] = set()
    spared: set[Tensor | None] = set()
    remade = []
    for name, module in model.named_modules():
        weight = module._parameters.get('weight')
        at_end = any(name == end or name.startswith(f'{end}.') for end in ends)
        makes_it = isinstance(module, REMADE) or (isinstance(module, WEIGHTED) and weight is None)
        if makes_it and not at_end:
            remade.append(name)
        (body if isinstance(module, WEIGHTED) and not makes_it and not at_end else spared).add(weight)
    if remade:
        more = f' and {len(remade) - 3} more' if len(remade) > 3 else ''
        _warn_once(
            f'{cfg.get("architecture") or type(model).__name__}: layers that make their weight anew in forward are '
            f'not pruned: {", ".join(remade[:3])}{more}'
        )
    return {name: param for name, param in model.named_parameters() if param in body and param not in spared}


@cache
def _warn_once(text: str) -> None:
    """To the log and not as a warning: such a model is no mistake, and every prune asks what is prunable."""
    _logger.warning(text)


class Mask(dict[str, Tensor]):
    """`{parameter name: bool tensor}`, True = alive. Tensors have their parameters' shapes.

    Keep them on their parameters' devices: a mask from elsewhere is copied at every use.
    """

    @classmethod
    def dense(cls, params: Mapping[str, Tensor]) -> 'Mask':
        """Everything alive. `params` is what may be masked, e.g. `prunable(model)`."""
        return cls({name: torch.ones_like(param, dtype=torch.bool) for name, param in params.items()})

    @classmethod
    def from_zeros(cls, model: nn.Module) -> 'Mask':
        """The zero pattern of a model's weights, wherever they are: a ticket keeps its mask inside any wrapper.

        Taken are parameters of two or more dimensions that have zeros but are not all zero; the latter is how
        layers are initialised that start silent.
        """
        found = {}
        for name, param in model.named_parameters():
            alive = param.detach() != 0
            if param.ndim > 1 and not alive.all() and alive.any():
                found[name] = alive
        return cls(found)

    @property
    def total(self) -> int:
        """Number of prunable weights."""
        return sum(alive.numel() for alive in self.values())

    @property
    def alive(self) -> int:
        """Number of living weights."""
        return sum(int(alive.sum()) for alive in self.values())

    @property
    def sparsity(self) -> float:
        """Dead share of the prunable weights."""
        return 1 - self.alive / self.total if self.total else 0.0

    def shuffled(self, generator: torch.Generator) -> 'Mask':
        """As many living weights in every tensor, in random places of the channels that live: what a mask must beat.

        A channel with no weight alive in a tensor, out or in, has none there afterwards.

        Args:
            generator: On the CPU; decides the places.
        """
        shuffled = Mask()
        for name, alive in self.items():
            channels = [alive.unsqueeze(-1).transpose(0, dim).flatten(1).any(1) for dim in range(min(2, alive.dim()))]
            open_ = torch.ones_like(alive)
            for dim, lives in enumerate(channels):
                open_.transpose(0, dim)[~lives] = False
            order = torch.randperm(int(open_.sum()), generator=generator).to(alive.device)
            shuffled[name] = open_.masked_scatter(open_, alive[open_][order])
        return shuffled

    def check(self, model: nn.Module) -> None:
        """Check that the mask fits a model.

        Raises:
            ValueError: A name that is not there, another shape, or a tensor that is not of bools.
        """
        for name, param in self._params(model).items():
            alive = self[name]
            if alive.dtype != torch.bool:
                raise ValueError(f'mask of {name!r} must be torch.bool, got {alive.dtype}')
            if alive.shape != param.shape:
                raise ValueError(f'mask of {name!r} has shape {tuple(alive.shape)}, the parameter {tuple(param.shape)}')

    def _params(self, model: nn.Module) -> dict[str, Tensor]:
        """The masked parameters of a model, in the mask's order."""
        params = dict(model.named_parameters())
        for name in self:
            if name not in params:
                near = ', '.join(list(prunable(model))[:3])
                raise ValueError(f'mask names {name!r}, which {type(model).__name__} has not; it has {near}, ...')
        return {name: params[name] for name in self}

    @torch.no_grad()
    def zero_weights_(self, model: nn.Module) -> None:
        """Zero the dead weights, in place. In a loop: after the optimizer's step.

        Args:
            model: The model itself, not a compiled or distributed wrapper, which gives its parameters other names.

        Raises:
            ValueError: It lacks a parameter that the mask names.
        """
        _zero_([(param.data, self[name]) for name, param in self._params(model).items()])

    @torch.no_grad()
    def zero_grads_(self, model: nn.Module) -> None:
        """Zero the gradients of dead weights, in place. In a loop: before gradients are clipped.

        Args:
            model: As for `zero_weights_`; a weight without a gradient is left out.

        Raises:
            ValueError: It lacks a parameter that the mask names.
        """
        params = self._params(model).items()
        _zero_([(param.grad, self[name]) for name, param in params if param.grad is not None])


def _zero_(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    if pairs:
        torch._foreach_mul_([tensor for tensor, _ in pairs], [alive.to(tensor.device) for tensor, alive in pairs])
