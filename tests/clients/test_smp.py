import pytest
import timm
import torch
from client_checks import SPACES, check_stays_sparse, with_zero_gradient

smp = pytest.importorskip('segmentation_models_pytorch')

# DeepLabV3+ asks for output_stride 8 or 16: dilation instead of stride, which parallel branches have no use for
CASES = [(space, decoder) for space in SPACES for decoder in ('Unet', 'FPN')] + [('mbv2', 'DeepLabV3Plus')]


@pytest.mark.parametrize(('space', 'decoder'), CASES)
def test_every_parameter_learns(space, decoder):
    model = getattr(smp, decoder)(f'tu-supernet_{space}_tiny', encoder_weights=None, classes=3)
    y = model(torch.randn(2, 3, 64, 64))
    assert y.shape == (2, 3, 64, 64)
    y.square().mean().backward()
    assert not with_zero_gradient(model)


@pytest.mark.parametrize('stride', [8, 16])
def test_dilated_encoder_keeps_its_resolution(stride):
    model = smp.DeepLabV3Plus('tu-supernet_mbv2_tiny', encoder_weights=None, encoder_output_stride=stride).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert model.encoder(x)[-1].shape[-1] == 64 // stride
        assert model(x).shape == (1, 1, 64, 64)


@pytest.mark.parametrize('space', SPACES)
def test_encoder_takes_a_packed_ticket_and_keeps_it_sparse(space, tickets, packed):
    name = f'local-dir:{packed[space]}'
    model = smp.Unet(f'tu-{name}', encoder_weights=True, classes=2)
    x = torch.randn(2, 3, 64, 64)
    features = timm.create_model(name, pretrained=True, features_only=True).eval()
    with torch.no_grad():
        encoded = model.eval().encoder(x)[-len(features.feature_info) :]
        for found, expected in zip(encoded, features(x), strict=True):
            assert torch.equal(found, expected)
    check_stays_sparse(model.train(), 'encoder.model.', tickets[space], lambda model: model(x).square().mean())
