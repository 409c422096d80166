"""Benchmark: what the parts cost on this machine, as ratios measured side by side in one process.

python recipes/benchmark.py [--repeats 15] [--threads N]
"""

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import timm
import torch
import train
from parts.program import keep_freed_memory
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import prune as masking

import timm_supertickets
from timm_supertickets import Mask, Ticket, bake, load_ticket, prunable
from timm_supertickets.bench import bench_ticket
from timm_supertickets.compiled import load_kernels
from timm_supertickets.cost import channel_macs, model_cost
from timm_supertickets.export import to_onnx
from timm_supertickets.layers import MixedBlock
from timm_supertickets.search.importance import GatePenalty, gate_importance, penalty_weights, shares_by_cost
from timm_supertickets.search.select import select_by_budget
from timm_supertickets.search.shrink import shrink, shrink_optimizer_
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import lamp, magnitude

# (input channels, output channels, side, residual): blocks of supernet_mbv2 at 224x224
BLOCKS = ((24, 24, 56, True), (32, 32, 28, True), (64, 64, 14, True), (96, 96, 14, True), (160, 160, 7, True))


class Branches(nn.Module):
    """A block as a sum of separate branches, one per kernel size, before one batch norm.

    Args:
        block: What it is instead of.
    """

    def __init__(self, block: MixedBlock) -> None:
        super().__init__()
        in_chs, out_chs = block.conv_pw.in_channels, block.conv_pwl.out_channels
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_chs, hidden, 1, bias=False),
                nn.BatchNorm2d(hidden),
                copy.deepcopy(block.bn1.act),
                nn.Conv2d(hidden, hidden, conv.kernel_size, conv.stride, conv.padding, groups=hidden, bias=False),
                nn.BatchNorm2d(hidden),
                copy.deepcopy(block.bn2.act),
                nn.Conv2d(hidden, out_chs, 1, bias=False),
            )
            for conv, hidden in zip(block.conv_dw.values(), block.conv_dw.splits, strict=True)
        )
        self.bn = nn.BatchNorm2d(out_chs)
        self.has_skip = block.has_skip

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the branches, normalised, plus the input where the block is residual."""
        summed = self.bn(sum(branch(x) for branch in self.branches))
        return summed + x if self.has_skip else summed


def piecewise(net: nn.Module) -> nn.Module:
    """The same net with separate branches, each of whose convolutions multiplies its weight by a mask."""
    net = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    for name, block in list(net.named_modules()):
        if isinstance(block, MixedBlock):
            net.set_submodule(name, Branches(block))
    for name in prunable(net):
        masking.random_unstructured(net.get_submodule(name.removesuffix('.weight')), 'weight', 0.8)
    return net.to(memory_format=torch.channels_last)


def side_by_side(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median times of two functions that take turns, in seconds, and the median of the ratios of each turn.

    Both run once before that, unless one turn is all that is asked for.
    """
    if repeats > 1:
        ours(), theirs()
    pairs = []
    for _ in range(repeats):
        times = []
        for function in (ours, theirs):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        pairs.append(times)
    a, b = zip(*pairs, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in pairs)


def training_step(net: nn.Module, images: Tensor) -> Callable[[], None]:
    """Forward and backward of a block."""

    def step() -> None:
        net.zero_grad()
        net(images).sum().backward()

    return step


def bench_blocks(repeats: int) -> list[tuple[str, float, float, float]]:
    """The fused block against separate branches, in training (batch 32) and inference (batch 1)."""
    rows = []
    totals = {'train': [0.0, 0.0], 'inference': [0.0, 0.0]}
    for in_chs, out_chs, side, skip in BLOCKS:
        hidden = 4 * in_chs
        fused = MixedBlock(in_chs, out_chs, dict.fromkeys((3, 5, 7), hidden), skip=skip)
        branches = Branches(fused)
        images = torch.randn(32, in_chs, side, side).to(memory_format=torch.channels_last)
        a, b, ratio = side_by_side(training_step(fused, images), training_step(branches, images), repeats)
        rows.append((f'block {in_chs} at {side}x{side}: fused / branches, train, batch 32', a, b, ratio))
        totals['train'] = [totals['train'][0] + a, totals['train'][1] + b]
        fused.eval(), branches.eval()
        one = images[:1].clone(memory_format=torch.channels_last)
        with torch.inference_mode():
            a, b, ratio = side_by_side(lambda: fused(one), lambda: branches(one), 4 * repeats)  # noqa: B023
        rows.append((f'block {in_chs} at {side}x{side}: fused / branches, inference, batch 1', a, b, ratio))
        totals['inference'] = [totals['inference'][0] + a, totals['inference'][1] + b]
    for name, (a, b) in totals.items():
        rows.append((f'all {len(BLOCKS)} blocks: fused / branches, {name}', a, b, a / b))
    return rows


def bench_step(name: str, repeats: int) -> list[tuple[str, float, float, float]]:
    """A step with penalty, mask and average against a plain one, and events in units of it; batch 64, 64x64."""
    size = (3, 64, 64)
    net = timm.create_model(name, num_classes=10).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(net)
    images, labels = torch.randn(64, *size).to(memory_format=torch.channels_last), torch.randint(10, (64,))
    optimizer, plain_optimizer = (torch.optim.SGD(n.parameters(), lr=1e-3, momentum=0.9) for n in (net, plain))
    mask: Mask = prune(magnitude(net), 0.8)
    groups = net.channel_groups()
    cost = model_cost(net, size)
    macs = channel_macs(groups, cost)
    penalty = GatePenalty(net, penalty_weights(macs))
    average = ModelEmaV3(net, decay=0.999)

    def step(model: nn.Module, opt: torch.optim.Optimizer, masked: bool) -> None:
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        (loss + 1e-4 * penalty() if masked else loss).backward()
        if masked:
            mask.zero_grads_(model)
        opt.step()
        if masked:
            mask.zero_weights_(model)
            average.update(model)

    pieces = piecewise(net)
    copied = [param.detach().clone() for param in pieces.parameters()]
    pieces_optimizer = torch.optim.SGD(pieces.parameters(), lr=1e-3, momentum=0.9)
    gates = [m.weight for m in pieces.modules() if isinstance(m, nn.BatchNorm2d)]

    def step_in_pieces() -> None:
        pieces_optimizer.zero_grad()
        loss = nn.functional.cross_entropy(pieces(images), labels)
        for gate in gates:
            loss = loss + 1e-4 * gate.abs().sum()
        loss.backward()
        pieces_optimizer.step()
        with torch.no_grad():
            for old, param in zip(copied, pieces.parameters(), strict=True):
                old.mul_(0.999).add_(param, alpha=0.001)

    def prune_event() -> None:
        prune(magnitude(net), 0.9, groups=groups)

    def lamp_event() -> None:
        prune(lamp(net), 0.9, groups=groups)

    def shrink_event() -> None:
        scores = shares_by_cost(gate_importance(net, groups), macs)
        keep = select_by_budget(groups, scores, macs, cost.macs, 0.5 * cost.macs)
        small, mover = shrink(net, keep), copy.copy(optimizer)
        mover.param_groups = [{**group} for group in optimizer.param_groups]
        mover.state = optimizer.state.copy()
        shrink_optimizer_(mover, net, small, groups, keep)

    rows = []
    a, b, ratio = side_by_side(lambda: step(net, optimizer, True), lambda: step(plain, plain_optimizer, False), repeats)
    rows.append((f'{name}, batch 64: step with penalty, mask and average / plain step', a, b, ratio))
    a, b, ratio = side_by_side(lambda: step(net, optimizer, True), step_in_pieces, repeats)
    rows.append((f'{name}, batch 64: the same / step of separate branches, layers, gates and averages', a, b, ratio))
    if load_kernels('gradients.cpp'):
        kernels = torch.ops.timm_supertickets_gradients.use
        kernels(False)  # where nothing else is said

        def with_kernels(model: nn.Module, opt: torch.optim.Optimizer, masked: bool) -> None:
            kernels(True)
            step(model, opt, masked)
            kernels(False)

        ours, theirs = (lambda how=how: how(plain, plain_optimizer, False) for how in (with_kernels, step))
        a, b, ratio = side_by_side(ours, theirs, repeats)
        rows.append((f'{name}, batch 64: plain step with compiled gradients / without', a, b, ratio))
        a, b, ratio = side_by_side(lambda: with_kernels(net, optimizer, True), step_in_pieces, repeats)
        what = 'step with penalty, mask, average and compiled gradients / that of separate branches'
        rows.append((f'{name}, batch 64: {what}', a, b, ratio))
    weights = sum(p.numel() for p in prunable(net).values())
    for what, event in (
        (f'prune event by magnitude, {weights:,} weights', prune_event),
        (f'prune event by LAMP, {weights:,} weights', lamp_event),
        ('search and shrink event to half the MACs', shrink_event),
    ):
        a, b, ratio = side_by_side(event, lambda: step(plain, plain_optimizer, False), max(3, repeats // 3))
        rows.append((f'{name}: {what} / plain step', a, b, ratio))
    return rows


def bench_run(name: str, threads: int) -> list[tuple[str, float, float, float]]:
    """A whole run that draws a ticket, searched to half the MACs, against training the un-shrunk net for as long."""
    long = ['rounds=8', 'round_steps=40', 'cooldown_steps=160', 'img_size=64', 'kernels=true', f'threads={threads}']

    def run(*args: str) -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            open(f'{folder}/log', 'w') as log,
            redirect_stdout(log),
            redirect_stderr(log),
        ):
            train.main([*long, f'model={name}', *args, f'output={folder}/run'])

    what = f'{name}, 480 steps on digits at 64x64: search, prune and draw s80 / train all of it (once)'
    ours, theirs = partial(run, 'targets=[0.8]', 'budget=0.5'), partial(run, 'targets=[0.0]', 'search=none')
    return [(what, *side_by_side(ours, theirs, 1))]


def bench_prune(repeats: int) -> list[tuple[str, float, float, float]]:
    """A hundred million scores pruned by exact k, against sorting a hundredth of them."""
    scores = {f'layer{i}': torch.rand(1000, 1000, 2) for i in range(50)}
    some = scores['layer0'].flatten()[:1_000_000]
    a, b, ratio = side_by_side(lambda: prune(scores, 0.8), lambda: some.sort(), max(3, repeats // 3))
    return [('prune 100,000,000 scores by exact k / sort 1,000,000', a, b, ratio)]


def bench_load(repeats: int) -> list[tuple[str, float, float, float]]:
    """Loading a packed ticket, verified, against the same weights dense, for which timm verifies nothing."""
    net = timm.create_model('supernet_mbv2', num_classes=10)
    for tensor in net.state_dict().values():
        if tensor.ndim == 1:  # batch norm's, which are all alike before training
            tensor.uniform_(0.5, 1.5)
    rows = []
    for sparsity in (0.5, 0.8, 0.9, 0.95):
        ticket = Ticket.draw(net, prune(magnitude(net), sparsity))
        with tempfile.TemporaryDirectory() as folder:
            packed, dense = ticket.save(f'{folder}/packed'), ticket.save(f'{folder}/dense', dense=True)
            a, b, ratio = side_by_side(
                lambda: timm.create_model(f'local-dir:{packed}', pretrained=True),  # noqa: B023
                lambda: timm.create_model(f'local-dir:{dense}', pretrained=True),  # noqa: B023
                repeats,
            )
        name = f'create_model of supernet_mbv2 at s{100 * sparsity:g}, pretrained: packed / dense file'
        rows.append((name, a, b, ratio))
    with tempfile.TemporaryDirectory() as folder:
        file = f'{folder}/model.safetensors'
        save_file(timm.create_model('mobilenetv2_100').state_dict(), file)
        overlay = {'file': file}
        a, b, ratio = side_by_side(
            lambda: timm.create_model('superticket_mbv2_s50', pretrained=True),
            lambda: timm.create_model('mobilenetv2_100', pretrained=True, pretrained_cfg_overlay=overlay),
            repeats,
        )
    rows.append(('create_model, pretrained: superticket_mbv2_s50 / mobilenetv2_100 from a dense file', a, b, ratio))
    return rows


def bench_inference(name: str, threads: int, repeats: int) -> list[tuple[str, float, float, float]]:
    """A pretrained ticket at 224x224, one image at a time, against itself unbaked and a dense net."""
    ticket, dense = load_ticket(name), 'mobilenetv2_100'
    timings = bench_ticket(ticket, img_size=224, threads=threads, repeats=10 * repeats, against=dense)
    taken = {timing.name: timing.times for timing in timings}
    rows = []
    for ours, theirs in (
        ('torch, baked', 'torch'),
        ('torch, baked, sparse', 'torch'),
        ('torch, baked, sparse', 'onnxruntime'),
        ('onnxruntime, baked', 'onnxruntime'),
        ('onnxruntime, baked', f'onnxruntime, {dense}'),
    ):
        pairs = list(zip(taken[ours], taken[theirs], strict=True))
        a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
        rows.append((f'{name} at 224: {ours} / {theirs}', a, b, statistics.median(a / b for a, b in pairs)))
    return rows + where_time_goes(ticket, threads, repeats)


def where_time_goes(ticket: Ticket, threads: int, repeats: int) -> list[tuple[str, float, float, float]]:
    """What onnxruntime spends on kinds of layers of a baked ticket at 224x224, of all that it spends."""
    import onnx
    import onnxruntime

    data = to_onnx(bake(ticket.build()), (3, 224, 224), batch=1)
    image = torch.randn(1, 3, 224, 224).numpy()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    options.log_severity_level = 3  # it warns that an optimized graph is for one machine only
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f'{folder}/profile'
        options.optimized_model_filepath = f'{folder}/optimized.onnx'
        session = onnxruntime.InferenceSession(data, options, providers=['CPUExecutionProvider'])
        for _ in range(10 * repeats):
            session.run(None, {'images': image})
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx.load(options.optimized_model_filepath).graph
    shapes = {constant.name: constant.dims for constant in graph.initializer}
    kinds = {}
    for node in graph.node:
        weight = next((shapes[name] for name in node.input[1:] if len(shapes.get(name, ())) == 4), None)
        if node.op_type.endswith('Conv') and weight:
            kinds[node.name] = '1x1 convolutions' if weight[2] == 1 else 'depthwise and other convolutions'
    spent: dict[str, list[float]] = {}
    for event in events:
        name, _, what = event['name'].rpartition('_kernel_time')
        if event.get('cat') == 'Node' and name and not what:
            spent.setdefault(kinds.get(name, 'the rest'), []).append(1e-6 * event['dur'])
    total = sum(map(sum, spent.values()))
    runs = 10 * repeats
    return [
        (f'of that, in onnxruntime baked: {kind} / all', sum(times) / runs, total / runs, sum(times) / total)
        for kind, times in sorted(spent.items())
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--repeats', type=int, default=15, help='turns that each pair takes')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of torch')
    args = parser.parse_args()
    keep_freed_memory()  # as in training
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = bench_blocks(args.repeats)
    for name in ('supernet_mbv2', 'supernet_mbv2_small', 'supernet_hr_tiny'):
        rows += bench_step(name, args.repeats)
    rows += bench_prune(args.repeats) + bench_load(args.repeats)
    for name in ('superticket_mbv2_s80', 'superticket_mbv2_s90'):
        rows += bench_inference(name, args.threads, args.repeats)
    rows += bench_run('supernet_mbv2_small', args.threads)
    table = Table(
        title=f'timm_supertickets {timm_supertickets.__version__}, torch {torch.__version__}, '
        f'{platform.machine()}, {args.threads} threads, medians of {args.repeats} turns'
    )
    for column in ('what', 'ms', 'against ms', 'ratio'):
        table.add_column(column, justify='left' if column == 'what' else 'right')
    for name, a, b, ratio in rows:
        table.add_row(name, f'{1e3 * a:.2f}', f'{1e3 * b:.2f}', f'{ratio:.3f}')
    Console(width=120).print(table)


if __name__ == '__main__':
    main()
