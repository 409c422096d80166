"""Sparse inference: per layer the way to run it that is fastest on this machine, where zeros may be skipped or not."""

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from .bake import RANGES
from .compiled import load_kernels

WARMUP = 3
GAIN = 0.95  # a way other than torch's must take at most this share of its time: less could be noise
KERNELS = 'kernels.cpp'


def take_turns(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds that functions take, one after the other in every round, so that a busy moment hits them alike."""
    for function in functions.values():
        for _ in range(WARMUP):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return times


@torch.no_grad()
def sparse_inference(model: nn.Module, images: Tensor, *, repeats: int = 15) -> nn.Module:
    """A new model for inference on this machine's CPU, each convolution run in the way that was fastest here.

    Measured for such images and as many threads as torch has now: contiguous and channels-last memory; for 1x1
    convolutions torch's product of a CSR matrix; and, where there are a C++ compiler and ninja, kernels of our own that
    skip zeros, for 1x1 and depthwise convolutions. They are compiled once, in half a minute, and kept where torch keeps
    extensions (`TORCH_EXTENSIONS_DIR`). What is not clearly faster stays torch's. Bake a ticket first.

    It computes what the model computes, to rounding; it cannot be trained, compiled or exported.

    Args:
        model: Any model with dead weights zero in place; it stays as it is.
        images: What it will see: `(N, C, H, W)`; other shapes run as well, but were not measured.
        repeats: Turns that each way takes.

    Returns:
        The model in eval mode; where nothing is faster, the dense one in the better memory format.

    Raises:
        ValueError: Weights or images are not float32 on the CPU.
    """
    for what, tensors in (('weights', list(model.parameters())), ('images', [images])):
        for tensor in tensors:
            if tensor.device.type != 'cpu' or tensor.dtype != torch.float32:
                raise ValueError(f'{what} must be float32 on the CPU, got {tensor.dtype} on {tensor.device}')
    plain: Any = copy.deepcopy(model).eval().requires_grad_(False)
    nets: dict[str, nn.Module] = {
        'channels_last': copy.deepcopy(plain).to(memory_format=torch.channels_last),
        'contiguous': plain.to(memory_format=torch.contiguous_format),
    }
    nets['sparse'] = _fastest_layers(plain, images, repeats)
    times = take_turns({name: lambda net=net: net(images) for name, net in nets.items()}, repeats)  # type: ignore[misc]
    taken = {name: statistics.median(values) for name, values in times.items()}
    dense = min('channels_last', 'contiguous', key=taken.__getitem__)
    return nets['sparse' if taken['sparse'] < GAIN * taken[dense] else dense]


def _fastest_layers(plain: nn.Module, images: Tensor, repeats: int) -> nn.Module:
    """A copy whose convolutions are replaced where something else is faster on what they are given."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: seen.__setitem__(name, args[0].contiguous().clone())

    convs = {name: module for name, module in plain.named_modules() if type(module) is nn.Conv2d}
    hooks = [conv.register_forward_pre_hook(keep(name)) for name, conv in convs.items()]
    plain(images)
    for hook in hooks:
        hook.remove()
    net = copy.deepcopy(plain)
    for name, x in seen.items():
        ways = {'dense': convs[name], **_other_ways(convs[name])}
        if len(ways) == 1:
            continue
        times = take_turns({key: lambda way=way: way(x) for key, way in ways.items()}, repeats)  # type: ignore[misc]  # noqa: B023
        taken = {key: statistics.median(values) for key, values in times.items()}
        best = min(taken, key=taken.__getitem__)
        if taken[best] < GAIN * taken['dense']:
            net.set_submodule(name, ways[best])
    for module in [module for module in net.modules() if isinstance(module, nn.Sequential)]:
        for (_, layer), (name, act) in pairwise(list(module.named_children())):
            if isinstance(layer, (SparsePointwise, SparseDepthwise)) and type(act) in RANGES:
                layer.range = RANGES[type(act)]  # our kernels do it while they write
                module.set_submodule(name, nn.Identity())
    return net


def _other_ways(conv: nn.Conv2d) -> dict[str, nn.Module]:
    """What else computes this convolution."""
    ways: dict[str, nn.Module] = {}
    padding = conv.padding
    square = all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.dilation, padding))
    if not square or isinstance(padding, str) or conv.padding_mode != 'zeros':
        return ways
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and padding == (0, 0) and conv.groups == 1:
        ways['csr'] = CsrPointwise(conv)
        if load_kernels(KERNELS):
            ways['compiled'] = SparsePointwise(conv)
    elif conv.groups == conv.in_channels == conv.out_channels and load_kernels(KERNELS):
        ways['compiled'] = SparseDepthwise(conv)
    return ways


class CsrPointwise(nn.Module):
    """A 1x1 convolution as torch's product of a CSR matrix and all pixels.

    Args:
        conv: What it is instead of.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.register_buffer('weight', _csr(conv))
        self.register_buffer('bias', _bias(conv)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        pixels = x.transpose(0, 1).reshape(x.shape[1], -1)
        y = torch.addmm(self.bias, self.weight, pixels)  # type: ignore[arg-type]
        return y.view(-1, x.shape[0], *x.shape[2:]).transpose(0, 1).contiguous()


class SparsePointwise(nn.Module):
    """A 1x1 convolution by our kernel, whose time goes with the living weights.

    Args:
        conv: What it is instead of.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        weight = _csr(conv)
        self.register_buffer('rows', weight.crow_indices())
        self.register_buffer('columns', weight.col_indices())
        self.register_buffer('values', weight.values())
        self.register_buffer('bias', _bias(conv))
        self.in_channels, self.range = conv.in_channels, (-inf, inf)

    def forward(self, x: Tensor) -> Tensor:
        """Add up what living weights take from their channels."""
        matrix = (self.rows, self.columns, self.values, self.bias)
        y: Tensor = torch.ops.timm_supertickets.pointwise(x, *matrix, self.in_channels, *self.range)
        return y


class SparseDepthwise(nn.Module):
    """A depthwise convolution by our kernel, which leaves dead taps out.

    Args:
        conv: What it is instead of.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.register_buffer('weight', conv.weight.detach().contiguous())
        self.register_buffer('bias', _bias(conv))
        self.settings = (conv.stride[0], int(conv.padding[0]), conv.dilation[0])
        self.range = (-inf, inf)

    def forward(self, x: Tensor) -> Tensor:
        """Add up shifted maps."""
        y: Tensor = torch.ops.timm_supertickets.depthwise(x, self.weight, self.bias, *self.settings, *self.range)
        return y


def _csr(conv: nn.Conv2d) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Sparse CSR tensor support is in beta')
        return conv.weight.detach().flatten(1).to_sparse_csr()


def _bias(conv: nn.Conv2d) -> Tensor:
    return torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().clone()
