"""The training recipe with models of timm that are no supernets."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import train
import yaml
from parts.classification import create_data

from timm_supertickets import load_ticket, prunable

ROOT = Path(__file__).parents[2]
SMOKE = ['--config', str(ROOT / 'recipes/configs/smoke.yaml'), 'model_args={}', 'targets=[0.4,0.8]', 'threads=1']
QUICK = [*SMOKE, 'model=test_resnet', 'rounds=4', 'round_steps=3', 'cooldown_steps=2', 'batch_size=8', 'ema_decay=0.9']
TICKETS = {'test_resnet_s40': 0.4, 'test_resnet_s80': 0.8}


def ticket_bytes(output):
    return {str(f.relative_to(output)): f.read_bytes() for f in sorted(Path(output).glob('test_resnet_*/*'))}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """An uninterrupted run of four rounds and two tickets."""
    output = tmp_path_factory.mktemp('stock') / 'run'
    train.main([*QUICK, f'output={output}'])
    return output


@pytest.mark.parametrize(('name', 'sparsity'), TICKETS.items())
def test_tickets_are_drawn_at_exact_sparsity(whole, name, sparsity):
    ticket = load_ticket(whole / name)
    weights = prunable(timm.create_model('test_resnet'))
    total = sum(weight.numel() for weight in weights.values())
    assert ticket.mask.keys() == weights.keys()
    assert (ticket.mask.total, ticket.mask.alive) == (total, total - round(sparsity * total))
    assert (ticket.architecture, ticket.arch) == ('test_resnet', None)
    assert 'supernet' not in ticket.facts
    assert ticket.facts['how'] == 'test_resnet was pruned while it trained, from random weights.'
    assert ticket.pretrained_cfg['input_size'] == [3, 32, 32]
    assert ticket.pretrained_cfg['mean'] == [0.5, 0.5, 0.5]


def test_nothing_is_searched_and_the_config_says_so(whole):
    assert yaml.safe_load((whole / 'config.yaml').read_text())['search'] == 'none'
    rows = list(csv.DictReader((whole / 'summary.csv').read_text().splitlines()))
    assert [row['name'] for row in rows].count('trunk') == 4
    assert {row['name'] for row in rows} == {'trunk', *TICKETS}
    assert len({row['macs'] for row in rows}) == 1
    sparse = [int(row['sparse_macs']) for row in rows if row['name'] == 'trunk']
    assert sparse == sorted(sparse, reverse=True)
    for row in rows:
        if row['name'] in TICKETS:
            assert int(row['bytes']) == (whole / row['name'] / 'ticket.safetensors').stat().st_size
    assert sorted(path.name for path in whole.glob('*.png')) == ['density.png', 'rounds.png']


def test_interrupted_and_resumed_equals_uninterrupted(whole, tmp_path, monkeypatch):
    trained = []
    train_stretch = train.train

    def interrupted(*args):
        if len(trained) == 3:  # two rounds and a ticket
            raise KeyboardInterrupt
        trained.append(train_stretch(*args))
        return trained[-1]

    output = tmp_path / 'run'
    monkeypatch.setattr(train, 'train', interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main([*QUICK, f'output={output}'])
    monkeypatch.undo()
    assert ticket_bytes(output) != ticket_bytes(whole)
    train.main([*QUICK, f'output={output}'])
    assert len(ticket_bytes(whole)) == 6
    assert ticket_bytes(output) == ticket_bytes(whole)


def test_timm_alone_loads_a_drawn_ticket(whole):
    code = f"""if True:
        import sys
        sys.modules['timm_supertickets'] = None
        import timm, torch
        model = timm.create_model('local-dir:{whole / 'test_resnet_s80'}', pretrained=True).eval()
        print(model(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).tolist())"""
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    built = load_ticket(whole / 'test_resnet_s80').build()
    assert ran.stdout.strip() == str(built(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).tolist())


@pytest.mark.parametrize('changes', [['model=test_vit', 'img_size=16'], ['model=test_convnext', 'reactivation=reset']])
def test_models_without_batch_norm_and_those_made_for_one_size(tmp_path, changes):
    train.main([*QUICK, 'rounds=2', *changes, f'output={tmp_path / "run"}'])
    ticket = load_ticket(next((tmp_path / 'run').glob('test_*_s80')))
    assert ticket.mask.total - ticket.mask.alive == round(0.8 * ticket.mask.total)
    assert ticket.build()(torch.randn(1, *ticket.pretrained_cfg['input_size'])).shape == (1, 10)


def test_pretrained_weights_are_where_training_starts(whole, tmp_path, monkeypatch):
    folder = whole / 'test_resnet_s40'
    started = []
    start = train.start

    def stop(*args):
        started.append(start(*args).net)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, 'start', stop)
    for number, extra in enumerate(([f'model=local-dir:{folder}', 'pretrained=true'], [])):
        with pytest.raises(KeyboardInterrupt):
            train.main([*QUICK, *extra, f'output={tmp_path / str(number)}'])
    weights = load_ticket(folder).weights
    pretrained, random = (net.state_dict() for net in started)
    assert pretrained.keys() == random.keys() == weights.keys()
    assert all(torch.equal(pretrained[name], tensor) for name, tensor in weights.items())
    assert not torch.equal(random['layer1.0.conv1.weight'], weights['layer1.0.conv1.weight'])


def test_images_are_normalised_as_the_pretrained_weights_had_them():
    from accelerate import Accelerator
    from parts.config import parse

    known = timm.get_pretrained_cfg('resnet18')
    grey = ['pretrained=true', 'in_chans=1']
    for argv, mean in (([], (0.5,) * 3), (['pretrained=true'], known.mean), (grey, (0.5,))):
        config = parse([*SMOKE, 'model=resnet18', *argv])
        data = create_data(config, Accelerator(), train.pretrained_cfg(config))
        assert data.config['mean'] == mean
        assert data.val.mean.flatten().tolist() == pytest.approx([255 * part for part in mean])


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        (['search=budget'], r'search=budget: model=test_resnet has no channels to search; give search=none, or one of '
                            r'.*supernet_mbv2_tiny'),
        (['search=threshold'], 'search=threshold: model=test_resnet has no channels to search'),
        (
            ['model=supernet_mbv2_tiny', 'rounds=1'],
            'search=budget, but no event falls within search_until=0.5 of rounds=1: give more rounds=, or search=none',
        ),
        (['model=nope'], r'model=nope with .* cannot be made: Unknown model \(nope\)'),
        (['model_args={widht: 2}'], "model=test_resnet with model_args={'widht': 2}.* cannot be made: .*widht"),
        (['model=supernet_mbv2_tiny', 'pretrained=true'], 'pretrained=True cannot be made: No pretrained weights'),
        (['model=test_resnet.nope', 'pretrained=true'], r'model=test_resnet.nope: Invalid pretrained tag'),
        (['model=inception_v3'], 'model=inception_v3 does not take images of 32x32: '),
        (['model=nf_resnet26'], 'model=nf_resnet26 has no weight that can be pruned'),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_before_anything_is_written(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says) as caught:
        train.main([*QUICK, *changes, f'output={tmp_path / "run"}'])
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'run').exists()
