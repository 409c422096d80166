"""Bench: how long one image takes on this machine, in torch and onnxruntime, as it is and baked."""

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from .bake import bake
from .cost import model_cost
from .export import input_size, missing_for_onnx, open_onnx, to_onnx
from .inference import sparse_inference, take_turns
from .ticket import Ticket


@dataclass(frozen=True)
class Timing:
    """One way to run a ticket.

    Args:
        name: What ran.
        macs: Its multiply-accumulates, zeros included: what a runtime does that does not skip them.
        times: Seconds of each turn.
        ratios: Of each turn to the first way's in the same round.
    """

    name: str
    macs: int
    times: list[float]
    ratios: list[float]


def bench_ticket(
    ticket: Ticket,
    *,
    img_size: int | None = None,
    threads: int | None = None,
    repeats: int = 50,
    compiled: bool = False,
    against: str | None = None,
) -> list[Timing]:
    """Measure a ticket, one image at a time, on the CPU.

    Args:
        ticket: A member of a space.
        img_size: Height and width of the image; by default those of the ticket's `pretrained_cfg`.
        threads: Of torch and onnxruntime; by default as many as torch uses.
        repeats: Turns that each way to run it takes.
        compiled: Also the baked model through `torch.compile`, which takes a compiler and a while.
        against: Also a model of timm, by its name, with random weights.

    Returns:
        The model as it is first. onnxruntime only where the `export` extra is installed.

    Raises:
        ValueError: A number out of range, no member of a space, no model of timm, or `torch.compile` fails.
    """
    for name, value, least in (('img_size', img_size, 1), ('threads', threads, 1), ('repeats', repeats, 2)):
        if value is not None and value < least:
            raise ValueError(f'{name} must be at least {least}, got {value}')
    if against and not timm.is_model(against):
        raise ValueError(f'against: timm has no model {against!r}; timm.list_models() has their names')
    model, size = ticket.build(), input_size(ticket, img_size)
    baked = bake(model)
    images = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    nets: dict[str, Any] = {'torch': model, 'torch, channels_last': _channels_last(model), 'torch, baked': baked}
    if against:
        nets[f'torch, {against}'] = timm.create_model(against, in_chans=size[0]).eval()
    macs = {name: model_cost(net, size).macs for name, net in nets.items()}
    runs: dict[str, Callable[[], object]] = {name: _run(net, images) for name, net in nets.items()}
    with _threads(threads or torch.get_num_threads()) as count:
        runs['torch, baked, sparse'] = _run(sparse_inference(baked, images), images)
        macs['torch, baked, sparse'] = macs['torch, baked']
        if compiled:
            runs['torch, baked, compiled'] = _compile(baked, images)
            macs['torch, baked, compiled'] = macs['torch, baked']
        if not missing_for_onnx():
            for twin in ('torch', 'torch, baked', *([f'torch, {against}'] if against else [])):
                name = twin.replace('torch', 'onnxruntime', 1)
                session = open_onnx(to_onnx(nets[twin], size, batch=1), threads=count)
                runs[name] = lambda session=session: session.run(None, {'images': images.numpy()})  # type: ignore[misc]
                macs[name] = macs[twin]
        with torch.inference_mode():
            times = take_turns(runs, repeats)
    first = times['torch']
    return [
        Timing(name, macs[name], taken, [a / b for a, b in zip(taken, first, strict=True)])
        for name, taken in times.items()
    ]


def show_timings(console: Console, timings: Iterable[Timing]) -> None:
    """A table: median and quartiles of milliseconds, the median ratio to the first row, MACs."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style='bold')
    table.add_column('one image at a time', no_wrap=True)
    for title in ('ms', 'quartiles', 'ratio', 'MMACs'):
        table.add_column(title, justify='right', no_wrap=True)
    for row in timings:
        low, middle, high = (f'{1e3 * value:.2f}' for value in statistics.quantiles(row.times, n=4, method='inclusive'))
        ratio = f'{statistics.median(row.ratios):.2f}'
        table.add_row(row.name, middle, f'{low} to {high}', ratio, f'{row.macs / 1e6:.2f}')
    console.print(table)


def _channels_last(model: nn.Module) -> nn.Module:
    twin: Any = copy.deepcopy(model)
    moved: nn.Module = twin.to(memory_format=torch.channels_last)
    return moved


def _run(net: Callable[[torch.Tensor], object], images: torch.Tensor) -> Callable[[], object]:
    return lambda: net(images)


def _compile(net: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    run = _run(torch.compile(net), images)
    try:
        with torch.inference_mode():
            run()
    except Exception as error:  # there are as many kinds as ways to lack a compiler
        reason = str(error).strip().partition('\n')[0]
        raise ValueError(f'torch.compile fails on this machine, {type(error).__name__}: {reason}') from error
    return run


@contextmanager
def _threads(count: int) -> Iterator[int]:
    """So many threads of torch, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)
