"""Importance: a channel's gate, its share of the block by its cost, and the penalty that makes it earn its keep."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..channels import ChannelGroup


@torch.no_grad()
def gate_importance(model: nn.Module, groups: Iterable[ChannelGroup]) -> dict[str, Tensor]:
    """The absolute value of every gate: gate name -> float tensor over the channels."""
    params = dict(model.named_parameters())
    return {group.gate: params[group.gate].abs() for group in groups}


def shares_by_cost(gates: Mapping[str, Tensor], channel_macs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A channel's share of its block, by what the channel costs: its importance where MACs are to be saved.

    The share is the square of its gate by the sum of the squares of the block's gates that are not smaller. The batch
    norm behind a block's sum undoes what scales all of its gates, so gates of two blocks cannot be compared, and shares
    can; the last channel of a block is all of it.

    Args:
        gates: Gate name -> magnitude per channel.
        channel_macs: Gate name -> MACs that each channel costs.

    Returns:
        Gate name -> float64 tensor over the channels, per MAC. Among channels of one cost it orders as the gates.

    Source:
        Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, https://arxiv.org/abs/2010.07611, of which
        this is the form for channels.
    """
    shares = {gate: _shares(values.detach().cpu().double()) for gate, values in gates.items()}
    return {gate: share / channel_macs[gate].clamp_min(1.0) for gate, share in shares.items()}  # some cost nothing


def _shares(values: Tensor) -> Tensor:
    squares, order = values.square().sort(descending=True, stable=True)
    left = squares.cumsum(0).clamp_min(torch.finfo(squares.dtype).tiny)
    return torch.empty_like(squares).scatter_(0, order, squares / left)


def penalty_weights(channel_macs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Per-channel MACs, normalised to a mean of one over all channels: a dear channel pays more.

    Source:
        Mei et al., AtomNAS, https://arxiv.org/abs/1912.09640.
    """
    if not channel_macs:
        return {}
    mean = torch.cat(list(channel_macs.values())).mean()
    return {gate: macs / mean for gate, macs in channel_macs.items()}


class GatePenalty:
    """Weighted sum of the gates' magnitudes, as one fused reduction.

    Args:
        model: The model that owns the gates; build a new penalty after a shrink.
        weights: Gate name -> weight per channel.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        params = dict(model.named_parameters())
        self.gates: list[Tensor] = [params[gate] for gate in weights]
        self.weights = torch.cat(list(weights.values())).to(self.gates[0]) if self.gates else torch.zeros(())

    def __call__(self) -> Tensor:
        """The penalty, a scalar with gradients; zero if there are no gates."""
        return torch.dot(torch.cat(self.gates).abs(), self.weights) if self.gates else self.weights
