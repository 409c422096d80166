"""The spaces: one file each, registered with timm on import."""

from .mbv2 import MixedMobileNetV2

__all__ = ['MixedMobileNetV2']
