import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CREATE = """
import timm, timm_supertickets
print(timm_supertickets.__file__)
model = timm.create_model('supernet_mbv2_tiny', num_classes=3)
print(sum(p.numel() for p in model.parameters()) > 0, len(timm.list_models('*mbv2*')) >= 3)
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    source, dist = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('dist')
    shutil.copytree(ROOT / 'timm_supertickets', source / 'timm_supertickets')
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', str(dist), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(dist.glob('*.whl'))


def test_wheel_holds_the_package_its_types_and_its_licence_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / 'timm_supertickets').rglob('*.py')}
    assert modules <= set(names)
    assert 'timm_supertickets/py.typed' in names
    assert any(name.endswith('LICENSE') for name in names)
    assert all(name.startswith('timm_supertickets') for name in names)


def test_model_is_created_from_the_installed_wheel(wheel, tmp_path):
    site = tmp_path / 'site'
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    env = {**os.environ, 'PYTHONPATH': str(site)}
    run = subprocess.run(
        [sys.executable, '-c', CREATE], cwd=tmp_path, env=env, check=True, capture_output=True, text=True
    )
    file, created = run.stdout.split('\n')[:2]
    assert file.startswith(str(site))
    assert created == 'True True'
