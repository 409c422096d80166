"""Cost: parameters, multiply-accumulates and bytes, dense and sparse, exactly and per layer."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .channels import ChannelGroup

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerCost:
    """What one convolution or linear layer costs for one input.

    Args:
        name: Module path.
        weights: Elements of its weight.
        alive: How many of them live.
        positions: Output positions at which every weight is used once.
    """

    name: str
    weights: int
    alive: int
    positions: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates, dense."""
        return self.positions * self.weights

    @property
    def sparse_macs(self) -> int:
        """Multiply-accumulates with living weights."""
        return self.positions * self.alive


@dataclass(frozen=True)
class Cost:
    """What a model costs. MACs are of convolutions and linear layers, for one input.

    Args:
        layers: Per layer.
        params: Parameters, everything counted.
        dead: Dead weights.
        prunable: Weights that the mask may zero.
        dense_bytes: Size of the state_dict, zeros in place.
        packed_bytes: The same with living weights and a bit per prunable weight instead; both without file headers.
    """

    layers: tuple[LayerCost, ...]
    params: int
    dead: int
    prunable: int
    dense_bytes: int
    packed_bytes: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates, dense."""
        return sum(layer.macs for layer in self.layers)

    @property
    def sparse_macs(self) -> int:
        """Multiply-accumulates with living weights."""
        return sum(layer.sparse_macs for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Dead share of the prunable weights."""
        return self.dead / self.prunable if self.prunable else 0.0

    @property
    def sparsity_all(self) -> float:
        """Dead share of all parameters."""
        return self.dead / self.params if self.params else 0.0


def model_cost(model: nn.Module, input_size: tuple[int, int, int], mask: Mapping[str, Tensor] | None = None) -> Cost:
    """Measure a model by one forward pass of zeros in eval mode.

    Args:
        model: Any module that takes `(1, C, H, W)`.
        input_size: `(C, H, W)`.
        mask: `{parameter name: bool tensor}`, True = alive; weights without an entry all live.

    Returns:
        The cost; agrees with torch's flop counter (at two flops per MAC) on convolutions and linear layers.
    """
    mask = mask or {}
    layers = []
    for name, module, positions in _positions(model, input_size):
        weights = cast(Tensor, module.weight).numel()
        alive = mask.get(f'{name}.weight')
        layers.append(LayerCost(name, weights, weights if alive is None else int(alive.sum()), positions))
    total = sum(alive.numel() for alive in mask.values())
    tensors = model.state_dict()
    dense = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    saved = sum(
        (alive.numel() - int(alive.sum())) * tensors[name].element_size() - -(-alive.numel() // 8)
        for name, alive in mask.items()
    )
    return Cost(
        layers=tuple(layers),
        params=sum(param.numel() for param in model.parameters()),
        dead=total - sum(int(alive.sum()) for alive in mask.values()),
        prunable=total,
        dense_bytes=dense,
        packed_bytes=dense - saved,
    )


def channel_macs(groups: Iterable[ChannelGroup], cost: Cost) -> dict[str, Tensor]:
    """Multiply-accumulates that each searchable channel costs.

    Args:
        groups: The model's channel groups.
        cost: What the model costs.

    Returns:
        Per gate a float64 tensor over its channels. Channels that die save exactly this, since a block's cost is
        linear in its hidden channels; the last token saves what encodes the map for the tokens as well.
    """
    macs = {f'{layer.name}.weight': layer.macs for layer in cost.layers}
    found = {}
    for group in groups:
        per_channel = torch.zeros(group.channels, dtype=torch.float64)
        for name, _, start, stop in group.members:
            per_channel[start:stop] += macs.get(name, 0) / (stop - start)
        per_channel += sum(macs.get(name, 0) for name in group.shared) / group.channels
        found[group.gate] = per_channel
    return found


def _positions(model: nn.Module, input_size: tuple[int, int, int]) -> Iterator[tuple[str, nn.Module, int]]:
    """Every convolution and linear layer that runs, with the output positions it was used at."""
    seen: dict[str, int] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (*CONVS, nn.Linear))}

    def count(name: str, module: nn.Module, output: Tensor) -> None:
        channels = output.size(1) if isinstance(module, CONVS) else output.size(-1)
        seen[name] = seen.get(name, 0) + output.numel() // channels

    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: count(name, module, output))
        for name, module in layers.items()
    ]
    param = next(model.parameters())
    try:
        with _evaluating(model), torch.no_grad():
            model(torch.zeros(1, *input_size, device=param.device, dtype=param.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    for name, positions in seen.items():
        yield name, layers[name], positions


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards every module's own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
