import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from parts.program import line_of
from torch.utils.data import DataLoader

CODE = """
import torch
from parts.program import keep_freed_memory
keep_freed_memory()
ones = torch.ones(2**26)
del ones
print(int(open('/proc/self/statm').read().split()[1]) * 4096)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='it speaks to glibc alone')
def test_freed_memory_is_kept_unless_the_user_says_otherwise():
    recipes = Path(__file__).parents[2] / 'recipes'
    held = {}
    for said in ({}, {'MALLOC_MMAP_THRESHOLD_': '131072', 'MALLOC_TRIM_THRESHOLD_': '131072'}):
        env = {**os.environ, 'PYTHONPATH': str(recipes), **said}
        done = subprocess.run([sys.executable, '-c', CODE], env=env, capture_output=True, text=True, check=True)
        held[bool(said)] = int(done.stdout)
    assert 0.9 * 2**28 < held[False] - held[True] < 1.5 * 2**28


class Broken:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise ValueError('a.png cannot be read')


@pytest.mark.parametrize('workers', [0, 1])
def test_an_error_in_a_worker_is_one_line(workers):
    with pytest.raises(ValueError, match='cannot be read') as caught:
        next(iter(DataLoader(Broken(), num_workers=workers)))
    assert line_of(caught.value) == 'a.png cannot be read'
