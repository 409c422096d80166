"""Stock: what is coupled in models of timm that are no space of ours."""

from timm.layers import Conv2dSame
from timm.models._efficientnet_blocks import InvertedResidual
from torch import nn

from ..channels import ChannelGroup, Member


def inverted_residual_groups(model: nn.Module) -> tuple[ChannelGroup, ...]:
    """The hidden channels of timm's inverted residuals (MobileNetV2 and V3, EfficientNet, ...), one group per block.

    They are for `prune(..., groups=)`, in which a channel that has lost its inputs, its depthwise kernel or its outputs
    dies whole; such models cannot be searched.
    """
    return tuple(
        _group(name, index, block)
        for index, (name, block) in enumerate(model.named_modules())
        if isinstance(block, InvertedResidual) and _is_depthwise(block.conv_dw)
    )


def _is_depthwise(conv: nn.Module) -> bool:
    if type(conv) not in (nn.Conv2d, Conv2dSame):  # others mix kernels, or make their weight anew
        return False
    return conv.groups == conv.in_channels == conv.out_channels


def _group(name: str, index: int, block: InvertedResidual) -> ChannelGroup:
    prefix, hidden = f'{name}.' if name else '', block.conv_dw.out_channels
    along = (('conv_pw', 0), ('bn1', 0), ('conv_dw', 0), ('bn2', 0), ('conv_pwl', 1))
    return ChannelGroup(
        block=index,
        gate=f'{prefix}bn2.weight',
        shift=f'{prefix}bn2.bias',
        kernels=((block.conv_dw.kernel_size[0], hidden),),
        members=tuple(Member(f'{prefix}{part}.weight', dim, 0, hidden) for part, dim in along),
        inside=prefix,
        output=(f'{prefix}bn3.weight', f'{prefix}bn3.bias') if block.has_skip else (),
    )
