"""Scores: functions from a net to `{name: tensor}`, higher = more worth keeping."""

import torch
from torch import Tensor, nn

from .mask import prunable


@torch.no_grad()
def magnitude(model: nn.Module) -> dict[str, Tensor]:
    """The absolute value of every prunable weight.

    Source:
        Han et al., Learning both weights and connections, https://arxiv.org/abs/1506.02626.
    """
    return {name: param.abs() for name, param in prunable(model).items()}
