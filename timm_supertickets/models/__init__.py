"""The spaces: one file each, registered with timm on import."""

from .hr import MixedHRNet
from .mbv2 import MixedMobileNetV2

__all__ = ['MixedHRNet', 'MixedMobileNetV2']
