import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm

from timm_supertickets import load_ticket

ROOT = Path(__file__).parents[1]

CREATE = """
import timm, timm_supertickets
print(timm_supertickets.__file__)
model = timm.create_model('supernet_mbv2_tiny', num_classes=3)
print(sum(p.numel() for p in model.parameters()) > 0, len(timm.list_models('*mbv2*')) >= 3)
from timm_supertickets import Mask, Ticket, card, prunable
ticket = Ticket.draw(model, Mask.dense(prunable(model)), facts={'dataset': 'digits'})
ready = timm.create_model('superticket_mbv2_s90', pretrained=True)
print(ready.pretrained_cfg['file'], sum(int((p == 0).sum()) for p in ready.parameters()))
print('CC BY 4.0' in card.render(card.gather_facts(ticket, 'installed')))
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    source, dist = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('dist')
    for name in ('timm_supertickets', 'hub_cards'):
        shutil.copytree(ROOT / name, source / name)
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', str(dist), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(dist.glob('*.whl'))


def test_wheel_holds_the_package_its_types_and_its_licence_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / 'timm_supertickets').rglob('*.py')}
    assert modules <= set(names)
    others = ('py.typed', 'gradients.cpp', 'kernels.cpp', 'hub_cards/TEMPLATE.md', 'hub_cards/DATA.yaml')
    data = {f'timm_supertickets/{name}' for name in others}
    tickets = [f'timm_supertickets/tickets/{name}' for name in timm.list_models('superticket*', pretrained=True)]
    data |= {f'{ticket}/{name}' for ticket in tickets for name in ('config.json', 'ticket.safetensors')}
    assert data == {name for name in names if '.dist-info/' not in name} - modules
    assert any(name.endswith('LICENSE') for name in names)
    assert all(name.startswith('timm_supertickets') for name in names)


def test_model_is_created_from_the_installed_wheel(wheel, tmp_path):
    site = tmp_path / 'site'
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    env = {**os.environ, 'PYTHONPATH': str(site), 'HF_HUB_OFFLINE': '1'}
    run = subprocess.run(
        [sys.executable, '-c', CREATE], cwd=tmp_path, env=env, check=True, capture_output=True, text=True
    )
    file, created, ready, rendered = run.stdout.split('\n')[:4]
    weights, zeros = ready.split()
    mask = load_ticket('superticket_mbv2_s90').mask
    assert all(path.startswith(str(site)) for path in (file, weights))
    assert int(zeros) >= mask.total - mask.alive
    assert (created, rendered) == ('True True', 'True')
