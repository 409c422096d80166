"""Sizes: what a packed ticket takes on disk, against its dense file, gzip and zstd of that, and the information in it.

python recipes/sizes.py [--models superticket_mbv2 supernet_mbv2_tiny] [--json sizes.json]
"""

import argparse
import gzip
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import zstandard
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import timm_supertickets
from timm_supertickets import Ticket, load_ticket
from timm_supertickets.files import dump_json, write_atomic
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import magnitude
from timm_supertickets.ticket import PACKED

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
SCOPES = ('global', 'tensor')
DTYPES = {'fp32': torch.float32, 'fp16': torch.float16}


def entropy(p: float) -> float:
    """Bits per weight of a mask with a share `p` alive, if nothing else is known of it."""
    return -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) if 0 < p < 1 else 0.0


def bound(ticket: Ticket) -> float:
    """Bytes: living values and all other tensors at their dtype, and each mask at its entropy."""
    total = 0.0
    for name, weight in ticket.weights.items():
        alive = ticket.mask.get(name)
        if alive is None:
            total += weight.numel() * weight.element_size()
        else:
            living = int(alive.sum())
            total += living * weight.element_size() + alive.numel() * entropy(living / alive.numel()) / 8
    return total


def make_net(model: str) -> nn.Module:
    """A net with random weights, and random norms as after training: constants would compress to nothing."""
    torch.manual_seed(0)
    net: nn.Module = timm.create_model(model)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            state = module.state_dict()
            for name in ('weight', 'running_var'):
                state[name].uniform_(0.5, 1.5)
            for name in ('bias', 'running_mean'):
                state[name].normal_(0, 0.1)
    return net


def draw_all(models: list[str]) -> Iterator[tuple[dict[str, Any], Ticket]]:
    """A ticket for every model, sparsity, scope and precision."""
    for model in models:
        for dtype_name, dtype in DTYPES.items():
            scores = magnitude(make_net(model))
            net = make_net(model).to(dtype)
            for scope in SCOPES:
                for sparsity in SPARSITIES:
                    what = {'model': model, 'dtype': dtype_name, 'scope': scope, 'sparsity': sparsity}
                    yield what, Ticket.draw(net, prune(scores, sparsity, scope=scope))


def measure(ticket: Ticket) -> dict[str, float]:
    """Bytes of a ticket in each form."""
    dense = safetensors.torch.save(ticket.weights)
    with tempfile.TemporaryDirectory() as folder:
        packed = ticket.save(Path(folder) / 'ticket') / PACKED
        load_ticket(packed)
        size = packed.stat().st_size
    return {
        'packed': size,
        'dense': len(dense),
        'gzip': len(gzip.compress(dense, 9)),
        'zstd': len(zstandard.ZstdCompressor(level=19).compress(dense)),
        'bound': round(bound(ticket)),
    }


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--models', nargs='+', default=['superticket_mbv2', 'supernet_mbv2_tiny'])
    parser.add_argument('--json', type=Path, help='also write the figures here')
    args = parser.parse_args()
    count = len(args.models) * len(DTYPES) * len(SCOPES) * len(SPARSITIES)
    rows = [{**what, **measure(ticket)} for what, ticket in track(draw_all(args.models), 'measuring', total=count)]
    table = Table(
        title=f'timm_supertickets {timm_supertickets.__version__}: bytes of a packed ticket, and what that is of its '
        'dense file, of gzip -9 and zstd -19 of the dense file, and of the bound'
    )
    for column in ('model', 'dtype', 'scope', 'dead', 'bytes', 'dense', 'gzip', 'zstd', 'bound'):
        table.add_column(column, justify='left' if column in ('model', 'dtype', 'scope') else 'right')
    for row in rows:
        shares = (f'{row["packed"] / row[name]:.3f}' for name in ('dense', 'gzip', 'zstd', 'bound'))
        dead = f'{100 * row["sparsity"]:.0f} %'
        table.add_row(row['model'], row['dtype'], row['scope'], dead, f'{row["packed"]:,}', *shares)
    Console(width=120).print(table)
    if args.json:
        write_atomic(args.json, dump_json(rows))


if __name__ == '__main__':
    main()
