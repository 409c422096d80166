"""Pixelnet: a net with a map for every class or key point, of any model of timm."""

from collections.abc import Callable
from typing import Any

from parts.backbone import OnBackbone
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.ops import FeaturePyramidNetwork


class PixelNet(OnBackbone):
    """Scores of pixels from a feature pyramid over a backbone: its levels are summed at the finest.

    Args:
        backbone: Any model of timm that gives maps.
        num_classes: Classes, or key points.
        width: Channels of the pyramid.

    Shape:
        `(N, C, H, W)` to `(N, num_classes, H / r, W / r)`, r the reduction of the backbone's finest level from 4 on.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, width: int) -> None:
        super().__init__(backbone, 4, ('pyramid', 'classifier'))
        self.pyramid = FeaturePyramidNetwork(self.channels, width, norm_layer=nn.BatchNorm2d)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        levels = list(self.pyramid({str(i): level for i, level in enumerate(self.maps(x))}).values())
        size = levels[0].shape[-2:]
        return self.classifier(sum(upsampled(level, size) for level in levels))


def create_pixel_net(make: Callable[..., nn.Module], num_classes: int, width: int) -> nn.Module:
    """A net of the hr space scores pixels by itself; any other model is given a head over its maps.

    Args:
        make: Makes the model from `num_classes=`.
        num_classes: Classes, or key points.
        width: Channels of the head, for models that have none of their own.
    """
    net: Any = make(num_classes=num_classes)
    arch = getattr(net, 'arch', None)
    if arch is None or arch.space != 'hr':
        return PixelNet(make(num_classes=0), num_classes, width)
    return net if arch['task'] == 'dense' else net.with_dense_head(num_classes)


def upsampled(maps: Tensor, size: Any) -> Tensor:
    """Maps of another size, between pixels by straight lines."""
    return maps if maps.shape[-2:] == size else interpolate(maps, list(size), mode='bilinear')
