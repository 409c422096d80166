"""Whatever happens to a run: nothing that was drawn or saved is lost or wrong."""

import errno
import gc
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import train
from accelerate import Accelerator
from parts import program
from parts.config import Config
from parts.report import Report
from parts.state import CHECKPOINTS, State, checkpoints, file_sha256, find_checkpoint, newest_checkpoint

from timm_supertickets import Mask, Ticket

ROOT = Path(__file__).parents[2]
SMOKE = ['--config', str(ROOT / 'recipes/configs/smoke.yaml'), 'threads=1', 'tracker=none']
QUICK = [*SMOKE, 'rounds=3', 'round_steps=3', 'cooldown_steps=2', 'targets=[0.4,0.8]', 'batch_size=8', 'recalibrate=2']
KILLS = int(os.environ.get('KILLS', '20'))


def ticket_bytes(output):
    return {str(f.relative_to(output)): f.read_bytes() for f in sorted(Path(output).glob('superticket*/*'))}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp('whole') / 'run'
    train.main([*QUICK, f'output={output}'])
    return output


@pytest.fixture
def accelerator():
    gc.freeze()  # accelerate collects garbage at every save, and most of what it would look through are libraries
    yield Accelerator()
    gc.unfreeze()


def create_state():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    state = train.start(Config(ema_decay=0.9, opt='adamw'), net, Mask.dense({'0.weight': net[0].weight}))
    net(torch.randn(5, 4)).sum().backward()
    state.optimizer.step()
    return state


def save_round(accelerator, output, number):
    state = create_state()
    state.round = number
    with torch.no_grad():
        state.net[0].bias.fill_(number)
    state.save(accelerator, output, [{'name': 'trunk', 'round': number}])


def load_round(accelerator, path):
    """What a checkpoint says in three places is the same round."""
    state = create_state()
    rows = state.load(accelerator, path)
    assert state.net[0].bias.tolist() == [state.round] * 3
    assert rows == [{'name': 'trunk', 'round': state.round}]
    return state.round


@contextmanager
def failing(monkeypatch, number, error):
    """Raise at the n-th call that changes the disk, before it does; `calls` counts them."""
    calls = []

    def counted(original):
        def call(*args, **kwargs):
            calls.append(original.__name__)
            if len(calls) == number:
                raise error
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ('replace', 'fsync', 'unlink', 'rmdir', 'mkdir'):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(Accelerator, 'save_state', counted(Accelerator.save_state))
        yield calls


def saved_twice(accelerator, folder):
    for number in (1, 2):
        save_round(accelerator, folder, number)
    return folder


def interrupted_saves(accelerator, folder, monkeypatch, number, error):
    """Save a round again and again, interrupted one call later each time.

    Yields:
        The run's folder, what was raised, and the calls until then.
    """
    before = saved_twice(accelerator, folder / 'before')
    for place in range(1, 100):
        output = folder / str(place)
        shutil.copytree(before, output)
        raised = None
        with failing(monkeypatch, place, error) as calls:
            try:
                save_round(accelerator, output, number)
            except (KeyboardInterrupt, ValueError) as caught:
                raised = caught
        if len(calls) < place:
            assert place > 20
            assert {'replace', 'fsync', 'unlink', 'rmdir', 'mkdir', 'save_state'} == set(calls)
            return
        yield output, raised, calls


@pytest.mark.parametrize('number', [2, 3], ids=['again', 'next'])
def test_a_save_that_is_killed_anywhere_leaves_a_whole_checkpoint(tmp_path, monkeypatch, accelerator, number):
    found = set()
    for output, raised, _ in interrupted_saves(accelerator, tmp_path, monkeypatch, number, KeyboardInterrupt()):
        assert isinstance(raised, KeyboardInterrupt)
        found.add(load_round(accelerator, newest_checkpoint(output, pytest.fail)))
        save_round(accelerator, output, 3)
        assert [path.name.removesuffix('.old') for path in checkpoints(output)] == ['round_00002', 'round_00003']
        assert load_round(accelerator, newest_checkpoint(output, pytest.fail)) == 3
    assert found == {2, number}


def test_a_full_disk_is_one_line_and_the_checkpoint_before_survives(tmp_path, monkeypatch, accelerator):
    full = OSError(errno.ENOSPC, 'No space left on device')
    for output, raised, calls in interrupted_saves(accelerator, tmp_path, monkeypatch, 3, full):
        kept = newest_checkpoint(output, pytest.fail)
        assert load_round(accelerator, kept) in (2, 3)
        if raised is None:  # nothing hangs on what an older crash left
            assert calls[-1] in ('unlink', 'rmdir')
        else:
            assert '\n' not in str(raised)
            assert 'No space left on device' in str(raised)
            assert str(raised).endswith(f'the same command goes on from {kept}')


def test_files_that_cannot_grow_are_one_line(tmp_path, accelerator):
    """The system itself refuses the bytes, to torch and safetensors too."""
    output = saved_twice(accelerator, tmp_path / 'run')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, 1000, 3000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(
                ValueError, match=r'round_00003 cannot be written: .*goes on from .*round_00002$'
            ) as caught:
                save_round(accelerator, output, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert '\n' not in str(caught.value)
        assert load_round(accelerator, newest_checkpoint(output, pytest.fail)) == 2
    save_round(accelerator, output, 3)
    assert load_round(accelerator, newest_checkpoint(output, pytest.fail)) == 3


def test_a_folder_that_is_read_only_is_one_line(accelerator):
    output = Path(tempfile.mkdtemp())
    try:
        saved_twice(accelerator, output)
        with nobody(output):
            with pytest.raises(ValueError, match=r'round_00003 cannot be written: .*Permission denied.*round_00002$'):
                save_round(accelerator, output, 3)
            with pytest.raises(PermissionError, match='new'):
                Report(Config(output=str(output / 'new')), 'top1', accelerator)
        assert load_round(accelerator, newest_checkpoint(output, pytest.fail)) == 2
    finally:
        shutil.rmtree(output)


@contextmanager
def nobody(output):
    """Be someone who may not write there: the superuser may write everywhere."""
    output.chmod(0o755)
    for file in output.rglob('*.safetensors'):
        file.chmod(0o644)
    folders = [output, output / CHECKPOINTS]
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
        return
    for folder in folders:
        folder.chmod(0o555)
    try:
        yield
    finally:
        for folder in folders:
            folder.chmod(0o755)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


BROKEN = {
    'a cut model': (lambda path: cut(path / 'model.safetensors'), 'model.safetensors has other bytes'),
    'a wrong bit of the optimizer': (lambda path: flip(path / 'optimizer.bin'), 'optimizer.bin has other bytes'),
    'no mask': (lambda path: (path / 'mask.safetensors').unlink(), 'mask.safetensors is missing'),
    'no state': (lambda path: (path / 'state.json').unlink(), 'state.json is missing'),
    'half a state': (lambda path: cut(path / 'state.json') or cut(path / 'state.json'), 'state.json is not readable'),
}


@pytest.mark.parametrize(('break_it', 'says'), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_told_and_the_one_before_is_used(tmp_path, accelerator, capsys, break_it, says):
    output = saved_twice(accelerator, tmp_path / 'run')
    break_it(output / CHECKPOINTS / 'round_00002')
    assert find_checkpoint('auto', output, accelerator) == output / CHECKPOINTS / 'round_00001'
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert 'round_00002 is not whole' in lines[0]
    assert says in lines[0]
    assert lines[0].endswith(f'going on from {output / CHECKPOINTS / "round_00001"}')
    with pytest.raises(ValueError, match=f'neither.*nor a checkpoint.*{says}'):
        find_checkpoint(str(output / CHECKPOINTS / 'round_00002'), output, accelerator)
    break_it(output / CHECKPOINTS / 'round_00001')
    with pytest.raises(ValueError, match=f'{says}.*there is no other that is; delete .* to begin anew'):
        find_checkpoint('auto', output, accelerator)


def test_what_was_half_written_is_told(tmp_path, accelerator, capsys):
    output = saved_twice(accelerator, tmp_path / 'run')
    (output / CHECKPOINTS / '.saving').mkdir()
    assert find_checkpoint('auto', output, accelerator).name == 'round_00002'
    assert capsys.readouterr().out.count('was being written when the run stopped; going on from') == 1


def test_a_run_goes_on_from_before_a_broken_checkpoint_to_the_same_tickets(whole, tmp_path):
    output = tmp_path / 'run'
    shutil.copytree(whole, output)
    for folder in output.glob('superticket*_s80'):
        shutil.rmtree(folder)
    cut(output / CHECKPOINTS / 'round_00003/optimizer.bin')
    train.main([*QUICK, f'output={output}'])
    assert ticket_bytes(output) == ticket_bytes(whole)


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize('name', ['optimizer.bin', 'random_states_0.pkl'])
def test_a_checkpoint_runs_nothing(tmp_path, accelerator, name):
    """Not even one whose digests were made to fit."""
    output = saved_twice(accelerator, tmp_path / 'run')
    path = output / CHECKPOINTS / 'round_00002'
    for data in (pickle.dumps(Evil(tmp_path / 'mark')), None):
        if data:
            (path / name).write_bytes(data)
        else:
            torch.save({'state': Evil(tmp_path / 'mark')}, path / name)
        about = json.loads((path / 'state.json').read_text())
        about['files'][name] = file_sha256(path / name)
        (path / 'state.json').write_text(json.dumps(about))
        if name == 'optimizer.bin':
            with pytest.raises(ValueError, match=r'round_00002 cannot be loaded: [^\n]*$'):
                load_round(accelerator, newest_checkpoint(output, pytest.fail))
        else:  # a run can do without: every stretch seeds its own
            load_round(accelerator, newest_checkpoint(output, pytest.fail))
        assert not (tmp_path / 'mark').exists()


@pytest.fixture
def as_program(monkeypatch):
    """Run train.py as a program does, in this process; what it printed and its exit code come back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(argv, capfd):
        monkeypatch.setattr(sys, 'argv', ['train.py', *argv])
        with pytest.raises(SystemExit) as left:
            program.program(train.main)
        return left.value.code, capfd.readouterr().err

    yield run
    program.received.clear()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextmanager
def signalled(monkeypatch, number, place):
    """Send a signal in the middle of the n-th step; yields the steps that were made."""
    steps = []
    zero_grads_ = Mask.zero_grads_

    def counted(mask, net):
        steps.append(net)
        if len(steps) == place:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # as a launcher passes it on
        zero_grads_(mask, net)

    with monkeypatch.context() as patch:
        patch.setattr(Mask, 'zero_grads_', counted)
        yield steps
    program.received.clear()


# what draws random numbers while it trains, carries an average, and has epochs that end within a stretch
RANDOM = [
    'model_args={width: 0.25, drop_rate: 0.2, drop_path_rate: 0.2}',
    'ema_decay=0.9',
    'accumulate=2',
    'batch_size=300',
]


@pytest.fixture(scope='module')
def whole_random(tmp_path_factory):
    """An uninterrupted run of a net with randomness of its own."""
    output = tmp_path_factory.mktemp('random') / 'run'
    train.main([*QUICK, *RANDOM, f'output={output}'])
    return output


@pytest.mark.parametrize(
    ('number', 'code', 'place', 'where', 'kept'),
    [
        (signal.SIGTERM, 143, 2, 'round 1 of 3', 'round_00000_stopped'),
        (signal.SIGINT, 130, 4, 'superticket_mbv2_s40', 'round_00000_stopped'),
    ],
)
def test_a_signal_stops_after_the_step_and_the_same_command_goes_on_from_there(
    whole_random, tmp_path, monkeypatch, capfd, as_program, number, code, place, where, kept
):
    output = tmp_path / 'run'
    argv = [*QUICK, *RANDOM, f'output={output}']
    with signalled(monkeypatch, number, place) as steps:
        left, said = as_program(argv, capfd)
        assert left == code
        assert len(steps) == place
        program.received.clear()
        path = output / CHECKPOINTS / kept
        assert f'stopped by {number.name} in {where}; the same command goes on from {path}\n' in said
        train.main(argv)
    assert len(steps) == 3 * 3 + 2 * 2  # none was made twice
    assert ticket_bytes(output) == ticket_bytes(whole_random)
    assert summary(output) == summary(whole_random)


def test_a_stop_behind_the_last_step_of_a_round_keeps_the_learning_rate(tmp_path, monkeypatch, capfd, as_program):
    argv = [*QUICK, 'warmup_steps=2']
    train.main([*argv, f'output={tmp_path / "whole"}'])
    with signalled(monkeypatch, signal.SIGTERM, 3):
        as_program([*argv, f'output={tmp_path / "run"}'], capfd)
        program.received.clear()
        train.main([*argv, f'output={tmp_path / "run"}'])
    assert ticket_bytes(tmp_path / 'run') == ticket_bytes(tmp_path / 'whole')


def summary(output):
    """The rows of a run without their times."""
    lines = (output / 'summary.csv').read_text().splitlines()
    return [line.rpartition(',')[0] for line in lines]


@pytest.mark.slow
def test_a_run_that_is_stopped_after_every_step_draws_the_same_tickets(
    whole_random, tmp_path, monkeypatch, capfd, as_program
):
    output = tmp_path / 'run'
    for _ in range(13):
        with signalled(monkeypatch, signal.SIGTERM, 1) as steps:
            as_program([*QUICK, *RANDOM, f'output={output}'], capfd)
            assert len(steps) == 1
    train.main([*QUICK, *RANDOM, f'output={output}'])
    assert ticket_bytes(output) == ticket_bytes(whole_random)
    assert summary(output) == summary(whole_random)


def test_a_loss_that_is_no_number_stops_in_the_middle_of_a_round(tmp_path, monkeypatch):
    steps = []
    zero_grads_ = Mask.zero_grads_

    def poisoned(mask, net):
        steps.append(net)
        zero_grads_(mask, net)
        if len(steps) == 3:
            net.conv_stem.weight.grad.fill_(float('nan'))

    monkeypatch.setattr(Mask, 'zero_grads_', poisoned)
    with pytest.raises(ValueError, match=r'the loss became nan in round 1 of 3 .*there is no checkpoint yet'):
        train.main([*QUICK, 'round_steps=30', f'output={tmp_path / "run"}'])
    assert len(steps) == 10


@pytest.mark.slow
def test_killed_at_random_moments_and_started_again_draws_the_same_tickets(whole, tmp_path):
    """A table of where the kills struck is printed, and KILLS=100 makes it longer; see recipes/results/faults.md."""
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(['train', 'sklearn.model_selection'])
    luck = random.Random(0)
    started = time.monotonic()
    began, runs, struck, saved = 0, 0, Counter(), Counter()
    while sum(struck.values()) < KILLS:
        output, runs, ended = tmp_path / str(runs), runs + 1, False
        while not ended:
            phase = server.Array('c', 32)
            process = server.Process(target=run_with_phases, args=([*QUICK, f'output={output}'], phase))
            process.start()
            began += 1
            if sum(struck.values()) < KILLS:
                wait_for(phase, luck.choice(PHASES), process)
                time.sleep(luck.random() * luck.choice([0.0, 0.02, 0.3, 4.0]))
                process.kill()
            process.join()
            ended = process.exitcode == 0
            if not ended:
                assert process.exitcode == -signal.SIGKILL
                struck[phase.value.decode() or 'between these'] += 1
                kept = newest_checkpoint(output, pytest.fail)
                saved[kept.name if kept else 'none'] += 1
        assert ticket_bytes(output) == ticket_bytes(whole)
    print(
        f'\n{sum(struck.values())} kills, {runs} runs that ended, {began} processes, {time.monotonic() - started:.0f} s'
    )
    for table in (struck, saved):
        print('\n'.join(f'| {name} | {times} |' for name, times in sorted(table.items())), end='\n\n')


PHASES = ['', 'training', 'shrinking', 'pruning', 'saving a ticket', 'saving a checkpoint', 'scoring']


def wait_for(phase, aim, process):
    while process.is_alive() and phase.value.decode() != aim:
        time.sleep(0.0005)


def run_with_phases(argv, phase):
    """Train in a process that says what it is doing."""

    def telling(owner, name, what):
        original = getattr(owner, name)

        def told(*args, **kwargs):
            before, phase.value = phase.value, what.encode()
            try:
                return original(*args, **kwargs)
            finally:
                phase.value = before

        setattr(owner, name, told)

    telling(train, 'train', 'training')
    telling(train, 'pruned', 'pruning')
    telling(train, 'measure', 'scoring')
    telling(State, 'shrink', 'shrinking')
    telling(State, 'save', 'saving a checkpoint')
    telling(Ticket, 'save', 'saving a ticket')
    with open(os.devnull, 'w') as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        train.main(argv)
