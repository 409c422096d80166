import json
import math
import sys

import pytest
import sizes
import torch

from timm_supertickets import Mask, Ticket


def test_the_entropy_of_a_mask():
    assert sizes.entropy(0.5) == 1
    assert sizes.entropy(0.25) == pytest.approx(2 - 0.75 * math.log2(3))
    assert sizes.entropy(0.1) == pytest.approx(sizes.entropy(0.9))
    assert sizes.entropy(0) == sizes.entropy(1) == 0


@pytest.mark.parametrize(('dtype', 'size'), [(torch.float32, 4), (torch.float16, 2)])
def test_the_bound_by_hand(dtype, size):
    weights = {'a': torch.ones(8, 8, dtype=dtype), 'b': torch.ones(16, dtype=dtype), 'n': torch.tensor(3)}
    alive = torch.arange(64).view(8, 8) % 4 == 0
    ticket = Ticket('resnet18', {}, {}, weights, Mask({'a': alive}))
    # 16 values live of 64, 16 others, one of 8 bytes, and 64 times 0.811 bits
    assert sizes.bound(ticket) == pytest.approx(16 * size + 16 * size + 8 + 8 * 0.8112781244591328)


def test_a_small_ticket_is_near_its_bound(monkeypatch):
    monkeypatch.setattr(sizes, 'SPARSITIES', (0.8,))
    monkeypatch.setattr(sizes, 'DTYPES', {'fp32': torch.float32})
    drawn = list(sizes.draw_all(['supernet_mbv2_tiny']))
    assert [what['scope'] for what, _ in drawn] == ['global', 'tensor']
    for _, ticket in drawn:
        found = sizes.measure(ticket)
        assert found['packed'] < 1.1 * found['bound']
        assert found['zstd'] < found['gzip'] < found['dense'] / 2
        assert ticket.sparsity == pytest.approx(0.8, abs=1e-4)


@pytest.mark.slow
def test_the_command_prints_and_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, 'argv', ['sizes.py', '--models', 'superticket_mbv2', '--json', str(tmp_path / 'sizes.json')]
    )
    sizes.main()
    rows = json.loads((tmp_path / 'sizes.json').read_text())
    assert len(rows) == 16
    printed = capsys.readouterr().out
    for row in rows:
        limit = 1.1 if row['sparsity'] <= 0.8 else 1.3
        assert row['packed'] <= limit * row['bound']
        assert row['packed'] < row['zstd'] < row['gzip'] < row['dense']
        assert f'{row["packed"]:,}' in printed
