"""The mbv2 space: MobileNetV2's stages with kernel sizes 3, 5 and 7 in parallel in every inverted residual.

The widths, depths and strides are those of MobileNetV2 (https://arxiv.org/abs/1801.04381); the parallel kernel sizes
and the search over their channels follow SuperTickets (https://arxiv.org/abs/2207.03677).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import (
    LayerType,
    create_classifier,
    create_conv2d,
    get_device_dtype,
    get_norm_act_layer,
    make_divisible,
)
from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_builder import efficientnet_init_weights
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from ..arch import Arch
from ..channels import ChannelGroup
from ..layers import DroppedBlock, MixedBlock, block_group, residual
from .build import (
    carry_over,
    check_blocks,
    check_depth,
    check_ends,
    check_size,
    create,
    describe,
    member,
    positive,
    released,
)

torch.fx.wrap('check_size')

KERNELS = (3, 5, 7)
EXPAND_RATIO = 4

Stages = tuple[tuple[int, int, int], ...]

# (channels, blocks, stride of the first block) per stage
FULL: Stages = ((16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
SMALL: Stages = ((16, 2, 2), (32, 3, 2), (64, 3, 2), (96, 1, 2))
TINY: Stages = ((8, 1, 1), (16, 2, 2), (16, 2, 2), (24, 2, 2), (32, 2, 2))

# What a search on Fashion-MNIST left of supernet_mbv2_small: hidden channels by kernel size, block by block.
FASHION_MNIST = (
    {3: 21, 5: 14, 7: 7},
    {3: 49, 5: 21, 7: 5},
    {3: 54, 5: 41, 7: 31},
    {3: 105, 5: 58, 7: 33},
    {3: 101, 5: 65, 7: 37},
    {3: 108, 5: 105, 7: 86},
    {3: 194, 5: 161, 7: 121},
    {3: 207, 5: 161, 7: 113},
    {3: 250, 5: 244, 7: 232},
)


class MixedMobileNetV2(EfficientNet):
    """A member of the mbv2 space; stem, head and everything but the blocks behave as timm's MobileNetV2.

    Args:
        arch: Which member, as an `Arch` or its JSON form.
        num_classes: Classes; 0 for no classifier.
        in_chans: Input channels.
        output_stride: 32, 16 or 8; later strides become dilations.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, growing linearly over the blocks.
        global_pool: timm's pooling type.
        act_layer: Activation.
        norm_layer: Batch norm with affine parameters.

    Shape:
        `(N, in_chans, H, W)` to `(N, num_classes)`.

    Raises:
        ValueError: An arch that is not of this space, or an argument out of range.
    """

    def __init__(
        self,
        arch: Arch | Mapping[str, Any],
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = 'avg',
        act_layer: LayerType = nn.ReLU6,
        norm_layer: LayerType = nn.BatchNorm2d,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.Module.__init__(self)  # only the blocks differ from timm's, and timm's constructor builds its own
        arch = check_arch(Arch.from_json(arch))
        check_ends(arch, in_chans, num_classes)
        if output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride must be 8, 16 or 32, got {output_stride}')
        self.arch = arch
        settings: dict[str, Any] = {
            'output_stride': output_stride,
            'drop_path_rate': drop_path_rate,
            'act_layer': act_layer,
            'norm_layer': norm_layer,
        }
        self._settings = settings
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        dd = {'device': device, 'dtype': dtype}
        norm_act_layer = get_norm_act_layer(norm_layer, act_layer)

        stem = arch['stem']
        self.conv_stem = create_conv2d(in_chans, stem, 3, stride=2, padding='', **dd)
        self.bn1 = norm_act_layer(stem, inplace=True, **dd)

        features: list[dict[str, Any]] = []
        if arch['stages'][0][2] > 1:
            features.append({'stage': 0, 'reduction': 2, 'module': 'bn1', 'num_chs': stem})
        stages = []
        places = block_places(arch)
        chs, reduction, dilation, index = stem, 2, 1, 0
        for stage, (out_chs, depth, stage_stride) in enumerate(arch['stages']):
            blocks: list[nn.Module] = []
            for position in range(depth):
                stride = stage_stride if position == 0 else 1
                block_stride, block_dilation = stride, dilation
                if reduction * stride > output_stride:
                    block_stride, dilation = 1, dilation * stride
                else:
                    reduction *= stride
                kernels = dict(arch.blocks[index])
                blocks.append(
                    MixedBlock(
                        chs,
                        out_chs,
                        kernels,
                        stride=block_stride,
                        dilation=block_dilation,
                        skip=places[index][1],
                        act_layer=act_layer,
                        norm_layer=norm_layer,
                        drop_path_rate=drop_path_rate * index / len(arch.blocks),
                        **dd,
                    )
                    if kernels
                    else DroppedBlock(chs)
                )
                chs = out_chs
                index += 1
            stages.append(nn.Sequential(*blocks))
            if stage + 1 == len(arch['stages']) or arch['stages'][stage + 1][2] > 1:
                features.append(
                    {'stage': stage + 1, 'reduction': reduction, 'module': f'blocks.{stage}', 'num_chs': chs}
                )
        self.blocks = nn.Sequential(*stages)
        self.feature_info = features
        self.stride: int = reduction
        self.stage_ends = [info['stage'] for info in self.feature_info]

        self.num_features = arch['head']
        self.conv_head = create_conv2d(chs, self.num_features, 1, padding='', **dd)
        self.bn2 = norm_act_layer(self.num_features, inplace=True, **dd)
        self.global_pool, self.classifier = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **dd
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        efficientnet_init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        check_size(x, self.stride)
        scores: Tensor = self.forward_head(self.forward_features(x))
        return scores

    def channel_groups(self) -> tuple[ChannelGroup, ...]:
        """One group per block that is not dropped, in network order."""
        return tuple(
            block_group(name, index, kernels, droppable)
            for index, ((name, droppable), kernels) in enumerate(
                zip(block_places(self.arch), self.arch.blocks, strict=True)
            )
            if kernels
        )

    def supernet_arch(self) -> Arch:
        """The supernet that this net is a member of."""
        return largest(self.arch)

    def rebuild(self, arch: Arch) -> 'MixedMobileNetV2':
        """A net of another member with this one's settings, freshly initialised, on the same device and dtype."""
        small = MixedMobileNetV2(
            arch,
            num_classes=self.num_classes,
            in_chans=self.in_chans,
            drop_rate=self.drop_rate,
            global_pool=self.global_pool.pool_type,
            **self._settings,
            **get_device_dtype(self),
        )
        small.grad_checkpointing = self.grad_checkpointing
        carry_over(self, small)
        return small


def block_places(arch: Arch) -> list[tuple[str, bool]]:
    """Per block of the arch: its module path, and whether it is residual."""
    places = []
    chs = arch['stem']
    for stage, (out_chs, depth, stride) in enumerate(arch['stages']):
        for position in range(depth):
            places.append((f'blocks.{stage}.{position}', residual(chs, out_chs, stride if position == 0 else 1)))
            chs = out_chs
    return places


def check_arch(arch: Arch) -> Arch:
    """Check that an arch is a member of this space.

    Raises:
        ValueError: It names another space, kernel sizes or widths that this space has not, or drops a block
            that is not residual.
    """
    if arch.space != 'mbv2':
        raise ValueError(f'arch is of space {arch.space!r}, this model takes space "mbv2"')
    if {name for name, _ in arch.shape} != {'stem', 'stages', 'head'}:
        raise ValueError(f'arch: shape of space "mbv2" has stem, stages and head, got {[n for n, _ in arch.shape]}')
    for name, value in (('stem', arch['stem']), ('head', arch['head'])):
        if not positive(value):
            raise ValueError(f'arch: {name} must be a positive number of channels, got {value!r}')
    stages = arch['stages']
    if not isinstance(stages, Sequence) or not stages:
        raise ValueError(f'arch: stages must be a list of [channels, blocks, stride], got {stages!r}')
    for stage in stages:
        if not (isinstance(stage, Sequence) and len(stage) == 3 and all(map(positive, stage)) and stage[2] <= 2):
            raise ValueError(f'arch: a stage is [channels, blocks, stride 1 or 2], got {stage!r}')
    check_depth(arch, (depth for _, depth, _ in stages))
    return check_blocks(arch, block_places(arch), KERNELS)


def full_arch(stages: Stages, stem: int, head: int, width: float = 1.0) -> Arch:
    """The largest member with these stages: every kernel size at the full expansion ratio.

    Args:
        stages: `(channels, blocks, stride of the first block)` each.
        stem: Channels of the stem.
        head: Channels of the last 1x1 convolution, which is never made narrower.
        width: Multiplier of the widths, rounded as timm does.
    """
    if not width > 0:
        raise ValueError(f'width must be above 0, got {width}')
    stem = make_divisible(stem * width)
    head = max(head, make_divisible(head * width))
    stages = tuple((make_divisible(channels * width), depth, stride) for channels, depth, stride in stages)
    return largest(Arch('mbv2', (('stem', stem), ('stages', stages), ('head', head)), ()))


def largest(arch: Arch) -> Arch:
    """The largest member of the same shape: what a supernet of this shape is."""
    blocks, chs = [], arch['stem']
    for out_chs, depth, _ in arch['stages']:
        for _ in range(depth):
            blocks.append(tuple((kernel, chs * EXPAND_RATIO) for kernel in KERNELS))
            chs = out_chs
    return Arch('mbv2', arch.shape, tuple(blocks))


default_cfgs = generate_default_cfgs(
    {
        'supernet_mbv2.untrained': describe(),
        'supernet_mbv2_small.untrained': describe(
            input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0, num_classes=10
        ),
        'supernet_mbv2_tiny.untrained': describe(
            input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0, num_classes=10
        ),
        'superticket_mbv2.untrained': describe(),
        'superticket_mbv2_s50.st_fmnist': released('superticket_mbv2_s50.st_fmnist'),
        'superticket_mbv2_s80.st_fmnist': released('superticket_mbv2_s80.st_fmnist'),
        'superticket_mbv2_s90.st_fmnist': released('superticket_mbv2_s90.st_fmnist'),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MixedMobileNetV2:
    model: MixedMobileNetV2 = create(MixedMobileNetV2, variant, pretrained, {'flatten_sequential': True}, **kwargs)
    return model


@register_model
def supernet_mbv2(pretrained: bool = False, width: float = 1.0, **kwargs: Any) -> MixedMobileNetV2:
    """Supernet of the mbv2 space; `width` multiplies all widths but the head's."""
    return _create('supernet_mbv2', pretrained, arch=full_arch(FULL, 32, 1280, width), **kwargs)


@register_model
def supernet_mbv2_small(pretrained: bool = False, width: float = 1.0, **kwargs: Any) -> MixedMobileNetV2:
    """A supernet of the mbv2 space for 64x64 images; `width` multiplies all widths but the head's."""
    return _create('supernet_mbv2_small', pretrained, arch=full_arch(SMALL, 8, 320, width), **kwargs)


@register_model
def supernet_mbv2_tiny(pretrained: bool = False, width: float = 1.0, **kwargs: Any) -> MixedMobileNetV2:
    """A small supernet of the mbv2 space for 32x32 images; `width` multiplies all widths but the head's."""
    return _create('supernet_mbv2_tiny', pretrained, arch=full_arch(TINY, 16, 128, width), **kwargs)


@register_model
def superticket_mbv2(pretrained: bool = False, arch: Any = None, **kwargs: Any) -> MixedMobileNetV2:
    """Any member of the mbv2 space; `arch` is an `Arch` or its JSON form, by default the largest member."""
    return _create('superticket_mbv2', pretrained, arch=full_arch(FULL, 32, 1280) if arch is None else arch, **kwargs)


def _found() -> Arch:
    return member(full_arch(SMALL, 8, 320), FASHION_MNIST)


@register_model
def superticket_mbv2_s50(pretrained: bool = False, **kwargs: Any) -> MixedMobileNetV2:
    """A member of the mbv2 space for 64x64 images; with pretrained weights, half of the prunable ones are zero."""
    return _create('superticket_mbv2_s50', pretrained, arch=_found(), **kwargs)


@register_model
def superticket_mbv2_s80(pretrained: bool = False, **kwargs: Any) -> MixedMobileNetV2:
    """The member of `superticket_mbv2_s50`, drawn later in the same run: 80 % of the prunable weights are zero."""
    return _create('superticket_mbv2_s80', pretrained, arch=_found(), **kwargs)


@register_model
def superticket_mbv2_s90(pretrained: bool = False, **kwargs: Any) -> MixedMobileNetV2:
    """The member of `superticket_mbv2_s50`, drawn later in the same run: 90 % of the prunable weights are zero."""
    return _create('superticket_mbv2_s90', pretrained, arch=_found(), **kwargs)
