"""The fused mixed-kernel block that both spaces are made of."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import DropPath, LayerType, create_conv2d, get_norm_act_layer
from torch import Tensor, nn

from .channels import ChannelGroup, Member


class MixedDepthwiseConv2d(nn.ModuleDict):
    """Depthwise convolutions of several kernel sizes, each on its own slice of the channels.

    Args:
        kernels: `{kernel size: channels}`, in the order of the channel axis.
        stride: Stride of every convolution.
        dilation: Dilation of every convolution.

    Shape:
        `(N, C, H, W)` to `(N, C, H / stride, W / stride)` with C the sum of the channels.
    """

    def __init__(
        self,
        kernels: Mapping[int, int],
        stride: int = 1,
        dilation: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.splits = list(kernels.values())
        for kernel, channels in kernels.items():
            self[f'k{kernel}'] = create_conv2d(
                channels,
                channels,
                kernel,
                stride=stride,
                dilation=dilation,
                depthwise=True,
                padding='',
                device=device,
                dtype=dtype,
            )

    def forward(self, x: Tensor) -> Tensor:
        """Split, convolve, concatenate."""
        parts = torch.split(x, self.splits, 1)
        return torch.cat([conv(parts[i]) for i, conv in enumerate(self.values())], 1)


class MixedBlock(nn.Module):
    """Inverted residual with several kernel sizes in parallel, fused.

    One 1x1 expansion for all kernel sizes, depthwise convolutions on channel slices, one 1x1 projection: the same
    function as the sum of one inverted residual per kernel size (without their projections' own batch norms).
    The modules carry the names of timm's `InvertedResidual`; `bn2.weight` is the gate.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        kernels: `{kernel size: hidden channels}`.
        stride: Stride of the depthwise convolutions.
        dilation: Dilation of the depthwise convolutions.
        skip: Add the input to the output.
        act_layer: Activation after the first two batch norms.
        norm_layer: Normalisation with `weight`, `bias`, `running_mean` and `running_var`.
        drop_path_rate: Stochastic depth, for residual blocks.

    Shape:
        `(N, in_chs, H, W)` to `(N, out_chs, H / stride, W / stride)`.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernels: Mapping[int, int],
        stride: int = 1,
        dilation: int = 1,
        skip: bool = False,
        act_layer: LayerType = nn.ReLU6,
        norm_layer: LayerType = nn.BatchNorm2d,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        norm_act_layer = get_norm_act_layer(norm_layer, act_layer)
        hidden = sum(kernels.values())
        self.has_skip = skip
        self.conv_pw = create_conv2d(in_chs, hidden, 1, padding='', **dd)
        self.bn1 = norm_act_layer(hidden, inplace=True, **dd)
        self.conv_dw = MixedDepthwiseConv2d(kernels, stride=stride, dilation=dilation, **dd)
        self.bn2 = norm_act_layer(hidden, inplace=True, **dd)
        self.conv_pwl = create_conv2d(hidden, out_chs, 1, padding='', **dd)
        self.bn3 = norm_act_layer(out_chs, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    def feature_info(self, location: str) -> dict[str, Any]:
        """What timm's feature extraction asks of a block."""
        if location == 'expansion':
            return {'module': 'conv_pwl', 'hook_type': 'forward_pre', 'num_chs': self.conv_pwl.in_channels}
        return {'module': '', 'num_chs': self.conv_pwl.out_channels}

    def forward(self, x: Tensor) -> Tensor:
        """Expand, filter, project, and add the input where the block is residual."""
        shortcut = x
        x = self.bn1(self.conv_pw(x))
        x = self.bn2(self.conv_dw(x))
        x = self.bn3(self.conv_pwl(x))
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class DroppedBlock(nn.Identity):
    """A residual block that lost all of its channels: the identity.

    Args:
        channels: Channels that pass through.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def feature_info(self, location: str) -> dict[str, Any]:
        """What timm's feature extraction asks of a block."""
        return {'module': '', 'num_chs': self.channels}


def residual(in_chs: int, out_chs: int, stride: int) -> bool:
    """Whether a block of these widths and this stride adds its input to its output."""
    return in_chs == out_chs and stride == 1


def block_group(name: str, block: int, kernels: tuple[tuple[int, int], ...], droppable: bool) -> ChannelGroup:
    """The channel group of a `MixedBlock`.

    Args:
        name: The block's module path in its model, e.g. `'blocks.1.0'`.
        block: The block's index in the arch.
        kernels: The arch's `(kernel size, hidden channels)` for the block.
        droppable: Whether the block may become the identity.
    """
    hidden = sum(channels for _, channels in kernels)
    members = [Member(f'{name}.conv_pw.weight', 0, 0, hidden)]
    for norm in ('bn1', 'bn2'):
        for tensor in ('weight', 'bias', 'running_mean', 'running_var'):
            members.append(Member(f'{name}.{norm}.{tensor}', 0, 0, hidden))
    start = 0
    for kernel, channels in kernels:
        members.append(Member(f'{name}.conv_dw.k{kernel}.weight', 0, start, start + channels))
        start += channels
    members.append(Member(f'{name}.conv_pwl.weight', 1, 0, hidden))
    return ChannelGroup(
        block=block,
        gate=f'{name}.bn2.weight',
        shift=f'{name}.bn2.bias',
        kernels=kernels,
        members=tuple(members),
        inside=f'{name}.',
        output=(f'{name}.bn3.weight', f'{name}.bn3.bias') if droppable else (),
    )
