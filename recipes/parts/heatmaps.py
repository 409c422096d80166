"""Heatmaps: points as Gaussians on a coarser grid, and back.

A point is given in pixels of the input with the first pixel's middle at 0.5; cell j of a grid of stride s has its
middle at (j + 0.5) * s. So a flip of the grid is a flip of the input, and no half pixel is lost on the way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

STRIDE = 4
SIGMA = 2.0


def render(
    points: Tensor, weights: Tensor, size: tuple[int, int], stride: int = STRIDE, sigma: float = SIGMA
) -> tuple[Tensor, Tensor]:
    """Targets: a Gaussian of height 1 around every point, not rounded to a cell.

    Args:
        points: `(N, K, 2)`, x and y in pixels of the input.
        weights: `(N, K)`, 0 for points that are not labelled.
        size: Height and width of the grid.
        stride: Pixels per cell.
        sigma: Of the Gaussian, in cells.

    Returns:
        Targets `(N, K, H, W)`, and the weights `(N, K)`, now 0 for points outside of the grid as well. Where the weight
        is 0, so is the target.
    """
    height, width = size
    cells = points / stride
    inside = ((cells >= 0) & (cells < cells.new_tensor([width, height]))).all(-1)
    weights = weights * inside
    x = _bell(cells[..., 0], width, sigma)
    y = _bell(cells[..., 1], height, sigma)
    return y[..., :, None] * x[..., None, :] * (weights > 0)[..., None, None], weights


def _bell(centres: Tensor, count: int, sigma: float) -> Tensor:
    middles = torch.arange(count, device=centres.device, dtype=centres.dtype) + 0.5
    return torch.exp(-((middles - centres[..., None]) ** 2) / (2 * sigma**2))


def decode(heatmaps: Tensor, stride: int = STRIDE) -> tuple[Tensor, Tensor]:
    """Points from heat maps: the highest cell's middle, moved by a quarter of a cell to its higher neighbour each way.

    Args:
        heatmaps: `(N, K, H, W)`.
        stride: Pixels per cell.

    Returns:
        Points `(N, K, 2)`, x and y in pixels of the input, and the heights `(N, K)`.
    """
    height, width = heatmaps.shape[-2:]
    flat = heatmaps.flatten(-2)
    scores, best = flat.max(-1)
    x, y = best % width, best // width

    def at(column: Tensor, row: Tensor) -> Tensor:
        return flat.gather(-1, (row * width + column)[..., None])[..., 0]

    # at the edge, where a neighbour is missing, the point stays in the middle
    right, left = (x + 1).clamp(max=width - 1), (x - 1).clamp(min=0)
    below, above = (y + 1).clamp(max=height - 1), (y - 1).clamp(min=0)
    dx = (at(right, y) - at(left, y)).sign() * ((x > 0) & (x < width - 1))
    dy = (at(x, below) - at(x, above)).sign() * ((y > 0) & (y < height - 1))
    points = torch.stack([x + 0.5 + 0.25 * dx, y + 0.5 + 0.25 * dy], -1)
    return points * stride, scores


def flip_mean(heatmaps: Tensor, flipped: Tensor, order: Sequence[int]) -> Tensor:
    """The mean of heat maps and those of the mirrored input, mirrored back with left and right exchanged.

    Args:
        heatmaps: `(N, K, H, W)` of the input.
        flipped: Likewise of the mirrored input.
        order: Number of the point that each point becomes in a mirror.
    """
    return (heatmaps + flipped[:, list(order)].flip(-1)) / 2
