import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import finetune
import numpy as np
import pytest
import timm
import torch
import train
from finetune import Config
from matplotlib.figure import Figure
from parts.classification import digits
from PIL import Image
from torch import nn

from timm_supertickets import Mask, load_ticket, prunable
from timm_supertickets.cost import model_cost

ROOT = Path(__file__).parents[2]
SMOKE = ['--config', str(ROOT / 'recipes/configs/smoke.yaml'), 'threads=1', 'round_steps=3', 'batch_size=8']
QUICK = ['threads=1', 'rounds=2', 'round_steps=3', 'batch_size=8', 'recalibrate=2']


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """A run that searches and draws one ticket, and another that draws a dense one; both keep their first weights."""
    output = tmp_path_factory.mktemp('drawn')
    few = ['cooldown_steps=2', 'keep_initial=true']
    train.main([*SMOKE, *few, 'rounds=4', 'targets=[0.8]', f'output={output / "sparse"}'])
    train.main([*SMOKE, *few, 'rounds=2', 'targets=[0.0]', f'output={output / "dense"}'])
    return output


@pytest.fixture(scope='module')
def sparse(drawn):
    return drawn / 'sparse/superticket_mbv2_s80'


def tuned(output, ticket, *args):
    finetune.main([f'ticket={ticket}', *QUICK, *args, f'output={output}'])
    (folder,) = output.glob('*_s*')
    return load_ticket(folder)


def same(mask, other):
    return mask.keys() == other.keys() and all(torch.equal(mask[name], other[name]) for name in mask)


def test_a_kept_mask_is_kept_and_the_living_are_trained(sparse, tmp_path):
    before, after = load_ticket(sparse), tuned(tmp_path / 'run', sparse)
    assert same(before.mask, after.mask)
    assert after.arch == before.arch
    for name, alive in before.mask.items():
        assert not after.weights[name][~alive].any()
    assert all(not torch.equal(after.weights[name], before.weights[name]) for name in before.mask)
    assert 'drawn on digits was fine-tuned on digits from its weights, with its mask kept' in after.facts['how']


def test_training_starts_from_the_tickets_weights(sparse, tmp_path):
    # no step is taken: what is saved is what was loaded, but for batch norm, which is measured anew
    before = load_ticket(sparse)
    after = tuned(tmp_path / 'kept', sparse, 'rounds=0', 'recalibrate=0')
    assert all(torch.equal(tensor, after.weights[name]) for name, tensor in before.weights.items())
    fresh = tuned(tmp_path / 'fresh', sparse, 'rounds=0', 'recalibrate=0', 'weights=fresh')
    assert same(fresh.mask, before.mask)
    assert not any(torch.equal(fresh.weights[name], before.weights[name]) for name in before.mask)


def test_a_shuffled_mask_keeps_the_density_of_every_layer(sparse, tmp_path):
    before, after = load_ticket(sparse), tuned(tmp_path / 'run', sparse, 'mask=shuffle', 'weights=fresh')
    counts = [{name: int(alive.sum()) for name, alive in ticket.mask.items()} for ticket in (before, after)]
    assert counts[0] == counts[1]
    assert not same(before.mask, after.mask)


def test_a_dense_mask_lets_all_weights_train(sparse, tmp_path):
    after = tuned(tmp_path / 'run', sparse, 'mask=dense')
    assert after.sparsity == 0
    # some have no gradient: a 7x7 kernel on a map of one pixel
    living = [
        sum(int((weights[name] != 0).sum()) for name in after.mask)
        for weights in (load_ticket(sparse).weights, after.weights)
    ]
    assert living[0] == round(0.2 * after.mask.total)
    assert living[1] > 0.5 * after.mask.total


def test_the_head_alone_is_trained(sparse, tmp_path):
    before, after = load_ticket(sparse), tuned(tmp_path / 'run', sparse, 'tune=head')
    changed = {name for name, tensor in before.weights.items() if not torch.equal(tensor, after.weights[name])}
    assert changed == {'classifier.weight', 'classifier.bias'}
    assert 'with its mask kept, its head alone.' in after.facts['how']
    with open(tmp_path / 'run/summary.csv', newline='') as file:
        spent = int(list(csv.DictReader(file))[-1]['train_macs'])
    classifier = before.weights['classifier.weight'].numel()
    # on the way back there is the classifier alone; 2 rounds of 3 steps of 8 images
    assert spent == 48 * (model_cost(before.build(), (3, 32, 32)).macs + 2 * classifier)


def test_pruning_at_once_takes_the_smallest_weights(drawn, tmp_path):
    dense = drawn / 'dense/superticket_mbv2_s0'
    before = load_ticket(dense)
    after = tuned(tmp_path / 'run', dense, 'rounds=0', 'recalibrate=0', 'sparsity=0.7', 'floor=0', 'score=magnitude')
    assert before.sparsity == 0
    dying = {name: torch.ones_like(alive) for name, alive in after.mask.items()}  # but for those of dead channels
    for group in before.build().channel_groups():
        for channel in range(group.channels):
            parts = [
                (member.name, member.dim, channel - member.start)
                for member in group.members
                if member.name in after.mask and member.start <= channel < member.stop
            ]
            if not any(after.mask[name].select(dim, index).any() for name, dim, index in parts):
                for name, dim, index in parts:
                    dying[name].select(dim, index).fill_(False)
    flat, alive, competed = (
        torch.cat([tensors[name].flatten() for name in before.mask]) for tensors in (before.weights, after.mask, dying)
    )
    assert int((~alive).sum()) == round(0.7 * flat.numel())
    assert flat[~alive & competed].abs().max() <= flat[alive].abs().min()


def test_initial_weights_are_those_that_the_run_began_with(drawn):
    torch.manual_seed(0)
    first = timm.create_model('supernet_mbv2_tiny', width=0.5, num_classes=10).state_dict()
    sparse, initial = (load_ticket(drawn / f'sparse/superticket_mbv2_s80{end}') for end in ('', '_initial'))
    assert same(sparse.mask, initial.mask)
    assert initial.arch == sparse.arch != load_ticket(drawn / 'dense/superticket_mbv2_s0').arch
    assert torch.equal(initial.weights['classifier.weight'], first['classifier.weight'])
    for name in sparse.mask:
        # channels have died: every value that lives is one of the first ones of that tensor, in the same order
        values, firsts = initial.weights[name][sparse.mask[name]], first[name].flatten()
        places = [(firsts == value).nonzero()[0].item() for value in values]
        assert places == sorted(places)


def test_other_input_channels(sparse, tmp_path):
    after = tuned(tmp_path / 'run', sparse, 'in_chans=1', 'batch_size=16')
    assert after.weights['conv_stem.weight'].shape[1] == 1
    assert after.pretrained_cfg['input_size'] == [1, 32, 32]


def test_a_picture_says_where_the_net_is_wrong(sparse, tmp_path, monkeypatch):
    figures = []

    def create_figure(*size):
        figures.append(Figure(figsize=size))
        return figures[-1]

    monkeypatch.setattr(finetune, 'create_figure', create_figure)
    ticket = tuned(tmp_path / 'run', sparse, 'in_chans=1', 'batch_size=16')
    assert (tmp_path / 'run/predictions.png').read_bytes()[:4] == b'\x89PNG'
    images, labels, names = digits('L')[1].images, digits('L')[1].labels, digits('L')[2]
    axes = figures[0].axes
    assert len(axes) == 12
    net = ticket.build().eval()
    for axis, image, label in zip(axes, images, labels, strict=False):
        enlarged = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
        pixels = torch.tensor(np.array(enlarged)).float() / 255
        assert (torch.tensor(axis.images[0].get_array()) - pixels).abs().max() < 1e-6
        with torch.inference_mode():
            said = net(pixels.sub(0.5).div(0.5)[None, None]).argmax().item()
        assert axis.get_title() == (names[label] if said == label else f'{names[label]}:\n{names[said]}')
    assert {axis.title.get_color() for axis in axes if ':' in axis.get_title()} == {'r'}


def test_interrupted_and_resumed_equals_uninterrupted(sparse, tmp_path, monkeypatch):
    whole = tuned(tmp_path / 'whole', sparse)
    train_round, done = finetune.train, []

    def interrupted(*args):
        if done:
            raise KeyboardInterrupt
        done.append(train_round(*args))
        return done[0]

    monkeypatch.setattr(finetune, 'train', interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / 'cut', sparse)
    monkeypatch.undo()
    resumed = tuned(tmp_path / 'cut', sparse)
    assert all(torch.equal(tensor, resumed.weights[name]) for name, tensor in whole.weights.items())
    assert (tmp_path / 'cut/config.yaml').read_text().replace('cut', 'whole') == (
        tmp_path / 'whole/config.yaml'
    ).read_text()


def test_training_is_counted_in_macs(sparse, tmp_path):
    tuned(tmp_path / 'run', sparse)
    with open(tmp_path / 'run/summary.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    net = timm.create_model(f'local-dir:{sparse}', pretrained=True)
    one = model_cost(net, (3, 32, 32)).macs
    # a backward pass is two forward passes; 3 steps of 8 images a round
    assert [int(row['train_macs']) for row in rows] == [3 * one * 24, 3 * one * 48, 3 * one * 48]


def test_a_stock_model_is_fine_tuned_too(tmp_path):
    train.main([
        *SMOKE, 'model=test_resnet', 'model_args={}', 'rounds=1', 'cooldown_steps=1', 'targets=[0.6]',
        f'output={tmp_path / "stock"}',
    ])  # fmt: skip
    folder = tmp_path / 'stock/test_resnet_s60'
    after = tuned(tmp_path / 'run', folder, 'rounds=1')
    assert after.architecture == 'test_resnet'
    assert same(after.mask, load_ticket(folder).mask)
    assert set(after.mask) == set(prunable(after.build()))


def test_launched(sparse, tmp_path):
    command = [str(Path(sys.executable).with_name('accelerate')), 'launch', 'recipes/finetune.py', f'ticket={sparse}']
    env = {**os.environ, 'COLUMNS': '140'}
    ran = subprocess.run(
        [*command, *QUICK, f'output={tmp_path / "run"}'], cwd=ROOT, text=True, capture_output=True, check=False, env=env
    )
    assert ran.returncode == 0, ran.stderr
    assert 'superticket_mbv2_s80' in ran.stdout
    assert f"timm.create_model('local-dir:{tmp_path / 'run/superticket_mbv2_s80'}', pretrained=True)" in ran.stdout


@pytest.mark.parametrize(
    ('args', 'says'),
    [
        ([], 'ticket is missing; give ticket=FOLDER'),
        (['ticket=nowhere'], 'nowhere does not exist'),
        (['ticket=nowhere', 'sparsity=1'], r'sparsity must be in \[0, 1\), got 1'),
        (['ticket=nowhere', 'mask=none'], 'mask'),
        (['ticket=nowhere', 'task=segment', 'teacher=some'], "teacher=some .* task 'segment' has no use for it"),
    ],
)
def test_bad_input_is_one_clear_line_before_anything_is_written(tmp_path, args, says):
    with pytest.raises(ValueError, match=says) as caught:
        finetune.main([*args, f'output={tmp_path / "run"}'])
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('steps', 'warmup'), [(20, 0), (20, 10), (20, 19)])
def test_the_learning_rate_falls_to_zero_until_the_last_step(steps, warmup):
    net = nn.Linear(2, 2)
    config = Config(ticket='none', rounds=2, round_steps=steps // 2, warmup_steps=warmup, lr=1.0)
    state = train.start(config, net, Mask.dense(dict(net.named_parameters())))
    rate, rates = finetune.falling(config, state), []
    for step in range(steps):
        rate.step_update(step)
        rates.append(state.optimizer.param_groups[0]['lr'])
    assert rates[:warmup] == pytest.approx([step / max(1, warmup) for step in range(warmup)])
    left = steps - warmup
    assert rates[warmup:] == pytest.approx([(1 + math.cos(math.pi * step / left)) / 2 for step in range(left)])
