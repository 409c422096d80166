"""pytest plugin that narrows timm's test_models.py to our models and timm's mobilenetv2_100, all with local weights.

timm's tests ask `timm.list_models` for names while they are imported, so it is replaced here, before that. The names
to list come in the environment variable CONFORMANCE_MODELS; `drawn_mbv2` and `drawn_hr` are small tickets that exist
only here, registered as a released ticket is.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.models import generate_default_cfgs, register_model
from torch import nn

from timm_supertickets import Arch, Ticket
from timm_supertickets.models import hr, mbv2
from timm_supertickets.models.build import describe
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import magnitude

REFERENCE = 'mobilenetv2_100'
NAMES = {*os.environ['CONFORMANCE_MODELS'].split(), REFERENCE}
_FOLDER = tempfile.TemporaryDirectory()  # of the weights; removed when the process ends


def thinned(arch: Arch, *dropped: int) -> Arch:
    """The arch without these blocks, and with one kernel size less in every second of the others."""
    blocks = [pairs if i % 2 else pairs[1:] for i, pairs in enumerate(arch.blocks)]
    for index in dropped:
        blocks[index] = ()
    return Arch(arch.space, arch.shape, tuple(blocks), arch.tokens)


MBV2 = thinned(mbv2.full_arch(mbv2.TINY, 16, 128), 2)  # the second block of a stage, a residual one
# a residual and a projected one are dropped; tokens stand beside the rest
HR = thinned(hr.full_arch(hr.TINY, (8, 8), (12, 16, 24, 32, 128), 24, 'classify', tokens=2), 1, 3)

_SMALL = {'input_size': (3, 32, 32), 'pool_size': (1, 1), 'crop_pct': 1.0, 'num_classes': 10}
default_cfgs = generate_default_cfgs({'drawn_mbv2.st': describe(**_SMALL), 'drawn_hr.st': describe(**_SMALL)})


@register_model
def drawn_mbv2(pretrained: bool = False, **kwargs) -> nn.Module:
    return mbv2._create('drawn_mbv2', pretrained, arch=MBV2, **kwargs)


@register_model
def drawn_hr(pretrained: bool = False, **kwargs) -> nn.Module:
    return hr._create('drawn_hr', pretrained, arch=HR, **kwargs)


def give_weights(name: str) -> None:
    """Draw a ticket with 80 % sparsity and register the model again with it as its pretrained weights."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    if name == REFERENCE:
        file = Path(_FOLDER.name, f'{name}.safetensors')
        save_file(model.state_dict(), file)
    else:
        folder = Ticket.draw(model, prune(magnitude(model), 0.8)).save(Path(_FOLDER.name, name))
        file = folder / 'ticket.safetensors'
    entrypoint = timm.model_entrypoint(name)
    for cfg in sys.modules[entrypoint.__module__].default_cfgs[name].cfgs.values():
        cfg.file = str(file)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that it is registered already
        register_model(entrypoint)


for name in sorted(NAMES):
    if name == REFERENCE or not timm.is_model_pretrained(name):
        give_weights(name)

_list_models = timm.list_models


def list_models(*args, module='', **kwargs) -> list[str]:
    """timm's, of our names; `module` is ignored, because timm's tests name timm's own modules there."""
    return [name for name in _list_models(*args, **kwargs) if name.split('.')[0] in NAMES]


timm.list_models = list_models


def pytest_configure(config):
    config.addinivalue_line('markers', 'timeout: of pytest-timeout, which is not needed here')


def pytest_collection_modifyitems(config, items):
    """Leave out the tests that timm runs on models of its own choice."""

    def is_ours(item):
        params = item.callspec.params if hasattr(item, 'callspec') else {}
        return str(params.get('model_name')).split('.')[0] in NAMES  # a placeholder where timm found no name

    config.hook.pytest_deselected(items=[item for item in items if not is_ours(item)])
    items[:] = filter(is_ours, items)
