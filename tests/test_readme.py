"""What the README shows in Python does what it says."""

from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from test_hub import hub, pytestmark, slept  # noqa: F401 the loopback Hub, its client's warning, and its clock

from timm_supertickets import Mask, load_ticket

README = (Path(__file__).parents[1] / 'README.md').read_text(encoding='utf-8')
BLOCKS = {
    code.content: index
    for index, code in enumerate(token for token in MarkdownIt().parse(README) if token.type == 'fence')
    if code.info == 'python'
}


def block(words):
    """The one block that has these words in it."""
    (found,) = [code for code in BLOCKS if words in code]
    return found


def run(words):
    names = {}
    exec(compile(block(words), 'README.md', 'exec'), names)
    return names


@pytest.fixture(autouse=True)
def where(tmp_path, monkeypatch):
    """A folder in which the first run has drawn its tickets."""
    monkeypatch.chdir(tmp_path)
    load_ticket('superticket_mbv2_s90').save('output/mbv2_digits/superticket_mbv2_s90')


def sparse(model):
    return Mask.from_zeros(model).sparsity


RUN = {
    "'local-dir:output": lambda names: sparse(names['model']) > 0.89,
    'offline: its weights': lambda names: sparse(names['model']) > 0.89,
    'kept.remove()': lambda names: names['model'](torch.zeros(2, 3, 32, 32)).shape == (2, 5),
    'smp.Unet': lambda names: names['model'](torch.zeros(2, 3, 64, 64)).shape == (2, 3, 64, 64),
    'RetinaNet': lambda names: (
        names['model'].eval()([torch.rand(3, 64, 64)])[0].keys() == {'boxes', 'scores', 'labels'}
        and sparse(names['body']) > 0.78  # without conv_head, which is sparser than the rest
    ),
    'timm_supertickets.bake': lambda names: not names['model'].training and sparse(names['model']) > 0.8,
    'transformers': lambda names: sparse(names['model']) > 0.79 and len(names['kept'].mask) > 20,
    "'my_resnet18_s80'": lambda names: load_ticket('my_resnet18_s80').mask.alive == names['mask'].alive,
}


@pytest.mark.parametrize('words', RUN)
def test_what_is_shown_runs(words):
    assert RUN[words](run(words))


def test_sharing_runs(hub):  # noqa: F811 the fixture
    names = run('push_ticket')
    assert names['ticket'].facts['hub']
    assert sparse(names['model']) > 0.89


def test_nothing_that_is_shown_is_left_out():
    assert len(BLOCKS) == len({block(words) for words in [*RUN, 'push_ticket']})
