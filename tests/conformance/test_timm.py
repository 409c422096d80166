"""timm's own tests of its models, run on ours."""

import os
import re
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm

import timm_supertickets  # noqa: F401

REFERENCE = 'mobilenetv2_100'
SMALL = ('supernet_mbv2_small', 'supernet_mbv2_tiny', 'supernet_hr_tiny', 'drawn_mbv2', 'drawn_hr')
BIG = tuple(name for name in timm.list_models(['supernet_*', 'superticket_*']) if name not in SMALL)


def fetch(cache, folder):
    """A folder with the test_models.py that the installed timm was released with."""
    name = f'timm-{timm.__version__}'
    sdist = cache / f'{name}.tar.gz'
    if not sdist.exists():
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-binary', 'timm', '--dest', str(folder)]
        done = subprocess.run([*command, f'timm=={timm.__version__}'], capture_output=True, text=True)
        if done.returncode:
            pytest.fail(f'pip cannot download the sdist of {name}, whose tests run here:\n{done.stderr}', pytrace=False)
        os.replace(folder / sdist.name, sdist)
    with tarfile.open(sdist) as archive:
        for member in ('pyproject.toml', 'tests/test_models.py'):
            archive.extract(f'{name}/{member}', folder, filter='data')
    return folder / name


def run(folder, models):
    """Run timm's tests; returns per model the test functions that passed."""
    env = {key: value for key, value in os.environ.items() if key not in ('GITHUB_ACTIONS', 'PYTEST_ADDOPTS')}
    env['CONFORMANCE_MODELS'] = ' '.join(models)
    env['PYTHONPATH'] = os.pathsep.join((str(Path(__file__).parent), *filter(None, sys.path)))
    env['HF_HUB_OFFLINE'] = '1'
    command = [sys.executable, '-m', 'pytest', '-q', '--tb=short', '-p', 'timm_plugin', '-p', 'no:cacheprovider']
    command += ['--junitxml=report.xml', 'tests/test_models.py']
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = defaultdict(set)
    for case in ElementTree.parse(folder / 'report.xml').iter('testcase'):
        found = re.fullmatch(r'(\w+)\[(?:\d+-)?(\w+)(?:\.\w+)?\]', case.get('name'))
        assert found, f'{case.get("name")} is no test of one model'
        if case.find('skipped') is None:
            passed[found[2]].add(found[1])
    return passed


@pytest.mark.parametrize(
    'models', [pytest.param(SMALL, id='small'), pytest.param(BIG, id='big', marks=pytest.mark.slow)]
)
def test_what_timm_tests_on_its_mobilenet_passes_on_ours(pytestconfig, tmp_path, models):
    cache = pytestconfig.cache.mkdir('timm_sdist')
    passed = run(fetch(cache, tmp_path), models)
    assert {'test_model_load_pretrained', 'test_prune_intermediate_layers_contract'} <= passed[REFERENCE]
    for name in models:
        missing = sorted(passed[REFERENCE] - passed[name])
        assert not missing, f'{name} did not go through {", ".join(missing)}'
