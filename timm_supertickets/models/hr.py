"""The hr space: parallel branches of four resolutions, fused between neighbours, kernels 3, 5 and 7 in every block.

The multi-branch supernet of HR-NAS (https://arxiv.org/abs/2106.06560) that SuperTickets searches
(https://arxiv.org/abs/2207.03677).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import (
    LayerType,
    SelectAdaptivePool2d,
    create_classifier,
    create_conv2d,
    get_device_dtype,
    get_norm_act_layer,
    make_divisible,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import efficientnet_init_weights
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from ..arch import Arch
from ..attention import AttendedBlock, TokenPath, token_group
from ..channels import ChannelGroup
from ..layers import DroppedBlock, MixedBlock, block_group, residual
from .build import carry_over, check_blocks, check_depth, check_ends, check_size, create, describe, member, positive

torch.fx.wrap('check_size')

KERNELS = (3, 5, 7)
EXPAND_RATIO = 4
HEADS = ('classify', 'dense')
PIXEL_STD = 0.001
BATCH_NORM = partial(nn.BatchNorm2d, eps=1e-3)

# (blocks per branch, channels per branch) per stage
Stages = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
FULL: Stages = (
    ((1,), (24,)),
    ((2, 2), (18, 36)),
    ((2, 2, 3), (18, 36, 72)),
    ((2, 2, 3, 4), (18, 36, 72, 144)),
    ((2, 2, 3, 4), (18, 36, 72, 144)),
)
TINY: Stages = (((1,), (8,)), ((1, 1), (8, 12)), ((1, 1, 1), (8, 12, 16)), ((1, 1, 1, 1), (8, 12, 16, 24)))

# What a search on the embedded digits left of supernet_hr_tiny: hidden channels by kernel size, block by block.
FOUND = (
    {3: 7, 5: 12, 7: 6},
    {3: 12, 5: 8, 7: 6},
    {3: 11, 5: 9, 7: 6},
    {3: 12, 5: 9, 7: 13},
    {3: 13, 5: 5, 7: 2},
    {3: 25, 5: 19, 7: 16},
    {3: 26, 5: 1},
    {3: 47, 5: 46, 7: 48},
    {3: 16, 5: 18, 7: 15},
    {3: 21, 5: 19, 7: 26},
    {3: 38, 5: 39, 7: 40},
    {3: 30, 5: 2},
    {3: 37, 5: 37, 7: 28},
    {3: 56, 5: 57, 7: 60},
    {3: 31},
    {3: 47, 5: 47, 7: 47},
    {3: 32, 5: 32, 7: 31},
    {3: 48, 5: 47, 7: 45},
    {3: 64, 5: 63, 7: 63},
    {3: 47, 5: 43, 7: 41},
    {3: 61, 5: 58, 7: 62},
    {3: 63, 5: 64, 7: 62},
    {3: 30},
    {3: 48, 5: 48, 7: 47},
    {3: 62, 5: 64, 7: 64},
    {3: 95, 5: 96, 7: 95},
    {3: 31},
    {3: 47, 5: 48, 7: 46},
    {3: 64, 5: 63, 7: 64},
    {3: 96, 5: 96, 7: 96},
    {3: 48, 5: 48, 7: 46},
    {3: 64, 5: 64, 7: 62},
    {3: 96, 5: 96, 7: 96},
)


class Place(NamedTuple):
    """Where a block of the arch sits: module path, input and output channels, stride, tokens beside it or not."""

    path: str
    in_chs: int
    out_chs: int
    stride: int
    attended: bool

    @property
    def is_residual(self) -> bool:
        """Whether the block adds its input itself; otherwise a projection of it is added."""
        return residual(self.in_chs, self.out_chs, self.stride)

    @property
    def mixed(self) -> str:
        """Module path of the mixed-kernel block."""
        inner = f'{self.path}.block' if self.attended else self.path
        return inner if self.is_residual else f'{inner}.block'

    @property
    def tokens(self) -> str:
        """Module path of the tokens beside it."""
        return f'{self.path}.tokens'


class ProjectedBlock(nn.Module):
    """A block that changes width or resolution, and a grouped 1x1 projection of its input beside it.

    Args:
        block: The mixed-kernel block; None once it has lost all of its channels.
        shortcut: The projection.
    """

    def __init__(self, block: nn.Module | None, shortcut: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """The projection, and what the block adds to it."""
        y: Tensor = self.shortcut(x)
        if self.block is not None:
            y = y + self.block(x)
        return y


class FusedBranch(nn.ModuleList):
    """The sum of a branch and its neighbours, each through a block of its own.

    Args:
        index: Index of the branch.
        blocks: From the neighbours, the first from branch `max(0, index - 1)`; empty if nobody needs the sum.
    """

    def __init__(self, index: int, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.index = index

    def forward(self, xs: list[Tensor]) -> Tensor:
        """Coarser neighbours are upsampled after their block, finer ones downsampled by it."""
        parts: list[Tensor] = []
        for k, block in enumerate(self):
            j = k + max(0, self.index - 1)
            y = block(xs[j])
            if j > self.index:
                y = F.interpolate(y, size=xs[self.index].shape[-2:], mode='nearest')
            parts.append(y)
        total = parts[0] if len(parts) > 0 else xs[self.index]
        for part in parts[1:]:
            total = total + part
        return total


class FusedBranches(nn.Module):
    """A stage: every branch is fused from its neighbours, new branches grow from the lowest, then each goes its way.

    Args:
        fuse: Per fused branch the blocks from its neighbouring inputs.
        grow: Blocks that make a new branch from the one above it.
        branches: Per branch its blocks in a row.

    Shape:
        A list of `(N, C_i, H / 2^i, W / 2^i)` to a list of as many or more.
    """

    def __init__(self, fuse: list[list[nn.Module]], grow: list[nn.Module], branches: list[list[nn.Module]]) -> None:
        super().__init__()
        self.fuse = nn.ModuleList(FusedBranch(i, row) for i, row in enumerate(fuse))
        self.grow = nn.ModuleList(grow)
        self.branches = nn.ModuleList(nn.Sequential(*branch) for branch in branches)
        self.grad_checkpointing = False

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """Fuse, grow, and go through the branches."""
        ys: list[Tensor] = []
        for fused in self.fuse:
            ys.append(fused(xs))
        for block in self.grow:
            ys.append(block(ys[-1]))
        out: list[Tensor] = []
        for i, branch in enumerate(self.branches):
            if self.grad_checkpointing and not is_scripting():
                out.append(checkpoint_seq(branch, ys[i]))
            else:
                out.append(branch(ys[i]))
        return out

    def prune(self, needed: set[int]) -> set[int]:
        """Drop what the branches in `needed` do not come from; returns the input branches that they come from."""
        fused = len(self.fuse)
        sources = set(needed)
        for i in range(fused + len(self.grow) - 1, fused - 1, -1):
            if i in sources:
                sources.add(i - 1)
            else:
                self.grow[i - fused] = nn.Identity()
        for i in range(len(self.branches)):
            if i not in needed:
                self.branches[i] = nn.Identity()
        for i in range(fused):
            if i not in sources:
                self.fuse[i] = FusedBranch(i, [])
        return {j for i in sources if i < fused for j in _neighbours(i, fused)}


class ClassifyHead(nn.Module):
    """Widens every branch, adds them up from fine to coarse, and ends in a 1x1 convolution.

    Args:
        widen: Per branch a block.
        down: Blocks of stride 2 from each widened branch to the next.
        conv: The 1x1 convolution.
        bn: Its norm and activation.

    Shape:
        A list of `(N, C_i, H / 2^i, W / 2^i)` to `(N, num_features, H / 8, W / 8)`.
    """

    def __init__(self, widen: list[nn.Module], down: list[nn.Module], conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.widen = nn.ModuleList(widen)
        self.down = nn.ModuleList(down)
        self.conv = conv
        self.bn = bn

    def forward(self, xs: list[Tensor]) -> Tensor:
        """Widen, add up, convolve."""
        wide: list[Tensor] = []
        for i, block in enumerate(self.widen):
            wide.append(block(xs[i]))
        total = wide[0]
        for i, block in enumerate(self.down):
            total = block(total) + wide[i + 1]
        out: Tensor = self.bn(self.conv(total))
        return out


class DenseHead(nn.Module):
    """All branches at the finest one's resolution, side by side, through one block.

    Args:
        block: From the sum of the branches' channels to the features'.

    Shape:
        A list of `(N, C_i, H / 2^i, W / 2^i)` to `(N, num_features, H, W)`.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, xs: list[Tensor]) -> Tensor:
        """Upsample, concatenate, mix."""
        up: list[Tensor] = [xs[0]]
        for x in xs[1:]:
            up.append(F.interpolate(x, size=xs[0].shape[-2:], mode='bilinear', align_corners=False))
        out: Tensor = self.block(torch.cat(up, 1))
        return out


class MixedHRNet(nn.Module):
    """A member of the hr space.

    Args:
        arch: Which member, as an `Arch` or its JSON form; its shape says whether the head classifies images or pixels.
        num_classes: Classes; 0 for no classifier.
        in_chans: Input channels.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, growing linearly over the blocks.
        global_pool: timm's pooling type; the head for dense tasks does not pool.
        act_layer: Activation.
        norm_layer: Batch norm with affine parameters.

    Shape:
        `(N, in_chans, H, W)` to `(N, num_classes)`, or `(N, num_classes, H / 4, W / 4)` with the head for dense tasks.

    Raises:
        ValueError: An arch that is not of this space, or an argument out of range.
    """

    def __init__(
        self,
        arch: Arch | Mapping[str, Any],
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = 'avg',
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = BATCH_NORM,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        arch = check_arch(Arch.from_json(arch))
        check_ends(arch, in_chans, num_classes)
        self.arch = arch
        settings: dict[str, Any] = {
            'drop_path_rate': drop_path_rate,
            'act_layer': act_layer,
            'norm_layer': norm_layer,
        }
        self._settings = settings
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        dd = {'device': device, 'dtype': dtype}
        norm_act_layer = get_norm_act_layer(norm_layer, act_layer)
        blocks = {
            place.path: _make_block(
                arch,
                place,
                index,
                act_layer=act_layer,
                norm_layer=norm_layer,
                drop_path_rate=drop_path_rate * index / len(arch.blocks),
                **dd,
            )
            for index, place in enumerate(block_places(arch))
        }

        stem1, stem2 = arch['stem']
        self.conv_stem = create_conv2d(in_chans, stem1, 3, stride=2, padding='', **dd)
        self.bn1 = norm_act_layer(stem1, inplace=True, **dd)
        self.conv2 = create_conv2d(stem1, stem2, 3, stride=2, padding='', **dd)
        self.bn2 = norm_act_layer(stem2, inplace=True, **dd)
        stages: list[FusedBranches] = []
        for stage, (depths, _) in enumerate(arch['stages']):
            name = f'stages.{stage}'
            fused = 1 if stage == 0 else len(arch['stages'][stage - 1][0])
            stages.append(
                FusedBranches(
                    [[blocks[f'{name}.fuse.{i}.{k}'] for k in range(len(_neighbours(i, fused)))] for i in range(fused)],
                    [blocks[f'{name}.grow.{i}'] for i in range(len(depths) - fused)],
                    [[blocks[f'{name}.branches.{i}.{b}'] for b in range(depth)] for i, depth in enumerate(depths)],
                )
            )
        self.stages = nn.ModuleList(stages)
        widths = arch['stages'][-1][1]
        self.feature_info = [
            {'num_chs': chs, 'reduction': 4 * 2**i, 'module': f'stages.{len(stages) - 1}.branches.{i}'}
            for i, chs in enumerate(widths)
        ]

        self.stride: int = self.feature_info[-1]['reduction']

        self.num_features = self.head_hidden_size = arch['head'][-1]
        if arch['task'] == 'classify':
            wide = arch['head'][:-1]
            self.head: nn.Module = ClassifyHead(
                [blocks[f'head.widen.{i}'] for i in range(len(wide))],
                [blocks[f'head.down.{i}'] for i in range(len(wide) - 1)],
                create_conv2d(wide[-1], self.num_features, 1, padding='', **dd),
                norm_act_layer(self.num_features, inplace=True, **dd),
            )
        else:
            self.head = DenseHead(blocks['head.block'])
        self._make_classifier(num_classes, global_pool, **dd)
        efficientnet_init_weights(self)
        self._init_classifier()

    def _make_classifier(self, num_classes: int, global_pool: str, **dd: Any) -> None:
        if self.arch['task'] == 'classify':
            self.global_pool, self.classifier = create_classifier(
                self.num_features, num_classes, pool_type=global_pool, **dd
            )
            self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        else:
            self.global_pool = SelectAdaptivePool2d(pool_type='')
            self.classifier = nn.Conv2d(self.num_features, num_classes, 1, **dd) if num_classes > 0 else nn.Identity()

    def _init_classifier(self) -> None:
        """Start with small scores of pixels: unlike pooled ones, the maps they are made of have any scale."""
        if isinstance(self.classifier, nn.Conv2d):
            nn.init.normal_(self.classifier.weight, std=PIXEL_STD)

    def channel_groups(self) -> tuple[ChannelGroup, ...]:
        """One group per block that is not dropped, and one for its tokens, in network order; all can be dropped."""
        groups = []
        for index, (place, kernels) in enumerate(zip(block_places(self.arch), self.arch.blocks, strict=True)):
            if kernels:
                groups.append(block_group(place.mixed, index, kernels, droppable=True))
            if self.arch.tokens and self.arch.tokens[index]:
                groups.append(token_group(place.tokens, index, self.arch.tokens[index]))
        return tuple(groups)

    def supernet_arch(self) -> Arch:
        """The supernet that this net is a member of."""
        return largest(self.arch)

    def with_dense_head(self, num_classes: int) -> 'MixedHRNet':
        """A net with these branches, weights included, under a fresh head for dense tasks.

        Args:
            num_classes: Classes of a pixel, or key points.
        """
        shape = dict(self.arch.shape)
        head = make_divisible(sum(shape['stages'][-1][1]) / 3, 2)
        arch = largest(Arch('hr', tuple({**shape, 'task': 'dense', 'head': (head,)}.items()), ()))
        trunk = sum(not place.path.startswith('head') for place in block_places(arch))
        arch = Arch(
            'hr',
            arch.shape,
            self.arch.blocks[:trunk] + arch.blocks[trunk:],
            self.arch.tokens[:trunk] + arch.tokens[trunk:],
        )
        net = MixedHRNet(arch, num_classes, self.in_chans, self.drop_rate, **self._settings, **get_device_dtype(self))
        weights = {name: t for name, t in self.state_dict().items() if not name.startswith(('head.', 'classifier.'))}
        net.load_state_dict(weights, strict=False)
        for name, param in self.named_parameters():
            if name in weights:
                net.get_parameter(name).requires_grad_(param.requires_grad)
        self._hand_on(net)
        return net

    def rebuild(self, arch: Arch) -> 'MixedHRNet':
        """A net of another member with this one's settings, freshly initialised, on the same device and dtype."""
        small = MixedHRNet(
            arch,
            num_classes=self.num_classes,
            in_chans=self.in_chans,
            drop_rate=self.drop_rate,
            global_pool=self.global_pool.pool_type,
            **self._settings,
            **get_device_dtype(self),
        )
        self._hand_on(small)
        return small

    def _hand_on(self, net: 'MixedHRNet') -> None:
        net.set_grad_checkpointing(any(getattr(stage, 'grad_checkpointing', False) for stage in self.stages))
        carry_over(self, net)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of layers, for layer-wise learning rates."""
        stages: list[Any] = [(r'^stages\.(\d+)', None)]
        if not coarse:  # fusion and growth come before the first blocks of the branches
            stages = [
                (r'^stages\.(\d+)\.fuse', (-2,)),
                (r'^stages\.(\d+)\.grow', (-1,)),
                (r'^stages\.(\d+)\.branches\.\d+\.(\d+)', None),
            ]
        return {'stem': r'^conv_stem|bn1|conv2|bn2', 'blocks': [*stages, (r'^head', (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in the branches."""
        for stage in self.stages:
            assert isinstance(stage, FusedBranches)
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        classifier: nn.Module = self.classifier
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, and another pooling if one is named."""
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self._make_classifier(num_classes, global_pool, **get_device_dtype(self))
        self._init_classifier()
        self.global_pool.train(self.training)
        self.classifier.train(self.training)

    def forward_branches(self, x: Tensor) -> list[Tensor]:
        """The branch pyramid: `(N, C_i, H / 4 / 2^i, W / 4 / 2^i)` each."""
        check_size(x, self.stride)
        x = self.bn1(self.conv_stem(x))
        x = self.bn2(self.conv2(x))
        xs: list[Tensor] = [x]
        for stage in self.stages:
            xs = stage(xs)
        return xs

    def forward_features(self, x: Tensor) -> Tensor:
        """Everything but pooling and classifier."""
        features: Tensor = self.head(self.forward_branches(x))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier."""
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        if pre_logits:
            return x
        scores: Tensor = self.classifier(x)
        return scores

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Any:
        """The branches with these indices, and the final features.

        Args:
            x: Images.
            indices: The last n if a number, all if None.
            norm: Has no effect; there is no norm after the branches.
            stop_early: Has no effect: the branches end together.
            output_fmt: `NCHW`.
            intermediates_only: Return the branches alone.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take, _ = feature_take_indices(len(self.feature_info), indices)
        xs = self.forward_branches(x)
        intermediates = [xs[i] for i in take]
        return intermediates if intermediates_only else (self.head(xs), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the branches with these indices do not need; returns the indices that are kept."""
        take, _ = feature_take_indices(len(self.feature_info), indices)
        if prune_head:  # all branches feed the head
            self.head = nn.Identity()
            self.reset_classifier(0, '')
            needed = set(take)
            for stage in reversed(list(self.stages)):
                assert isinstance(stage, FusedBranches)
                needed = stage.prune(needed)
        return list(take)


def _make_block(arch: Arch, place: Place, index: int, norm_layer: LayerType, **settings: Any) -> nn.Module:
    block = _make_mixed(place, dict(arch.blocks[index]), norm_layer=norm_layer, **settings)
    if not place.attended:
        return block
    dd = {'device': settings['device'], 'dtype': settings['dtype']}
    tokens = arch.tokens[index]
    return AttendedBlock(
        block, TokenPath(place.in_chs, place.out_chs, arch['tokens'], tokens, norm_layer, **dd) if tokens else None
    )


def _make_mixed(place: Place, kernels: dict[int, int], device: Any, dtype: Any, **settings: Any) -> nn.Module:
    dd = {'device': device, 'dtype': dtype}
    if not kernels and place.is_residual:
        return DroppedBlock(place.in_chs)
    block = None
    if kernels:
        block = MixedBlock(
            place.in_chs, place.out_chs, kernels, stride=place.stride, skip=place.is_residual, **settings, **dd
        )
    if block is not None and place.is_residual:
        return block
    groups = gcd(place.in_chs, place.out_chs)
    return ProjectedBlock(
        block, create_conv2d(place.in_chs, place.out_chs, 1, stride=place.stride, groups=groups, padding='', **dd)
    )


def _neighbours(i: int, fused: int) -> range:
    """The inputs that branch i is fused from."""
    return range(max(0, i - 1), min(fused, i + 2))


def block_places(arch: Arch) -> list[Place]:
    """Where every block of the arch sits, in network order."""
    places: list[Place] = []

    def add(path: str, in_chs: int, out_chs: int, stride: int) -> None:
        places.append(Place(path, in_chs, out_chs, stride, attended=bool(_tokens(arch))))

    inputs: Sequence[int] = (arch['stem'][-1],)
    for stage, (depths, widths) in enumerate(arch['stages']):
        name = f'stages.{stage}'
        fused = len(inputs)
        for i in range(fused):
            for k, j in enumerate(_neighbours(i, fused)):
                add(f'{name}.fuse.{i}.{k}', inputs[j], widths[i], 2 ** max(0, i - j))
        for i in range(fused, len(widths)):
            add(f'{name}.grow.{i - fused}', widths[i - 1], widths[i], 2)
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            for b in range(depth):
                add(f'{name}.branches.{i}.{b}', width, width, 1)
        inputs = widths
    if arch['task'] == 'dense':
        add('head.block', sum(inputs), arch['head'][-1], 1)
        return places
    wide = arch['head'][:-1]
    for i, (a, b) in enumerate(zip(inputs, wide, strict=True)):
        add(f'head.widen.{i}', a, b, 1)
    for i, (a, b) in enumerate(pairwise(wide)):
        add(f'head.down.{i}', a, b, 2)
    return places


def _tokens(arch: Arch) -> int:
    """Maps that every block's tokens look at; 0 where the arch has no tokens."""
    tokens: int = dict(arch.shape).get('tokens', 0)
    return tokens


def check_arch(arch: Arch) -> Arch:
    """Check that an arch is a member of this space.

    Raises:
        ValueError: It names another space, a shape that makes no net, or kernel sizes that this space has not.
    """
    if arch.space != 'hr':
        raise ValueError(f'arch is of space {arch.space!r}, this model takes space "hr"')
    names = [name for name, _ in arch.shape]
    if {*names} - {'tokens'} != {'stem', 'stages', 'head', 'task'}:
        raise ValueError(f'arch: shape of space "hr" has stem, stages, head and task, and may have tokens, got {names}')
    if 'tokens' in names and not positive(arch['tokens']):
        raise ValueError(f'arch: tokens must be a positive number, got {arch["tokens"]!r}')
    if arch['task'] not in HEADS:
        raise ValueError(f'arch: task {arch["task"]!r} is unknown; choose from {", ".join(HEADS)}')
    if not (_widths(arch['stem']) and len(arch['stem']) == 2):
        raise ValueError(f'arch: stem must be two numbers of channels, got {arch["stem"]!r}')
    branches = 1
    stages = arch['stages']
    if not isinstance(stages, Sequence) or isinstance(stages, str) or not stages:
        raise ValueError(f'arch: stages must be a list of [[blocks per branch], [channels per branch]], got {stages!r}')
    for stage in stages:
        fits = isinstance(stage, Sequence) and len(stage) == 2 and all(map(_widths, stage))
        if not fits or len(stage[0]) != len(stage[1]) or len(stage[0]) < branches:
            raise ValueError(
                f'arch: a stage is [[blocks per branch], [channels per branch]] with no fewer branches than the one '
                f'before ({branches}), got {stage!r}'
            )
        branches = len(stage[0])
    wanted = branches + 1 if arch['task'] == 'classify' else 1
    if not (_widths(arch['head']) and len(arch['head']) == wanted):
        raise ValueError(f'arch: head for {arch["task"]!r} must be {wanted} numbers of channels, got {arch["head"]!r}')
    check_depth(arch, (depth for depths, _ in stages for depth in depths))
    return check_blocks(arch, [(place.path, True) for place in block_places(arch)], KERNELS)


def _widths(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and all(map(positive, value))


def full_arch(
    stages: Stages,
    stem: tuple[int, int],
    head: tuple[int, ...],
    dense: int,
    task: str,
    width: float = 1.0,
    tokens: int = 0,
) -> Arch:
    """The largest member with these stages: every kernel size at the full expansion ratio.

    Args:
        stages: `((blocks per branch), (channels per branch))` each.
        stem: Channels of the stem's two convolutions.
        head: Channels of the widened branches and of the features, for classification.
        dense: Channels of the features, for dense tasks.
        task: `classify` or `dense`.
        width: Multiplier of the widths but the features', to multiples of 2.
        tokens: Tokens of the attention path beside every block; 0 for none.
    """
    if not width > 0:
        raise ValueError(f'width must be above 0, got {width}')
    if task not in HEADS:
        raise ValueError(f'head {task!r} is unknown; choose from {", ".join(HEADS)}')
    if tokens < 0:
        raise ValueError(f'tokens must be at least 0, got {tokens}')

    def wide(channels: Sequence[int]) -> tuple[int, ...]:
        return tuple(make_divisible(c * width, 2) for c in channels)

    shape: tuple[tuple[str, Any], ...] = (
        ('stem', wide(stem)),
        ('stages', tuple((depths, wide(widths)) for depths, widths in stages)),
        ('head', (*wide(head[:-1]), head[-1]) if task == 'classify' else (dense,)),
        ('task', task),
        *((('tokens', tokens),) if tokens else ()),
    )
    return largest(Arch('hr', shape, ()))


def largest(arch: Arch) -> Arch:
    """The largest member of the same shape: what a supernet of this shape is."""
    places, tokens = block_places(arch), _tokens(arch)
    blocks = tuple(tuple((k, EXPAND_RATIO * place.in_chs) for k in KERNELS) for place in places)
    return Arch('hr', arch.shape, blocks, (tokens,) * len(places) if tokens else ())


SMALL = {'input_size': (3, 32, 32), 'pool_size': (1, 1), 'crop_pct': 1.0, 'num_classes': 10}
default_cfgs = generate_default_cfgs(
    {
        'supernet_hr.untrained': describe(),
        'supernet_hr_tiny.untrained': describe(**SMALL),
        'superticket_hr.untrained': describe(),
        **{f'superticket_hr_s{sparsity}.untrained': describe(**SMALL) for sparsity in (50, 80, 90)},
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MixedHRNet:
    feature_cfg = {'out_indices': (0, 1, 2, 3), 'feature_cls': 'getter'}
    model: MixedHRNet = create(MixedHRNet, variant, pretrained, feature_cfg, **kwargs)
    return model


@register_model
def supernet_hr(
    pretrained: bool = False, width: float = 1.0, head: str = 'classify', tokens: int = 0, **kwargs: Any
) -> MixedHRNet:
    """Supernet of the hr space; `head` is `classify` or `dense` (masks, keypoints), `tokens` stand by every block."""
    arch = full_arch(FULL, (24, 24), (36, 72, 144, 320, 1600), 90, head, width, tokens)
    return _create('supernet_hr', pretrained, arch=arch, **kwargs)


@register_model
def supernet_hr_tiny(
    pretrained: bool = False, width: float = 1.0, head: str = 'classify', tokens: int = 0, **kwargs: Any
) -> MixedHRNet:
    """A small supernet of the hr space for 32x32 images; arguments as those of `supernet_hr`."""
    arch = full_arch(TINY, (8, 8), (12, 16, 24, 32, 128), 24, head, width, tokens)
    return _create('supernet_hr_tiny', pretrained, arch=arch, **kwargs)


@register_model
def superticket_hr(pretrained: bool = False, arch: Any = None, **kwargs: Any) -> MixedHRNet:
    """Any member of the hr space; `arch` is an `Arch` or its JSON form, by default the largest member."""
    if arch is None:
        arch = full_arch(FULL, (24, 24), (36, 72, 144, 320, 1600), 90, 'classify')
    return _create('superticket_hr', pretrained, arch=arch, **kwargs)


def _found() -> Arch:
    return member(full_arch(TINY, (8, 8), (12, 16, 24, 32, 128), 24, 'classify'), FOUND)


@register_model
def superticket_hr_s50(pretrained: bool = False, **kwargs: Any) -> MixedHRNet:
    """A member of the hr space for 32x32 images, to be half sparse; there are no pretrained weights yet."""
    return _create('superticket_hr_s50', pretrained, arch=_found(), **kwargs)


@register_model
def superticket_hr_s80(pretrained: bool = False, **kwargs: Any) -> MixedHRNet:
    """The member of `superticket_hr_s50`, to be 80 % sparse; there are no pretrained weights yet."""
    return _create('superticket_hr_s80', pretrained, arch=_found(), **kwargs)


@register_model
def superticket_hr_s90(pretrained: bool = False, **kwargs: Any) -> MixedHRNet:
    """The member of `superticket_hr_s50`, to be 90 % sparse; there are no pretrained weights yet."""
    return _create('superticket_hr_s90', pretrained, arch=_found(), **kwargs)
