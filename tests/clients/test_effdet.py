import warnings

import pytest
import timm
import torch
from client_checks import SPACES, check_stays_sparse, with_zero_gradient, without_gradient

with warnings.catch_warnings():  # its import scripts functions, which torch has deprecated
    warnings.simplefilter('ignore', FutureWarning)
    effdet = pytest.importorskip('effdet')


def detector(space, name=None, pretrained=False):
    config = effdet.get_efficientdet_config('tf_efficientdet_d0')
    config.backbone_name = name or f'supernet_{space}_tiny'
    config.backbone_args = {}
    if space == 'hr':  # its first level has reduction 4
        config.backbone_indices = (1, 2, 3)
    config.image_size = (128, 128)
    config.num_classes = 3
    config.fpn_channels = 16
    config.fpn_cell_repeats = config.box_class_repeats = 1
    return effdet.DetBenchTrain(effdet.EfficientDet(config, pretrained_backbone=pretrained))


def loss(model):
    boxes = torch.tensor([[10.0, 10.0, 60.0, 60.0]])
    targets = {'bbox': [boxes] * 2, 'cls': [torch.tensor([1])] * 2}
    return model(torch.randn(2, 3, 128, 128), targets)['loss']


@pytest.mark.parametrize('space', SPACES)
def test_every_parameter_learns(space):
    model = detector(space).train()
    assert model.model.backbone.feature_info.reduction() == [8, 16, 32]
    loss(model).backward()
    assert not without_gradient(model)
    assert not with_zero_gradient(model.model.backbone)


def test_packed_ticket_stays_sparse(tickets, packed):
    model = detector('mbv2', f'local-dir:{packed["mbv2"]}', pretrained=True)
    features = timm.create_model(
        f'local-dir:{packed["mbv2"]}', pretrained=True, features_only=True, out_indices=(2, 3, 4)
    )
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        for found, expected in zip(model.model.backbone.eval()(x), features.eval()(x), strict=True):
            assert torch.equal(found, expected)
    check_stays_sparse(model.train(), 'model.backbone.', tickets['mbv2'], loss)
