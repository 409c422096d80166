from collections import OrderedDict

import pytest
import timm
import torch
from client_checks import SPACES, check_stays_sparse, with_zero_gradient, without_gradient
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

LEVELS = ('0', '1', '2', '3')  # reductions 4 to 32


class Pyramid(nn.Module):
    """A timm backbone below torchvision's feature pyramid."""

    out_channels = 16

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), self.out_channels)

    def forward(self, x):
        return self.fpn(OrderedDict(zip(LEVELS, self.body(x), strict=True)))


def pyramid(space, name=None, pretrained=False):
    first = {'mbv2': 1, 'hr': 0}[space]
    name = name or f'supernet_{space}_tiny'
    body = timm.create_model(
        name, pretrained=pretrained, features_only=True, out_indices=tuple(range(first, first + 4))
    )
    assert body.feature_info.reduction() == [4, 8, 16, 32]
    return Pyramid(body)


def faster_rcnn(backbone):
    return FasterRCNN(
        backbone,
        num_classes=3,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4),
        box_roi_pool=MultiScaleRoIAlign(LEVELS, 5, 2),
        rpn_pre_nms_top_n_train=100,
        rpn_post_nms_top_n_train=50,
    )


def retina_net(backbone):
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)
    return RetinaNet(backbone, num_classes=3, min_size=64, max_size=64, anchor_generator=anchors)


def loss(model):
    boxes = torch.tensor([[4.0, 4.0, 20.0, 28.0], [8.0, 8.0, 60.0, 60.0]])
    targets = [{'boxes': boxes, 'labels': torch.tensor([1, 2])}] * 2
    losses = model([torch.rand(3, 64, 64), torch.rand(3, 64, 64)], targets)
    total = sum(losses.values())
    assert total.isfinite()
    return total


@pytest.mark.parametrize('detector', [faster_rcnn, retina_net])
@pytest.mark.parametrize('space', SPACES)
def test_every_parameter_learns(space, detector):
    model = detector(pyramid(space)).train()
    loss(model).backward()
    assert not without_gradient(model)
    assert not with_zero_gradient(model.backbone)
    with torch.no_grad():
        found = model.eval()([torch.rand(3, 64, 64)])
    assert found[0].keys() == {'boxes', 'labels', 'scores'}


@pytest.mark.parametrize('detector', [faster_rcnn, retina_net])
@pytest.mark.parametrize('space', SPACES)
def test_packed_ticket_stays_sparse(space, detector, tickets, packed):
    model = detector(pyramid(space, f'local-dir:{packed[space]}', pretrained=True)).train()
    check_stays_sparse(model, 'backbone.body.', tickets[space], loss)
