import csv
import gc
import itertools
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
import train
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, register_tracker_class
from matplotlib import image
from parts.classification import Classification
from parts.config import Config
from parts.report import Report
from parts.state import State
from timm.utils import ModelEmaV3
from torch._dynamo.utils import counters

from timm_supertickets import Mask, load_ticket, prunable
from timm_supertickets.cost import channel_macs, model_cost
from timm_supertickets.search.importance import gate_importance
from timm_supertickets.search.select import select_by_budget

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


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.setenv('ACCELERATE_DYNAMO_BACKEND', 'aot_eager')  # what rounds as eager does
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers what the first run in a process was told
    torch._dynamo.reset()
    counters.clear()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_a_compiled_run_captures_a_graph_per_net_and_draws_the_same_tickets(smoke, tmp_path, compiled):
    train.main([*SMOKE, f'output={tmp_path}'])
    with (tmp_path / 'summary.csv').open() as file:
        shrunk = {row['macs'] for row in csv.DictReader(file)}
    assert counters['stats']['unique_graphs'] == len(shrunk) + 1  # and the supernet's, which has no row
    for name in TICKETS:
        ticket, other = (load_ticket(folder / name) for folder in (tmp_path, smoke[0]))
        assert all(torch.equal(tensor, other.weights[key]) for key, tensor in ticket.weights.items())


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


def test_a_loss_that_runs_away_stops_and_names_the_last_checkpoint(tmp_path, monkeypatch):
    loss, rounds = Classification.loss, []
    main_round = train.train_round

    def counted(*args):
        rounds.append(args)
        return main_round(*args)

    def scaled(*args):
        return loss(*args) * (2000 if len(rounds) == 2 else 1)  # lr=0: both rounds have the loss of chance

    monkeypatch.setattr(train, 'train_round', counted)
    monkeypatch.setattr(Classification, 'loss', scaled)
    says = r'the loss diverged in round 2 of 2: [4-9]\d{3}, and [23]\.\d+ in the first round .* is .*round_00001'
    with pytest.raises(ValueError, match=says):
        train.main([*QUICK, 'targets=[0.9]', 'lr=0', f'output={tmp_path / "run"}'])
    monkeypatch.undo()
    train.main([*QUICK, 'targets=[0.9]', 'lr=0', f'output={tmp_path / "run"}'])


PLAIN = [
    *SMOKE, 'model=test_vit', 'model_args={img_size: 32}', 'search=none', 'scale=1', 'ratio=1', 'recalibrate=0',
    'rounds=2', 'round_steps=3', 'cooldown_steps=2', 'targets=[0.5]', 'reactivation=none',
]  # fmt: skip


def test_accumulated_batches_equal_one_big_batch(tmp_path):
    """Without batch norm, which sees other batches."""
    train.main([*PLAIN, 'batch_size=64', 'clip_grad=1', 'ema_decay=0.9', f'output={tmp_path / "one"}'])
    train.main([*PLAIN, 'batch_size=16', 'clip_grad=1', 'ema_decay=0.9', 'accumulate=4', f'output={tmp_path / "four"}'])
    one, four = (
        list(csv.DictReader((tmp_path / name / 'summary.csv').read_text().splitlines())) for name in ('one', 'four')
    )
    assert [float(row['loss']) for row in four] == pytest.approx([float(row['loss']) for row in one], rel=1e-5)
    assert [row['train_macs'] for row in four] == [row['train_macs'] for row in one]
    first, second = (load_ticket(tmp_path / name / 'test_vit_s50').weights for name in ('one', 'four'))
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], rtol=1e-3, atol=1e-5), name


@pytest.fixture
def bf16(monkeypatch):
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bf16_keeps_masks_and_weights_exact(tmp_path, monkeypatch, bf16):
    kinds = []
    add = Report.add

    def seen(report, **row):
        kinds.append((report.accelerator.mixed_precision, row['sparsity']))
        add(report, **row)

    saved = []
    save = State.save
    monkeypatch.setattr(State, 'save', lambda state, *args: (saved.append(state.fork()), save(state, *args)))
    monkeypatch.setattr(Report, 'add', seen)
    train.main([*QUICK, 'ema_decay=0.9', f'output={tmp_path / "run"}'])
    assert {precision for precision, _ in kinds} == {'bf16'}
    for state in saved:
        assert {t.dtype for t in state.net.state_dict().values()} == {torch.float32, torch.int64}
        moments = [t for one in state.optimizer.state.values() for t in one.values() if isinstance(t, torch.Tensor)]
        assert {t.dtype for t in [*moments, *state.ema.module.parameters()]} == {torch.float32}
        for name, alive in state.mask.items():
            assert alive.dtype == torch.bool
            assert not state.net.get_parameter(name)[~alive].any()
    for name, sparsity in (('s40', 0.4), ('s80', 0.8)):
        ticket = load_ticket(tmp_path / f'run/superticket_mbv2_{name}')
        assert ticket.facts['precision'] == 'bf16'
        assert ticket.mask.total - ticket.mask.alive == round(sparsity * ticket.mask.total)
        assert {t.dtype for t in ticket.weights.values()} <= {torch.float32, torch.int64}


def test_a_step_that_the_scaler_skips_revives_nothing_and_is_not_averaged(tmp_path, monkeypatch):
    """Torch's own scaler, on a CPU: its scale overflows until it has been halved a few times."""
    create = train.create_accelerator

    def scaled(config):
        accelerator = create(config)
        accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=2.0**126)
        return accelerator

    before, averaged, skips = [], [], []
    zero_grads_, update = Mask.zero_grads_, ModelEmaV3.update
    step_was_skipped = AcceleratedOptimizer.step_was_skipped.fget

    def before_step(mask, net):
        zero_grads_(mask, net)
        before[:] = [mask, net, [param.clone() for param in net.parameters()]]

    def after_step(optimizer):
        mask, net, params = before
        skips.append(step_was_skipped(optimizer))
        same = [torch.equal(param, old) for param, old in zip(net.parameters(), params, strict=True)]
        assert all(same) if skips[-1] else not all(same)
        assert not any(net.get_parameter(name)[~alive].any() for name, alive in mask.items())
        return skips[-1]

    monkeypatch.setattr(train, 'create_accelerator', scaled)
    monkeypatch.setattr(Mask, 'zero_grads_', before_step)
    monkeypatch.setattr(ModelEmaV3, 'update', lambda ema, *a, **k: (averaged.append(1), update(ema, *a, **k)))
    monkeypatch.setattr(AcceleratedOptimizer, 'step_was_skipped', property(after_step))
    train.main([*QUICK, 'rounds=4', 'round_steps=6', 'ema_decay=0.9', f'output={tmp_path / "run"}'])
    assert len(skips) == 4 * 6 + 2 * 2
    assert 3 < sum(skips) < len(skips) - 3
    assert len(averaged) == len(skips) - sum(skips)
    for name, sparsity in (('s40', 0.4), ('s80', 0.8)):
        ticket = load_ticket(tmp_path / f'run/superticket_mbv2_{name}')
        assert ticket.mask.total - ticket.mask.alive == round(sparsity * ticket.mask.total)
        assert all(t.isfinite().all() for t in ticket.weights.values())


@pytest.mark.slow
def test_memory_is_flat_over_many_events(tmp_path, monkeypatch):
    held, traced = [], []
    save = State.save

    def measured(state, *args):
        save(state, *args)
        gc.collect()
        tensors = {t.untyped_storage().data_ptr(): t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}
        held.append((len(tensors), sum(t.untyped_storage().nbytes() for t in tensors.values())))
        traced.append(tracemalloc.get_traced_memory()[0])

    monkeypatch.setattr(State, 'save', measured)
    monkeypatch.setattr(Classification, 'score', lambda *args: 0.5)
    more = ['rounds=26', 'round_steps=1', 'cooldown_steps=1', 'recalibrate=1', 'batch_size=4', 'ema_decay=0.9']
    more += ['search_until=0.2', 'targets=[0.8]']
    tracemalloc.start()
    try:
        train.main([*QUICK, *more, f'output={tmp_path / "run"}'])
    finally:
        tracemalloc.stop()
    assert len(held) == 26
    counts, sizes = zip(*held, strict=True)
    assert max(counts[5:]) <= max(counts[:5])
    assert max(sizes[5:]) <= max(sizes[:5])
    assert max(traced[5:-1]) < min(traced[5:-1]) + 100_000  # 20 rows of the summary, and what libraries remember


@pytest.mark.slow
def test_events_of_a_large_net_stay_within_two_and_a_half_times_its_state():
    """A hundred million parameters, shrunk and pruned twenty times, in a process of their own."""
    spawn = multiprocessing.get_context('spawn')
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=shrink_twenty_times, args=(theirs,))
    process.start()
    theirs.close()
    params, held, peak, left = ours.recv()
    process.join()
    assert params[0] > 98_000_000
    assert len(params) == 21
    assert all(b < a for a, b in itertools.pairwise(params))
    assert left < params[0] // 4
    print(f'peak {peak / 1e9:.2f} GB, {peak / held:.2f} times weights, momentum and mask')
    assert peak < 2.5 * held


def shrink_twenty_times(pipe):
    def memory(which):
        lines = Path('/proc/self/status').read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))

    def step():
        state.net(torch.randn(2, *size)).sum().backward()
        state.mask.zero_grads_(state.net)
        state.optimizer.step()
        state.keep_gradients()
        state.optimizer.zero_grad()
        state.mask.zero_weights_(state.net)

    torch.set_num_threads(1)
    before, size, config = memory('VmRSS'), (3, 32, 32), Config()
    net = timm.create_model('supernet_mbv2', width=5.0, num_classes=10)
    state = train.start(config, net, Mask.dense(prunable(net)))
    del net
    step()
    tensors = [*state.net.state_dict().values(), *state.mask.values()]
    tensors += [value for values in state.optimizer.state.values() for value in values.values()]
    held = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
    del tensors
    params, first = [count_parameters(state.net)], model_cost(state.net, size).macs
    for event in range(1, 21):
        groups, cost = state.net.channel_groups(), model_cost(state.net, size)
        macs, importance = channel_macs(groups, cost), gate_importance(state.net, groups)
        state.shrink(select_by_budget(groups, importance, macs, cost.macs, first * (1 - 0.03 * event)))
        state.mask = train.pruned(config, state, 0.04 * event)
        state.zero_dead_weights_()
        state.mask = train.reactivated(config, state, 0.1)
        step()
        params.append(count_parameters(state.net))
    pipe.send((params, held, memory('VmHWM') - before, state.mask.alive))


def count_parameters(net):
    return sum(param.numel() for param in net.parameters())


class Notebook(GeneralTracker):
    """A tracker that remembers."""

    name = 'notebook'
    requires_logging_directory = False
    tracker = None
    logged: ClassVar[list] = []

    def __init__(self, project, **kwargs):
        super().__init__()

    def log(self, values, step=None, **kwargs):
        self.logged.append((step, values))


def test_a_tracker_gets_the_rows_of_the_summary(tmp_path, monkeypatch):
    register_tracker_class(Notebook)
    monkeypatch.setattr(train, 'get_available_trackers', lambda: ['notebook'])
    train.main([*QUICK, 'tracker=notebook', f'output={tmp_path / "run"}'])
    rows = list(csv.DictReader((tmp_path / 'run/summary.csv').read_text().splitlines()))
    assert len(rows) == len(Notebook.logged) == 4
    for row, (step, values) in zip(rows, Notebook.logged, strict=True):
        assert int(row['step']) == step
        told = {key.removeprefix(f'{row["name"]}/'): str(value) for key, value in values.items()}
        assert told == {key: value for key, value in row.items() if key not in ('name', 'step') and value}


def test_tensorboard_shows_a_resumed_run_once(tmp_path, monkeypatch):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / 'run'
    save = State.save

    def killed(state, *args):
        if state.round == 2:
            raise KeyboardInterrupt
        save(state, *args)

    monkeypatch.setattr(State, 'save', killed)
    with pytest.raises(KeyboardInterrupt):
        train.main([*QUICK, 'tracker=tensorboard', f'output={output}'])
    monkeypatch.undo()
    train.main([*QUICK, 'tracker=tensorboard', f'output={output}'])
    events = EventAccumulator(str(output / 'tracker/timm_supertickets')).Reload()
    rows = list(csv.DictReader((output / 'summary.csv').read_text().splitlines()))
    for name in ('trunk', 'superticket_mbv2_s40', 'superticket_mbv2_s80'):
        mine = [row for row in rows if row['name'] == name]
        scalars = events.Scalars(f'{name}/top1')
        assert [event.step for event in scalars] == [int(row['step']) for row in mine]
        assert [event.value for event in scalars] == pytest.approx([float(row['top1']) for row in mine])


def test_deterministic_algorithms_are_asked_for_and_draw_the_same_tickets(whole, tmp_path, monkeypatch):
    asked = []
    loss = Classification.loss

    def watched(*args):
        asked.append(torch.are_deterministic_algorithms_enabled())
        return loss(*args)

    monkeypatch.setattr(Classification, 'loss', watched)
    try:
        train.main([*FOUR_ROUNDS, 'deterministic=true', f'output={tmp_path / "run"}'])
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(asked) == {True}
    for folder in whole.glob('superticket*'):
        ours, theirs = load_ticket(tmp_path / 'run' / folder.name), load_ticket(folder)
        assert all(torch.equal(alive, theirs.mask[name]) for name, alive in ours.mask.items())
        assert all(torch.equal(tensor, theirs.weights[name]) for name, tensor in ours.weights.items())


def test_wandb_keeps_its_files_in_the_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.chdir(tmp_path)
    train.main([*QUICK, 'tracker=wandb', 'output=run'])
    wandb.teardown()  # its own process may write on until it ends
    (found,) = (tmp_path / 'run/wandb').glob('offline-run-*/run-*.wandb')
    content = found.read_bytes()
    for row in csv.DictReader((tmp_path / 'run/summary.csv').read_text().splitlines()):
        assert f'{row["name"]}/top1'.encode() in content
        assert row['top1'].encode() in content
    assert not (tmp_path / 'wandb').exists()


def test_mlflow_gets_the_rows_of_the_summary(tmp_path, monkeypatch):
    mlflow = pytest.importorskip('mlflow')
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')  # its databases need the whole of mlflow
    monkeypatch.setenv('MLFLOW_TRACKING_URI', (tmp_path / 'mlflow').as_uri())
    train.main([*QUICK, 'tracker=mlflow', f'output={tmp_path / "run"}'])
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'timm_supertickets'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == 'FINISHED'
    rows = list(csv.DictReader((tmp_path / 'run/summary.csv').read_text().splitlines()))
    for name in {row['name'] for row in rows}:
        told = client.get_metric_history(found.info.run_id, f'{name}/top1')
        mine = [(int(row['step']), float(row['top1'])) for row in rows if row['name'] == name]
        assert [(one.step, one.value) for one in told] == mine


def test_a_tracker_that_cannot_start_says_so_before_anything_is_trained(tmp_path, monkeypatch):
    pytest.importorskip('mlflow')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', 'carrier-pigeon://loft')
    with pytest.raises(
        ValueError, match=r"tracker 'mlflow' cannot start: .*carrier-pigeon.*; tracker=none goes without"
    ):
        train.main([*QUICK, 'tracker=mlflow', f'output={tmp_path / "run"}'])
    assert not (tmp_path / 'run/summary.csv').exists()


def test_kernels_that_cannot_be_compiled_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'load_kernels', lambda source: False)
    with pytest.raises(ValueError, match=r'kernels=true needs a C\+\+ compiler and ninja .*; or give kernels=false'):
        train.main([*QUICK, 'kernels=true', f'output={tmp_path / "run"}'])
    assert not (tmp_path / 'run').exists()


def test_a_tracker_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"tracker 'paper' is unknown or not installed; there is: none"):
        train.main([*QUICK, 'tracker=paper', f'output={tmp_path / "run"}'])


def test_facts_name_the_commit(smoke):
    git = ['git', '-C', str(ROOT), 'rev-parse', 'HEAD']
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip('this is no clone')
    commit = load_ticket(smoke[0] / 'superticket_mbv2_s50').facts['commit']
    assert commit.removesuffix('-dirty') == found.stdout.strip()


def test_the_command_in_the_facts_can_be_typed_into_a_shell():
    said = train.command('train.py', ['model_args={width: 2.0}', 'targets=[0.8]', 'output=here'], Accelerator())
    assert shlex.split(said) == [
        'accelerate', 'launch', 'recipes/train.py', 'model_args={width: 2.0}', 'targets=[0.8]',
    ]  # fmt: skip


def test_the_command_in_the_facts_is_of_no_place():
    argv = ['--output', 'here', '--lr', '0.1', '--data_dir=there', 'resume=never', '--tracker', 'none', 'seed=1']
    said = train.command('train.py', argv, Accelerator())
    assert said == 'accelerate launch recipes/train.py --lr 0.1 seed=1'


def test_a_run_that_knew_fewer_keys_goes_on(smoke, tmp_path, monkeypatch):
    output = tmp_path / 'run'
    shutil.copytree(smoke[0], output)
    lines = (output / 'config.yaml').read_text().splitlines(keepends=True)
    older = [line for line in lines if not line.startswith(('accumulate', 'tracker'))]
    assert len(older) == len(lines) - 2
    (output / 'config.yaml').write_text(''.join(older))
    monkeypatch.setattr(train, 'train', None)
    train.main([*SMOKE, f'output={output}'])
    with pytest.raises(ValueError, match=r'another run \(accumulate is 1 there, 2 here\)'):
        train.main([*SMOKE, 'accumulate=2', f'output={output}'])


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


def test_gradients_that_overflow_are_not_large():
    """Else fp16 would let just those come back."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False))
    state = train.start(Config(), net, Mask.dense(prunable(net)))
    net[0].weight.grad = torch.tensor([[1.5, float('inf'), float('-inf'), float('nan')]])
    state.keep_gradients()
    assert state.gradients['0.weight'].tolist() == [[1.5, 0, 0, 0]]
