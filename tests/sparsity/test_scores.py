import timm
import torch
from torch import nn

from timm_supertickets.sparsity.scores import magnitude


def test_magnitude_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 2, (1, 2)), nn.BatchNorm2d(2), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[[[-3.0, 0.0]]], [[[0.5, -0.25]]]]))
        net[2].weight.copy_(torch.tensor([[1.0, -2.0]]))
    scores = magnitude(net)
    assert list(scores) == ['0.weight', '2.weight']
    assert scores['0.weight'].tolist() == [[[[3.0, 0.0]]], [[[0.5, 0.25]]]]
    assert scores['2.weight'].tolist() == [[1.0, 2.0]]


def test_magnitude_is_a_value_of_the_moment():
    net = nn.Sequential(nn.Linear(2, 2))
    scores = magnitude(net)
    before = scores['0.weight'].clone()
    assert not scores['0.weight'].requires_grad
    with torch.no_grad():
        net[0].weight.add_(1)
    assert torch.equal(scores['0.weight'], before)


def test_stem_and_classifier_have_no_scores():
    scores = magnitude(timm.create_model('supernet_mbv2_tiny'))
    assert 'blocks.0.0.conv_pw.weight' in scores
    assert not {'conv_stem.weight', 'classifier.weight'} & set(scores)
