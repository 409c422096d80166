import math

import pytest
import torch
from parts.heatmaps import decode, flip_mean, render


def test_targets_against_a_plain_double_loop():
    torch.manual_seed(0)
    points = torch.rand(2, 3, 2) * torch.tensor([48.0, 64.0])
    targets, weights = render(points, torch.ones(2, 3), (16, 12))
    assert targets.shape == (2, 3, 16, 12)
    assert weights.tolist() == [[1] * 3] * 2
    for n in range(2):
        for k in range(3):
            for row in range(16):
                for column in range(12):
                    dx, dy = column + 0.5 - points[n, k, 0] / 4, row + 0.5 - points[n, k, 1] / 4
                    expected = math.exp(-(dx**2 + dy**2) / (2 * 2.0**2))
                    assert targets[n, k, row, column].item() == pytest.approx(expected, abs=1e-6)


def test_a_point_in_the_middle_of_a_cell_by_hand():
    targets, _ = render(torch.tensor([[[10.0, 6.0]]]), torch.ones(1, 1), (4, 5), sigma=1.0)
    assert targets[0, 0, 1, 2] == 1
    assert targets[0, 0, 1, 3].item() == targets[0, 0, 0, 2].item() == pytest.approx(math.exp(-0.5))


def test_points_that_are_not_there_have_no_weight():
    points = torch.tensor([[[1.0, 1.0], [1.0, 1.0], [-0.1, 1.0], [1.0, 16.0], [15.9, 15.9]]])
    targets, weights = render(points, torch.tensor([[1.0, 0.0, 1.0, 1.0, 1.0]]), (4, 4))
    assert weights.tolist() == [[1, 0, 0, 0, 1]]
    assert targets.amax((2, 3)).gt(0).tolist() == [[True, False, False, False, True]]


def test_decoding_by_hand():
    heat = torch.zeros(1, 3, 4, 5)
    heat[0, 0, 2, 3], heat[0, 0, 2, 4], heat[0, 0, 1, 3] = 1.0, 0.5, 0.2  # right and above are higher
    heat[0, 1, 0, 4], heat[0, 1, 0, 3] = 2.0, 1.0  # at a corner
    heat[0, 2, 1, 1] = 3.0  # neighbours are equal
    points, scores = decode(heat)
    assert points.tolist() == [[[15.0, 9.0], [18.0, 2.0], [6.0, 6.0]]]
    assert scores.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize('stride', [2, 4])
def test_round_trip_within_a_quarter_of_a_cell(stride):
    torch.manual_seed(0)
    size = (32, 24)
    inner = torch.tensor([24.0 - 2, 32.0 - 2])
    points = (1 + torch.rand(50, 17, 2) * inner) * stride
    found, scores = decode(render(points, torch.ones(50, 17), size, stride)[0], stride)
    assert (found - points).abs().max() <= 0.25 * stride + 1e-4
    assert scores.min() > math.exp(-0.25 / 8 * 2) - 1e-6  # half a cell away each way, sigma 2


def test_a_flip_and_back_is_where_it_was():
    torch.manual_seed(0)
    points = torch.rand(4, 3, 2) * torch.tensor([48.0, 64.0])
    order = [0, 2, 1]
    mirrored = torch.stack([48 - points[..., 0], points[..., 1]], -1)[:, order]
    heat, flipped = (render(p, torch.ones(4, 3), (16, 12))[0] for p in (points, mirrored))
    torch.testing.assert_close(flip_mean(heat, flipped, order), heat)
    torch.testing.assert_close(flip_mean(heat, torch.zeros_like(heat), order), heat / 2)
