"""Bake: a model for inference only, rid of batch norm and of all channels that its zeros made constant or unread."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_device_dtype
from torch import Tensor, nn

from .attention import TokenPath
from .layers import DroppedBlock, MixedBlock, MixedDepthwiseConv2d
from .models.hr import ClassifyHead, MixedHRNet, ProjectedBlock
from .models.mbv2 import MixedMobileNetV2

# what these return; both are monotone. Any other activation may return anything
RANGES = {nn.ReLU: (0.0, inf), nn.ReLU6: (0.0, 6.0)}
# Channels of one launch come in multiples of the first of these that leaves at most SURPLUS more weights: onnxruntime
# takes more than twice as long where its blocked layouts do not fit, and torch a little longer; 16 gains no more than 8
STEPS = (8, 4, 1)
SURPLUS = 1 / 8
BRANCH = ('conv_pw', 'act1', 'conv_dw', 'act2')
STATISTICS = ('weight', 'bias', 'running_mean', 'running_var')


class Shift(DroppedBlock):
    """A residual block that adds the same numbers everywhere.

    Args:
        bias: What it adds to each channel.
    """

    def __init__(self, bias: Tensor) -> None:
        super().__init__(bias.numel())
        self.bias = nn.Parameter(bias.view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Add."""
        return x + self.bias


class BakedBlock(nn.Module):
    """A `MixedBlock` with a branch of expansion and depthwise convolution for every kernel size.

    In training one expansion for all keeps the channels of a block in one place. Here a split would make onnxruntime
    unpack the channels that it keeps in blocks, and torch copy them: at 224x224 onnxruntime takes half the time without
    it.

    Args:
        branches: By kernel size, as `k3`.
        conv_pwl: The projection.
        has_skip: Add the input to the output.
    """

    def __init__(self, branches: dict[str, nn.Module], conv_pwl: nn.Module, has_skip: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.conv_pwl = conv_pwl
        self.has_skip = has_skip

    def forward(self, x: Tensor) -> Tensor:
        """Expand and filter by kernel size, project, and add the input where the block is residual."""
        parts: list[Tensor] = []
        for branch in self.branches.values():
            parts.append(branch(x))
        y: Tensor = self.conv_pwl(torch.cat(parts, 1) if len(parts) > 1 else parts[0])
        return y + x if self.has_skip else y


@torch.no_grad()
def bake(model: nn.Module) -> nn.Module:
    """A new model for inference that computes the same with less; the given one stays as it is.

    Batch norm is folded into convolutions. Hidden channels go that nothing reads, and those that are the same
    everywhere, whatever the image: what they add goes into the bias behind them. Where an expansion's weights are dead,
    that is only so if the zeros around the map make no difference to the depthwise convolution. Blocks go that add
    nothing, and so do channels of the stem and of the head that are constant or unread. What is left in a block is
    ordered by the depthwise kernel size that its living weights need, so that kernels lose dead rings. A few dead
    channels may stay, or join: fast code wants multiples of 8.

    Scores and feature maps are those of the model in eval mode, to rounding; feature maps keep all of their channels,
    but the head's features lose some unless `num_classes` is 0. It cannot be trained, searched or drawn from: its
    `arch` is still that of the model it was made from.

    Args:
        model: A member of a space, with dead weights zero in place, in any mode.

    Returns:
        The baked model in eval mode, on the same device and in the same dtype.

    Raises:
        ValueError: The model is no member of our spaces, or its norm is no batch norm with running statistics.
    """
    if not isinstance(model, (MixedHRNet, MixedMobileNetV2)):
        raise ValueError(
            f'only members of the spaces hr and mbv2 can be baked, got {type(model).__name__}; bake before wrapping'
        )
    baked: Any = copy.deepcopy(model).cpu().double()  # not every device has float64
    baked.set_grad_checkpointing(False)
    _fold_all_(baked)
    before = inf
    while (left := sum(p.numel() + int(p.count_nonzero()) for p in baked.parameters())) < before:
        before = left  # what goes can leave more unread
        _thin_blocks_(baked)
        _thin_head_(baked)
        for writers, readers in _streams(baked):
            _thin_stream_(writers, readers)
    for name, block in _named_blocks(baked):
        baked.set_submodule(name, _arranged(block))
    baked.eval().requires_grad_(False).zero_grad()
    # channels_last: on a CPU, one thread, 0.3 to 0.9 of the time of contiguous weights from 32x32 to 224x224
    result: nn.Module = baked.to(**get_device_dtype(model), memory_format=torch.channels_last)
    return result


def _fold_all_(model: Any) -> None:
    """Fold every batch norm, and leave its activation in its place."""
    _fold_(model, 'conv_stem', 'bn1')
    if isinstance(model, MixedMobileNetV2):
        _fold_(model, 'conv_head', 'bn2')
    else:
        _fold_(model, 'conv2', 'bn2')
    for module in list(model.modules()):
        if isinstance(module, ClassifyHead):
            _fold_(module, 'conv', 'bn')
        elif isinstance(module, MixedBlock):
            _fold_(module, 'conv_pw', 'bn1')
            _fold_(module, 'conv_dw', 'bn2')
            _fold_(module, 'conv_pwl', 'bn3')
            _join_(module)
            module.drop_path = nn.Identity()
        elif isinstance(module, TokenPath):
            _fold_(module, 'conv_in', 'bn1')
            _fold_back_(module, 'bn2', 'conv_out')


def _fold_(parent: nn.Module, conv: str, norm: str) -> None:
    """Fold a batch norm into the convolution, or convolutions side by side, before it."""
    layers = _side_by_side(getattr(parent, conv))
    if not layers or layers[0].bias is not None:  # a head that was taken off; baked already
        return
    scale, shift = _affine(getattr(parent, norm))
    start = 0
    for layer in layers:
        part = slice(start, start := start + layer.out_channels)
        layer.weight = nn.Parameter(layer.weight * scale[part].view(-1, 1, 1, 1))
        layer.bias = nn.Parameter(shift[part])
    setattr(parent, norm, getattr(getattr(parent, norm), 'act', nn.Identity()))


def _fold_back_(parent: nn.Module, norm: str, conv: str) -> None:
    """Fold a batch norm without an activation into the 1x1 convolution behind it."""
    layer: Any = getattr(parent, conv)
    if layer.bias is None:
        scale, shift = _affine(getattr(parent, norm))
        layer.bias = nn.Parameter(layer.weight.flatten(1) @ shift)
        layer.weight = nn.Parameter(layer.weight * scale.view(-1, 1, 1))
        setattr(parent, norm, nn.Identity())


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift that a batch norm is in eval mode."""
    if any(getattr(norm, name, None) is None for name in STATISTICS):
        raise ValueError(f'only batch norm with running statistics can be folded, got {type(norm).__name__}')
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def _side_by_side(module: nn.Module) -> list[Any]:
    """The convolutions of a layer, in the order of the channels."""
    if isinstance(module, MixedDepthwiseConv2d):
        return list(module.values())
    return [module] if isinstance(module, nn.Conv2d) else []


def _named_blocks(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MixedBlock)]


def _thin_blocks_(model: nn.Module) -> None:
    for name, block in _named_blocks(model):
        if _thin_block_(block):
            continue
        parent: Any = model.get_submodule(name.rpartition('.')[0])
        added = block.conv_pwl.bias
        if isinstance(parent, ProjectedBlock):
            bias: Any = parent.shortcut.bias
            parent.block = None
            parent.shortcut.bias = nn.Parameter(added if bias is None else bias + added)
        elif block.has_skip:
            model.set_submodule(name, Shift(added) if added.any() else DroppedBlock(added.numel()))


def _join_(block: Any) -> None:
    """Make the depthwise convolutions one of the largest kernel size, until the channels that stay are known.

    It is looked at and thinned, but never run.
    """
    convs = _side_by_side(block.conv_dw)
    size = max(conv.kernel_size[0] for conv in convs)
    taps = [F.pad(conv.weight, [(size - conv.kernel_size[0]) // 2] * 4) for conv in convs]
    block.conv_dw = _depthwise(convs[0], torch.cat(taps), torch.cat([conv.bias for conv in convs]))


def _thin_block_(block: Any) -> bool:
    """Drop hidden channels; returns whether any is left. If none is, the block computes its bias, with one channel."""
    pw, dw, pwl = block.conv_pw, block.conv_dw, block.conv_pwl
    constant, value = _constants(_reach(pw, block.bn1), dw.weight, dw.bias, block.bn2)
    _absorb_(pwl, constant, value)
    alive = _is_read(pwl)
    index = (alive if alive.any() else torch.arange(len(alive)) == 0).nonzero().squeeze(1)
    _take_out_(pw, index)
    _take_out_(dw, index)
    _take_in_(pwl, index)
    return bool(alive.any())


def _arranged(block: Any) -> BakedBlock:
    """The block with channels ordered by the kernel size that they need, and a branch for each of these sizes.

    Dead channels come first, to fill up a step, and each step has the size that its last channel needs.
    """
    pw, dw, pwl = block.conv_pw, block.conv_dw, block.conv_pwl
    need, order = _extent(dw.weight).sort(stable=True)
    beside = pw.in_channels + pwl.out_channels
    weights = {step: int((_stepped(need, step).square() + beside).sum()) for step in STEPS}
    step = next(step for step in STEPS if weights[step] <= (1 + SURPLUS) * weights[1])
    sizes = _stepped(need, step)
    order = F.pad(order, (len(sizes) - len(need), 0))
    living = torch.arange(len(order)) >= len(sizes) - len(need)
    branches: dict[str, nn.Module] = {}
    for size in sizes.unique().tolist():
        index, alive = order[sizes == size], living[sizes == size]
        inner = slice((dw.kernel_size[0] - size) // 2, (dw.kernel_size[0] + size) // 2)
        tensors = [pw.weight[index], pw.bias[index], dw.weight[index][:, :, inner, inner], dw.bias[index]]
        for tensor in tensors:
            tensor[~alive] = 0
        layers = (_pointwise(*tensors[:2]), block.bn1, _depthwise(dw, *tensors[2:]), block.bn2)
        branches[f'k{size}'] = nn.Sequential(OrderedDict(zip(BRANCH, layers, strict=True)))
    _take_in_(pwl, order)
    pwl.weight[:, ~living] = 0
    return BakedBlock(branches, pwl, block.has_skip)


def _stepped(need: Tensor, step: int) -> Tensor:
    """Kernel sizes in whole steps, from those that channels need, in order; the first of them are of dead channels."""
    filled = F.pad(need, (-len(need) % step, 0), value=1)
    return filled.view(-1, step).amax(1).repeat_interleave(step)


def _pointwise(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A 1x1 convolution of these."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, dtype=weight.dtype)
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    return conv


def _depthwise(like: Any, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A depthwise convolution of these, with the stride and the dilation of another."""
    channels, size, dilation = len(weight), weight.shape[-1], like.dilation[0]
    padding = dilation * (size // 2)
    conv = nn.Conv2d(channels, channels, size, like.stride, padding, dilation, channels, dtype=weight.dtype)
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    return conv


def _extent(taps: Tensor) -> Tensor:
    """The smallest odd kernel size around the centre that holds each channel's living weights, at least 1."""
    size = taps.shape[-1]
    away = (torch.arange(size) - size // 2).abs()
    ring = torch.maximum(away.view(-1, 1), away)
    return 2 * ((taps[:, 0] != 0) * ring).flatten(1).amax(1) + 1


def _reach(conv: Any, act: Any) -> tuple[Tensor, Tensor]:
    """The least and the most that each channel of a convolution and its activation can be."""
    value = _apply(act, conv.bias)
    low, high = RANGES.get(type(act), (-inf, inf))
    dead = ~conv.weight.flatten(1).any(1)
    return torch.where(dead, value, low), torch.where(dead, value, high)


def _constants(reach: tuple[Tensor, Tensor], taps: Tensor, bias: Tensor, act: nn.Module) -> tuple[Tensor, Tensor]:
    """Which channels are the same everywhere behind a depthwise convolution and an activation, and what they are.

    Args:
        reach: The least and the most that each channel can be before it.
        taps: Kernels, `(C, 1, K, K)`.
        bias: `(C,)`.
        act: The activation.
    """
    taps = taps.flatten(1)
    beside = taps.clone()
    beside[:, taps.shape[1] // 2] = 0
    padded = beside.any(1)  # all but the centre of a kernel also meet the zeros around the map
    low = torch.where(padded, reach[0].clamp(max=0), reach[0])
    high = torch.where(padded, reach[1].clamp(min=0), reach[1])
    ends = torch.stack([low, high]).unsqueeze(2) * taps
    ends = torch.where(taps == 0, 0.0, ends)  # 0 * inf
    low, high = bias + ends.amin(0).sum(1), bias + ends.amax(0).sum(1)
    constant = low == high
    if type(act) in RANGES:
        constant = _apply(act, low) == _apply(act, high)
    return constant, _apply(act, low)


def _apply(act: nn.Module, channels: Tensor) -> Tensor:
    """An activation of numbers per channel; activations may work in place."""
    values: Tensor = act(channels.clone().view(1, -1, 1, 1)).flatten()
    return values


def _thin_head_(model: Any) -> None:
    """Drop channels of the last convolution that are constant or that the classifier does not read."""
    head: Any = model if isinstance(model, MixedMobileNetV2) else model.head
    conv, act = (
        (head.conv_head, head.bn2) if head is model else (getattr(head, 'conv', None), getattr(head, 'bn', None))
    )
    classifier = model.classifier
    if not isinstance(conv, nn.Conv2d) or not isinstance(classifier, nn.Linear):
        return
    copies = classifier.in_features // conv.out_channels  # one pooling, or two side by side
    low, high = _reach(conv, act)
    _absorb_(classifier, (low == high).repeat(copies), low.repeat(copies))
    index = _filled(_is_read(classifier).view(copies, -1).any(0))
    _take_out_(conv, index)
    _take_in_(classifier, torch.cat([index + copy * low.numel() for copy in range(copies)]))
    model.num_features, model.head_hidden_size = conv.out_channels, classifier.in_features


def _streams(model: Any) -> Iterator[tuple[list[nn.Module], list[nn.Module]]]:
    """What is written to the same channels, and all that reads them, unless these channels are a feature map's."""
    if isinstance(model, MixedHRNet):
        yield [model.conv_stem], [model.conv2]
        return
    writers: list[nn.Module] = [model.conv_stem]
    readers: list[nn.Module] = []
    feature_map = 0 in model.stage_ends
    for stage, blocks in enumerate(model.blocks, start=1):
        for block in blocks:
            if isinstance(block, MixedBlock):
                readers.append(block.conv_pw)
                if not block.has_skip:
                    if not feature_map:
                        yield writers, readers
                    writers, readers, feature_map = [], [], False
                writers.append(block.conv_pwl)
            elif isinstance(block, Shift):
                writers.append(block)
        feature_map = feature_map or stage in model.stage_ends


def _thin_stream_(writers: list[nn.Module], readers: list[nn.Module]) -> None:
    read = torch.stack([_is_read(reader) for reader in readers]).any(0)
    index = _filled(read)
    for writer in writers:
        for tensor in writer.parameters():
            tensor[~read] = 0
        _take_out_(writer, index)
    for reader in readers:
        _take_in_(reader, index)


def _filled(keep: Tensor) -> Tensor:
    """Indices of the channels to keep, at least one, and of others that fill up a step."""
    count = max(1, int(keep.sum()))
    step = next(step for step in STEPS if -count % step <= SURPLUS * count)
    wanted = min(count + -count % step, len(keep))
    return keep.logical_not().byte().argsort(stable=True)[:wanted].sort().values


def _is_read(layer: Any) -> Tensor:
    """Which inputs of a layer have a living weight."""
    read: Tensor = (layer.weight != 0).transpose(0, 1).flatten(1).any(1)
    return read


def _absorb_(layer: Any, constant: Tensor, value: Tensor) -> None:
    """Move what constant inputs add to a linear layer or 1x1 convolution into its bias."""
    layer.bias += layer.weight.flatten(1)[:, constant] @ value[constant]
    layer.weight[:, constant] = 0


def _take_out_(layer: Any, index: Tensor) -> None:
    """Keep these output channels of a layer, in this order."""
    if not isinstance(layer, Shift):
        layer.weight = nn.Parameter(layer.weight[index])
        layer.out_channels = len(index)
    layer.bias = nn.Parameter(layer.bias[index])


def _take_in_(layer: Any, index: Tensor) -> None:
    """Keep these input channels of a layer, in this order."""
    layer.weight = nn.Parameter(layer.weight[:, index])
    setattr(layer, 'in_features' if isinstance(layer, nn.Linear) else 'in_channels', len(index))
