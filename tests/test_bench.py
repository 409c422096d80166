import shutil

import pytest
import timm
import torch

from timm_supertickets import Mask, Ticket, bake, bench, export, prunable
from timm_supertickets.bench import Timing, bench_ticket, show_timings
from timm_supertickets.cost import model_cost
from timm_supertickets.inference import take_turns
from timm_supertickets.show import make_console

ARCH = {
    'space': 'mbv2',
    'shape': {'stem': 8, 'stages': [[8, 1, 1]], 'head': 16},
    'blocks': [{'3': 6, '7': 2}],
}


@pytest.fixture
def ticket():
    """Four of the eight hidden channels are read by nothing."""
    torch.manual_seed(0)
    model = timm.create_model('superticket_mbv2', arch=ARCH, num_classes=3)
    mask = Mask.dense(prunable(model))
    mask['blocks.0.0.conv_pwl.weight'][:, :4] = False
    return Ticket.draw(model, mask, data_config={'input_size': (3, 32, 32)})


def test_the_table_by_hand(capsys):
    times = [0.001, 0.002, 0.003, 0.004, 0.100]
    show_timings(
        make_console(), [Timing('torch', 2_500_000, times, [1.0] * 5), Timing('b', 1, times, [0.5, 0.25, 0.4, 9, 0.1])]
    )
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ['one', 'image', 'at', 'a', 'time', 'ms', 'quartiles', 'ratio', 'MMACs'],
        ['torch', '3.00', '2.00', 'to', '4.00', '1.00', '2.50'],
        ['b', '3.00', '2.00', 'to', '4.00', '0.40', '0.00'],
    ]


@pytest.mark.parametrize('installed', [True, False])
def test_a_ticket_is_measured(ticket, monkeypatch, installed):
    if installed:
        for name in export.NEEDED:
            pytest.importorskip(name)
    else:
        monkeypatch.setattr(bench, 'missing_for_onnx', lambda: ['onnx'])
    before = torch.get_num_threads()
    seen = []
    monkeypatch.setattr(bench, 'take_turns', lambda *args: seen.append(torch.get_num_threads()) or take_turns(*args))
    rows = {row.name: row for row in bench_ticket(ticket, img_size=48, threads=before + 1, repeats=2)}
    torches = ['torch', 'torch, channels_last', 'torch, baked', 'torch, baked, sparse']
    assert list(rows) == torches + ['onnxruntime', 'onnxruntime, baked'] * installed
    assert (seen, torch.get_num_threads()) == ([before + 1], before)
    dense, baked = (model_cost(model, (3, 48, 48)).macs for model in (ticket.build(), bake(ticket.build())))
    assert [row.macs for row in rows.values()] == [dense, dense, baked, baked] + [dense, baked] * installed
    assert baked < dense
    for row in rows.values():
        assert len(row.times) == 2
        assert min(row.times) > 0
        assert row.ratios == [a / b for a, b in zip(row.times, rows['torch'].times, strict=True)]


def test_compiling_is_measured_or_its_failure_said_in_a_line(ticket, monkeypatch):
    monkeypatch.setattr(bench, 'missing_for_onnx', lambda: ['onnx'])
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda net: compiled.append(net) or net)
    rows = bench_ticket(ticket, repeats=2, compiled=True)
    assert [row.name for row in rows][-1] == 'torch, baked, compiled'
    assert rows[-1].macs == rows[-2].macs
    assert sum(param.numel() for param in compiled[0].parameters()) == sum(
        param.numel() for param in bake(ticket.build()).parameters()
    )

    def broken(_):
        def run(_):
            raise RuntimeError('no compiler\nanywhere')

        return run

    monkeypatch.setattr(torch, 'compile', broken)
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match=r'^torch.compile fails on this machine, RuntimeError: no compiler$'):
        bench_ticket(ticket, threads=threads + 1, compiled=True)
    assert torch.get_num_threads() == threads


def test_a_model_of_timm_is_measured_beside_it(ticket):
    for name in export.NEEDED:
        pytest.importorskip(name)
    rows = bench_ticket(ticket, img_size=48, repeats=2, against='test_efficientnet')
    assert [row.name for row in rows] == [
        'torch', 'torch, channels_last', 'torch, baked', 'torch, test_efficientnet', 'torch, baked, sparse',
        'onnxruntime', 'onnxruntime, baked', 'onnxruntime, test_efficientnet',
    ]  # fmt: skip
    macs = {row.name: row.macs for row in rows}
    other = model_cost(timm.create_model('test_efficientnet'), (3, 48, 48)).macs
    assert macs['torch, test_efficientnet'] == macs['onnxruntime, test_efficientnet'] == other
    with pytest.raises(ValueError, match="against: timm has no model 'mobilnet'"):
        bench_ticket(ticket, against='mobilnet')


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='no compiler')
def test_compiling_for_real(ticket, monkeypatch):
    monkeypatch.setattr(bench, 'missing_for_onnx', lambda: ['onnx'])
    assert bench_ticket(ticket, repeats=2, compiled=True)[-1].name == 'torch, baked, compiled'
