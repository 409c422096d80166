import pytest
import timm
import torch
from torch import nn

from timm_supertickets import Ticket
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import magnitude


def draw(space):
    """A ticket at 80 % of a member without a residual block, without a kernel size elsewhere."""
    torch.manual_seed(0)
    arch = timm.create_model(f'supernet_{space}_tiny').arch.to_json()
    del arch['blocks'][3]['5']
    arch['blocks'][2] = {}
    if space == 'hr':  # a projected block too; and small enough to be exported in seconds
        arch['blocks'][1] = {}
        for index, block in enumerate(arch['blocks'][4:]):
            del block['7']
            if index % 2:
                del block['5']
    model = timm.create_model(f'superticket_{space}', arch=arch, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.1)
    return Ticket.draw(model, prune(magnitude(model), 0.8), data_config={'input_size': (3, 64, 64)})


@pytest.fixture(scope='session')
def tickets():
    return {space: draw(space) for space in ('mbv2', 'hr')}


@pytest.fixture(scope='session')
def packed(tickets, tmp_path_factory):
    root = tmp_path_factory.mktemp('packed')
    return {space: ticket.save(root / space) for space, ticket in tickets.items()}


@pytest.fixture(scope='session')
def dense(tickets, tmp_path_factory):
    root = tmp_path_factory.mktemp('dense')
    return {space: ticket.save(root / space, dense=True) for space, ticket in tickets.items()}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
