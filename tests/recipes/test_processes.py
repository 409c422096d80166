"""Several processes on one CPU. `torchrun` runs this file too: what it then does is at its end."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import train
from accelerate import Accelerator
from parts.classification import create_data, top1
from parts.config import Config, parse
from parts.data import batches
from parts.report import Report
from parts.state import DIGESTED, State
from PIL import Image

from timm_supertickets import Mask, load_ticket, prunable, verify_ticket

ROOT = Path(__file__).parents[2]
CONFIG = ['--config', str(ROOT / 'recipes/configs/smoke.yaml'), 'threads=1', 'tracker=none']
QUICK = [
    *CONFIG, 'rounds=2', 'round_steps=3', 'cooldown_steps=2', 'targets=[0.4,0.8]', 'batch_size=8', 'ema_decay=0.9'
]  # fmt: skip
# no batch norm, which sees other batches on two processes, and no randomness: every step sees every image
EVERY_IMAGE = [
    *CONFIG, 'model=test_vit', 'model_args={img_size: 32}', 'search=none', 'scale=1', 'ratio=1', 'recalibrate=0',
    'rounds=4', 'round_steps=1', 'cooldown_steps=1', 'targets=[0.5]',
]  # fmt: skip


def torchrun(processes, *args, script='recipes/train.py', options=()):
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', str(processes), *options]
    paths = os.pathsep.join([str(ROOT), str(ROOT / 'recipes')])
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': paths}
    return subprocess.Popen(
        [*command, str(ROOT / script), *args],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=500)
    assert process.returncode == code, err
    return out, err


def free_port():
    with socket.socket() as one:
        one.bind(('localhost', 0))
        return one.getsockname()[1]


def ticket_bytes(output):
    return {str(f.relative_to(output)): f.read_bytes() for f in sorted(Path(output).glob('superticket*/*'))}


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """What two processes wrote down when they ran this file."""
    output = tmp_path_factory.mktemp('work')
    finish(torchrun(2, str(output), script=Path(__file__).relative_to(ROOT)))
    found = [json.loads((output / f'rank_{rank}.json').read_text()) for rank in range(2)]
    assert [one['num_processes'] for one in found] == [2, 2]
    return found


def test_an_epoch_is_shared_and_no_image_comes_twice(work):
    seen = [set(map(tuple, one['images'])) for one in work]
    images, labels = create_images()
    assert [len(one) for one in seen] == [512, 512]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] <= {
        (round(float(i.double().sum()), 6), int(t)) for i, t in zip(images, labels, strict=True)
    }


def test_every_test_image_counts_once(work):
    net = create_net().eval()
    config = parse(CONFIG)
    accelerator = Accelerator()
    assert work[0]['top1'] == work[1]['top1'] == top1(net, create_data(config, accelerator), accelerator)


def test_a_process_that_differs_is_named_with_what_it_holds(work):
    for one in work:
        assert one['same'] is None
        for part in DIGESTED:
            assert f'rank 1 of 2 differs from the others in its {part} after round 0' in one['differs'][part]
        assert '\n' not in str(one['differs'])


def test_a_process_that_differs_stops_the_run_before_anything_is_saved(work):
    for one in work:
        assert 'rank 1 of 2 differs from the others in its weights after round 2' in one['stopped']
        assert one['checkpoints'] == ['round_00001']


def test_a_folder_that_the_first_process_refuses_is_refused_by_all(work):
    assert all('run already holds another run' in one['refused'] for one in work)


def test_a_stream_is_shared_by_shards_and_no_image_comes_twice(work):
    """Four shards to train on, two for each process; three of unequal sizes to score on."""
    seen = [one['streamed'] for one in work]
    assert [len(one) for one in seen] == [24, 24]
    assert sorted(seen[0] + seen[1]) == list(range(48))
    shards = [{number // 12 for number in one} for one in seen]
    assert [len(one) for one in shards] == [2, 2]
    assert not shards[0] & shards[1]
    scored = [one['stream_scored'] for one in work]
    assert sorted(scored[0] + scored[1]) == list(range(100, 113))
    assert [one['stream_top1'] for one in work] == [7 / 13] * 2  # those of even numbers, of which there are seven


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """A run on two processes."""
    output = tmp_path_factory.mktemp('two') / 'run'
    out, _ = finish(torchrun(2, *QUICK, f'output={output}'))
    return output, out


@pytest.mark.slow
def test_two_processes_draw_tickets(two):
    output, out = two
    config = parse(QUICK)
    accelerator = Accelerator()
    assert out.count('2 tickets from one run') == 1
    for name, sparsity in (('s40', 0.4), ('s80', 0.8)):
        verify_ticket(output / f'superticket_mbv2_{name}')
        ticket = load_ticket(output / f'superticket_mbv2_{name}')
        assert ticket.facts['processes'] == 2
        launch = 'ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 recipes/train.py '
        assert ticket.facts['command'].startswith(launch)
        assert ticket.mask.total - ticket.mask.alive == round(sparsity * ticket.mask.total)
        assert top1(ticket.build(), create_data(config, accelerator), accelerator) == ticket.facts['top1']


@pytest.mark.slow
def test_two_machines_draw_the_same_tickets_as_one(two, tmp_path):
    options = ['--nnodes', '2', '--rdzv_backend', 'c10d', '--rdzv_endpoint', f'localhost:{free_port()}']
    machines = [torchrun(1, *QUICK, f'output={tmp_path / "run"}', options=options) for _ in range(2)]
    for machine in machines:
        finish(machine)
    assert ticket_bytes(tmp_path / 'run') == ticket_bytes(two[0])


def wait_for_checkpoint(process, output):
    """Until the first round is behind a run."""
    deadline = time.monotonic() + 120
    while not (output / 'checkpoints/round_00001').exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers(process):
    """The processes that `torchrun` started, by rank."""
    listed = subprocess.run(
        ['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True, check=True
    )
    found = sorted(int(pid) for pid in listed.stdout.split())
    assert len(found) == 2
    return found


@pytest.fixture(scope='module')
def longer(tmp_path_factory):
    """A run on two processes that lasts until a signal reaches it, and its arguments."""
    output = tmp_path_factory.mktemp('longer') / 'run'
    argv = [*QUICK, 'rounds=4', 'round_steps=12']
    finish(torchrun(2, *argv, f'output={output}'))
    return output, argv


@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 1])
def test_one_of_two_processes_is_killed_and_the_same_command_goes_on(longer, tmp_path, rank):
    whole, argv = longer
    output = tmp_path / 'run'
    process = torchrun(2, *argv, f'output={output}')
    wait_for_checkpoint(process, output)
    os.kill(workers(process)[rank], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode
    assert not (output / 'superticket_mbv2_s80').exists()
    finish(torchrun(2, *argv, f'output={output}'))
    assert ticket_bytes(output) == ticket_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize(('number', 'everyone'), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_stops_all_processes_and_the_same_command_goes_on_from_there(longer, tmp_path, number, everyone):
    whole, argv = longer
    output = tmp_path / 'run'
    process = torchrun(2, *argv, f'output={output}')
    wait_for_checkpoint(process, output)
    (os.killpg if everyone else os.kill)(process.pid, number)  # a terminal's Ctrl-C goes to everyone
    _, err = process.communicate(timeout=120)
    assert process.returncode
    assert err.count(f'stopped by {number.name} in ') == 1
    said = re.search(rf'the same command goes on from ({output}/checkpoints/round_0000\d_stopped)\n', err)
    assert said, err
    assert sorted(file.name for file in Path(said[1]).rglob('process_*')) == [
        f'process_{rank}.safetensors' for rank in range(2)
    ]
    assert 'Connection closed' not in err  # nobody was left waiting
    finish(torchrun(2, *argv, f'output={output}'))
    assert ticket_bytes(output) == ticket_bytes(whole)


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_not_for_one(two, tmp_path):
    path = two[0] / 'checkpoints/round_00001'
    with pytest.raises(ValueError, match=r'round_00001 is of a run on 2 processes, and this is 1'):
        train.main([*QUICK, f'output={tmp_path / "run"}', f'resume={path}'])


@pytest.mark.slow
def test_the_same_images_give_the_same_losses_on_one_process_and_on_two(tmp_path):
    finish(torchrun(2, *EVERY_IMAGE, 'batch_size=599', f'output={tmp_path / "two"}'))
    train.main([*EVERY_IMAGE, 'batch_size=1198', f'output={tmp_path / "one"}'])
    one, two = (
        list(csv.DictReader((tmp_path / name / 'summary.csv').read_text().splitlines())) for name in ('one', 'two')
    )
    assert [row['name'] for row in one] == ['trunk'] * 3 + ['test_vit_s50', 'trunk']
    assert [float(row['loss']) for row in two] == pytest.approx([float(row['loss']) for row in one], rel=1e-6)
    assert [row['top1'] for row in two] == [row['top1'] for row in one]
    assert [row['train_macs'] for row in two] == [row['train_macs'] for row in one]
    first, second = (load_ticket(tmp_path / name / 'test_vit_s50') for name in ('one', 'two'))
    for name, tensor in first.weights.items():
        assert torch.allclose(tensor, second.weights[name], rtol=1e-4, atol=1e-6)


def create_images():
    """All training images and labels, as loaders give them."""
    data = create_data(parse([*CONFIG, 'scale=1', 'ratio=1', 'batch_size=1198']), Accelerator())
    return next(iter(data.train))


def create_stream(output, accelerator):
    """Streams of images that are one grey level each, a number, and whether that is odd."""
    import datasets

    folder = output / 'stream'
    if accelerator.is_main_process:
        folder.mkdir()
        features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=['even', 'odd'])})
        shards = {
            'train': [range(12 * i, 12 * i + 12) for i in range(4)],
            'test': [range(100, 101), range(101, 108), range(108, 113)],
        }
        for split, parts in shards.items():
            for i, part in enumerate(parts):
                rows = {'image': [Image.new('RGB', (32, 32), (n, n, n)) for n in part], 'label': [n % 2 for n in part]}
                path = folder / f'{split}-{i:05d}-of-{len(parts):05d}.parquet'
                datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    accelerator.wait_for_everyone()
    where = [
        f'dataset=hfids/{folder}',
        f'data_dir={output / "cache"}',
        'train_samples=48',
        'val_samples=13',
        'num_classes=2',
    ]
    return create_data(parse([*CONFIG, *where, 'scale=1', 'ratio=1', 'batch_size=6']), accelerator)


def numbers(loader):
    return [round(float(one.mean()) * 127.5 + 127.5) for images, _ in loader for one in images]


class IsEven(torch.nn.Module):
    """Says 0, even, of every image."""

    def forward(self, images):
        return torch.tensor([1.0, 0.0]).expand(len(images), 2)


def create_net():
    torch.manual_seed(0)
    return timm.create_model('supernet_mbv2_tiny', width=0.5, num_classes=10)


def work_here(output):
    """What every process does when `torchrun` runs this file."""
    accelerator = train.create_accelerator(Config(threads=1, tracker='none'))
    found = {'num_processes': accelerator.num_processes}

    data = create_data(parse([*CONFIG, 'scale=1', 'ratio=1', 'batch_size=32']), accelerator)
    few = list(batches(data.train, 16, 0))
    found['images'] = [
        (round(float(i.double().sum()), 6), int(t))
        for images, labels in few
        for i, t in zip(images, labels, strict=True)
    ]
    found['top1'] = top1(create_net(), data, accelerator)

    stream = create_stream(output, accelerator)
    found['streamed'] = numbers(batches(stream.train, 4, 2**32 - 1))
    found['stream_scored'] = numbers(stream.val)
    found['stream_top1'] = top1(IsEven(), stream, accelerator)

    found['differs'] = {}
    for part in (None, *DIGESTED):
        net = create_net()
        state = train.start(Config(ema_decay=0.9, opt='adamw'), net, Mask.dense(prunable(net)))
        train_a_step(state)
        if accelerator.process_index == 1:
            change(state, part)
        try:
            state.check_same(accelerator)
            found['same'] = None
        except ValueError as error:
            found['differs'][part] = str(error)

    save = State.save

    def changed(state, *args):
        if (state.round, accelerator.process_index) == (2, 1):
            change(state, 'weights')
        save(state, *args)

    State.save = changed
    try:
        train.main([*QUICK, f'output={output / "run"}'])
    except ValueError as error:
        found['stopped'] = str(error)
    found['checkpoints'] = sorted(path.name for path in (output / 'run/checkpoints').iterdir())
    try:
        Report(Config(output=str(output / 'run'), lr=1), 'top1', accelerator)
    except ValueError as error:
        found['refused'] = str(error)
    (output / f'rank_{accelerator.process_index}.json').write_text(json.dumps(found))


def train_a_step(state):
    torch.manual_seed(0)
    state.net(torch.randn(2, 3, 32, 32)).sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()


def change(state, part):
    """One bit of a part."""
    weight = state.net.conv_stem.weight
    tensors = {
        'mask': next(iter(state.mask.values())),
        'weights': weight.detach(),
        'optimizer': state.optimizer.state[weight].get('exp_avg'),
        'average': state.ema.module.conv_stem.weight.detach(),
    }
    if part == 'arch':
        state.net.arch = None
    elif part:
        first = tensors[part].view(-1)[0]
        first.copy_(~first if first.dtype == torch.bool else torch.nextafter(first, first + 1))


if __name__ == '__main__':
    work_here(Path(sys.argv[1]))
