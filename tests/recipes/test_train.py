import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import train
from matplotlib import image
from parts.state import State

from timm_supertickets import load_ticket, prunable

ROOT = Path(__file__).parents[2]
SMOKE = ['--config', str(ROOT / 'recipes/configs/smoke.yaml'), 'threads=1']  # more would wait for other tests' load
QUICK = [*SMOKE, 'rounds=2', 'round_steps=3', 'cooldown_steps=2', 'targets=[0.4,0.8]', 'batch_size=8']
FOUR_ROUNDS = [*QUICK, 'rounds=4', 'ema_decay=0.9']
TICKETS = {'superticket_mbv2_s50': 0.5, 'superticket_mbv2_s80': 0.8, 'superticket_mbv2_s90': 0.9}


def launch(*args, **kwargs):
    command = [str(Path(sys.executable).with_name('accelerate')), 'launch', 'recipes/train.py', *args]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def ticket_bytes(output):
    return {str(f.relative_to(output)): f.read_bytes() for f in sorted(Path(output).glob('superticket*/*'))}


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    """A real launch of the smoke config."""
    output = tmp_path_factory.mktemp('launched') / 'smoke'
    process = launch(*SMOKE, f'output={output}', env={**os.environ, 'COLUMNS': '140'})
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return output, out, err


def test_launch_prints_progress_a_table_and_lines_that_load(smoke):
    output, out, err = smoke
    assert re.search(r'superticket_mbv2_s90: 100%.*60/60', err)
    for name in TICKETS:
        assert re.search(rf'{name} .*599', out)
    lines = [line for line in out.splitlines() if line.startswith(('import', 'timm.create_model'))]
    assert len(lines) == 4
    space = {}
    for line in lines:
        exec(line if line.startswith('import') else f'loaded = {line}', space)
    assert space['loaded'].num_classes == 10
    assert str(output) in lines[-1]


@pytest.mark.parametrize(('name', 'sparsity'), TICKETS.items())
def test_sparsity_is_exact_everywhere(smoke, tmp_path, name, sparsity):
    folder = smoke[0] / name
    ticket = load_ticket(folder)
    total = sum(w.numel() for w in prunable(ticket.build()).values())
    dead = round(sparsity * total)
    assert (ticket.mask.total, ticket.mask.alive) == (total, total - dead)
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert sum(int((w == 0).sum()) for w in prunable(loaded).values()) == dead
    dense = load_ticket(ticket.save(tmp_path / 'dense', dense=True) / 'model.safetensors')
    assert sum(int((dense.weights[key] == 0).sum()) for key in dense.mask) == dead


def test_a_ticket_scores_what_its_facts_say(smoke):
    ticket = load_ticket(smoke[0] / 'superticket_mbv2_s50')
    from accelerate import Accelerator
    from parts.classification import create_data, top1
    from parts.config import Config

    accelerator = Accelerator()
    assert top1(ticket.build(), create_data(Config(), accelerator), accelerator) == ticket.facts['top1']
    assert ticket.facts['n'] == 599
    assert ticket.facts['versions']['torch'] == torch.__version__


def test_summary_holds_a_row_per_event_and_ticket(smoke):
    rows = list(csv.DictReader((smoke[0] / 'summary.csv').read_text().splitlines()))
    assert [row['name'] for row in rows if row['name'] == 'trunk'] == ['trunk'] * 4
    assert {row['name'] for row in rows} == {'trunk', *TICKETS}
    macs = [int(row['macs']) for row in rows if row['name'] == 'trunk']
    assert macs[0] > macs[1] == macs[3]  # half of the trunk searches
    for row in rows:
        if row['name'] in TICKETS:
            half_a_weight = 0.5 / load_ticket(smoke[0] / row['name']).mask.total + 1e-12
            assert float(row['sparsity']) == pytest.approx(TICKETS[row['name']], abs=half_a_weight)
            assert float(row['sparsity_all']) < float(row['sparsity'])
            assert int(row['bytes']) == (smoke[0] / row['name'] / 'ticket.safetensors').stat().st_size


def test_pictures_show_something(smoke):
    for name in ('rounds.png', 'kernels.png', 'density.png'):
        assert image.imread(smoke[0] / name).std() > 0.05


def test_run_again_trains_nothing_and_prints_the_same_table(smoke, capsys, monkeypatch):
    output, out, _ = smoke
    before = ticket_bytes(output)
    monkeypatch.setattr(train, 'train', None)
    monkeypatch.setenv('COLUMNS', '140')
    train.main([*SMOKE, f'output={output}'])
    assert capsys.readouterr().out.splitlines()[-4:] == out.splitlines()[-4:]
    assert ticket_bytes(output) == before


def test_resolved_config_repeats_the_run_bit_for_bit(smoke, tmp_path):
    train.main(['--config', str(smoke[0] / 'config.yaml'), f'output={tmp_path / "again"}'])
    again, before = ticket_bytes(tmp_path / 'again'), ticket_bytes(smoke[0])
    assert again.keys() == before.keys()
    assert len(again) == 6
    for name in TICKETS:
        ticket, other = (load_ticket(folder / name) for folder in (tmp_path / 'again', smoke[0]))
        assert ticket.weights.keys() == other.weights.keys()
        assert all(torch.equal(tensor, other.weights[key]) for key, tensor in ticket.weights.items())
        assert {**ticket.facts, 'command': ''} == {**other.facts, 'command': ''}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """An uninterrupted run of four rounds and two tickets."""
    output = tmp_path_factory.mktemp('uninterrupted') / 'run'
    train.main([*FOUR_ROUNDS, f'output={output}'])
    return output


@pytest.mark.parametrize('stretch', [0, 1, 2, 5], ids=['round 1', 'ticket s40', 'round 2', 'ticket s80'])
def test_interrupted_and_resumed_equals_uninterrupted(whole, tmp_path, monkeypatch, stretch):
    trained = []
    train_stretch = train.train

    def interrupted(*args):
        loss = train_stretch(*args)
        if len(trained) == stretch:
            raise KeyboardInterrupt
        trained.append(loss)
        return loss

    output = tmp_path / 'run'
    monkeypatch.setattr(train, 'train', interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main([*FOUR_ROUNDS, f'output={output}'])
    assert len(trained) == stretch
    monkeypatch.undo()
    train.main([*FOUR_ROUNDS, f'output={output}'])
    assert ticket_bytes(output) == ticket_bytes(whole)
    rows, expected = ((run / 'summary.csv').read_text().splitlines() for run in (output, whole))
    assert [row.rpartition(',')[0] for row in rows] == [row.rpartition(',')[0] for row in expected]  # but for seconds


@pytest.mark.slow
def test_killed_and_launched_again_equals_uninterrupted(smoke, tmp_path):
    output = tmp_path / 'killed'
    process = launch(*SMOKE, f'output={output}', start_new_session=True)
    deadline = time.monotonic() + 120
    while not (output / 'checkpoints/round_00002').exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(list(output.glob('superticket*'))) < 3
    assert launch(*SMOKE, f'output={output}').communicate(timeout=300)
    assert ticket_bytes(output) == ticket_bytes(smoke[0])


@pytest.mark.parametrize(
    'changes',
    [
        ['reactivation=none'],
        ['reactivation=reset'],
        ['reactivation=regrow', 'regrow_share=0.5'],
        ['search=threshold', 'threshold=0.99', 'penalty=0.1'],
        ['search=none', 'schedule=steps'],
        ['scope=tensor', 'floor=3', 'opt=adamw', 'lr=0.001', 'clip_grad=1.0'],
        ['in_chans=1', 'cooldown_steps=0', 'warmup_steps=4'],
    ],
    ids=lambda changes: '-'.join(changes),
)
def test_every_choice_draws_exact_tickets(tmp_path, changes):
    train.main([*QUICK, *changes, f'output={tmp_path / "run"}'])
    for name, sparsity in (('s40', 0.4), ('s80', 0.8)):
        ticket = load_ticket(tmp_path / f'run/superticket_mbv2_{name}')
        assert ticket.mask.total - ticket.mask.alive == round(sparsity * ticket.mask.total)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    main_round = train.train_round

    def poisoned(run, config, state):
        if state.round == 1:
            with torch.no_grad():
                state.net.conv_stem.weight.fill_(float('nan'))
        return main_round(run, config, state)

    monkeypatch.setattr(train, 'train_round', poisoned)
    with pytest.raises(ValueError, match=r'loss became nan in round 2 of 2 .*last good checkpoint is .*round_00001'):
        train.main([*QUICK, f'output={tmp_path / "run"}'])
    monkeypatch.undo()
    train.main([*QUICK, f'output={tmp_path / "run"}'])
    assert load_ticket(tmp_path / 'run/superticket_mbv2_s80')


def test_another_run_in_the_folder_is_left_alone(tmp_path):
    train.main([*QUICK, f'output={tmp_path / "run"}'])
    before = ticket_bytes(tmp_path / 'run')
    for change, says in (
        ('lr=0.01', r'already holds another run \(lr is 0.1 there, 0.01 here\)'),
        ('resume=never', 'already holds this'),
    ):
        with pytest.raises(ValueError, match=says):
            train.main([*QUICK, change, f'output={tmp_path / "run"}'])
    assert ticket_bytes(tmp_path / 'run') == before
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/thesis.txt').touch()
    with pytest.raises(ValueError, match='something that is not a run'):
        train.main([*QUICK, f'output={tmp_path / "mine"}'])


def test_resume_from_a_named_checkpoint(tmp_path):
    train.main([*QUICK, f'output={tmp_path / "run"}'])
    path = tmp_path / 'run/checkpoints/round_00001'
    train.main([*QUICK, f'output={tmp_path / "other"}', f'resume={path}'])
    assert (tmp_path / 'other/superticket_mbv2_s80').exists()
    with pytest.raises(ValueError, match=r'resume=.*nowhere is neither "auto" nor "never" nor a checkpoint'):
        train.main([*QUICK, f'output={tmp_path / "third"}', f'resume={tmp_path / "nowhere"}'])


def test_an_error_is_one_line_and_no_traceback_of_ours(tmp_path):
    process = subprocess.run(
        [sys.executable, 'recipes/train.py', 'lrr=1'], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert process.returncode == 1
    assert [line for line in process.stderr.splitlines() if 'error' in line] == process.stderr.splitlines()[-1:]
    assert process.stderr.splitlines()[-1].startswith("error: unknown key 'lrr'; did you mean lr")


def test_state_survives_a_fork(tmp_path, monkeypatch):
    """The trunk goes on as if no branch had left it."""
    states = []
    save = State.save
    monkeypatch.setattr(State, 'save', lambda self, *args: (states.append(self.fork()), save(self, *args)))
    train.main([*QUICK, f'output={tmp_path / "with"}'])
    monkeypatch.setattr(train, 'draw', lambda *args: None)
    monkeypatch.setattr(train, 'draw_pictures', lambda *args: None)
    train.main([*QUICK, f'output={tmp_path / "without"}'])
    with_branches, without = states[:2], states[2:]
    for a, b in zip(with_branches, without, strict=True):
        for name, tensor in a.net.state_dict().items():
            assert torch.equal(tensor, b.net.state_dict()[name])
