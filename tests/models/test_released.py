"""The tickets that travel with the package."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import timm_supertickets
from timm_supertickets import load_ticket, verify_ticket

PRETRAINED = timm.list_models('superticket*', pretrained=True)
FOLDER = Path(timm_supertickets.__file__).parent / 'tickets'


def test_those_that_are_shipped_are_listed_and_are_small():
    assert [f'superticket_mbv2_s{s}.st_fmnist' for s in (50, 80, 90)] == [n for n in PRETRAINED if '_mbv2_' in n]
    assert sorted(path.name for path in FOLDER.iterdir()) == PRETRAINED
    assert sum(path.stat().st_size for path in FOLDER.rglob('*')) <= 12e6


@pytest.mark.parametrize('name', PRETRAINED)
def test_a_name_is_its_ticket(name):
    ticket = verify_ticket(name)
    architecture, _, tag = name.partition('.')
    model = timm.create_model(architecture, pretrained=True)
    assert model.arch == ticket.arch
    assert model.pretrained_cfg['tag'] == tag
    for key, value in ticket.pretrained_cfg.items():
        found = model.pretrained_cfg[key]
        assert (list(found) if isinstance(found, tuple) else found) == value
    for key, tensor in model.state_dict().items():
        assert tensor.dtype in (torch.float32, torch.int64)
        assert torch.equal(tensor, ticket.weights[key].to(tensor.dtype))
    assert ticket.sparsity == pytest.approx(float(architecture[-2:]) / 100, abs=1 / ticket.mask.total)


@pytest.mark.parametrize('name', PRETRAINED)
def test_its_facts_are_those_of_its_card(name):
    facts = timm_supertickets.card.read_facts(Path(__file__).parents[2] / f'hub_cards/{name}.yaml')
    ticket = load_ticket(name)
    shown = {key: value for key, value in ticket.facts.items() if key in timm_supertickets.card.GIVEN}
    assert {'command', 'commit', 'supernet', 'top1'} < set(shown)
    assert {key: facts[key] for key in shown} == shown
    assert facts['packed_bytes'] == (FOLDER / name / 'ticket.safetensors').stat().st_size
    assert facts['shipped']


def test_an_arch_is_data_in_the_models_file_and_fits_other_classes_channels_and_features():
    model = timm.create_model('superticket_mbv2_s80', pretrained=True, num_classes=3, in_chans=1).eval()
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 3)
    features = timm.create_model('superticket_mbv2_s80', pretrained=True, features_only=True)
    assert features.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert [model.arch.blocks[i] for i in (0, 8)] == [
        tuple(timm_supertickets.models.mbv2.FASHION_MNIST[i].items()) for i in (0, 8)
    ]
    with pytest.raises(TypeError, match='arch'):
        timm.create_model('superticket_mbv2_s80', arch={})


def test_they_need_no_network_and_no_current_directory(tmp_path):
    code = "import timm, timm_supertickets; timm.create_model('superticket_mbv2_s50', pretrained=True)"
    env = {'PYTHONPATH': str(FOLDER.parents[1]), 'HF_ENDPOINT': 'http://127.0.0.1:9', 'OMP_NUM_THREADS': '1'}
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, check=True, capture_output=True)


@pytest.mark.parametrize('sparsity', [50, 80, 90])
def test_a_name_of_the_hr_space_is_an_arch_without_weights(sparsity):
    model = timm.create_model(f'superticket_hr_s{sparsity}').eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert dict(model.arch.blocks[14]) == timm_supertickets.models.hr.FOUND[14] == {3: 31}
    assert model.supernet_arch() == timm.create_model('supernet_hr_tiny').arch
    with pytest.raises(RuntimeError, match=f'No pretrained weights exist for superticket_hr_s{sparsity}'):
        timm.create_model(f'superticket_hr_s{sparsity}', pretrained=True)


def test_a_name_without_weights_says_so():
    with pytest.raises(RuntimeError, match='No pretrained weights exist for superticket_mbv2'):
        timm.create_model('superticket_mbv2', pretrained=True)
    with pytest.raises(ValueError, match=r'superticket_mbv2 does not exist; .* one of: superticket_mbv2_s50.st_fmnist'):
        load_ticket('superticket_mbv2')
