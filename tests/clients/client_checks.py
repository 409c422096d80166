"""What the tests of other people's libraries share."""

import torch
from torch import nn

from timm_supertickets import Mask, keep_sparse

SPACES = ('mbv2', 'hr')


def without_gradient(model):
    """Trainable parameters that no loss reached."""
    return [name for name, param in model.named_parameters() if param.requires_grad and param.grad is None]


def with_zero_gradient(model):
    return [name for name, param in model.named_parameters() if param.grad is None or not param.grad.any()]


def timm_name(name, prefix):
    """A backbone's parameter as a ticket names it: without the wrapper and timm's flattening of stages."""
    name = name.removeprefix(prefix).removeprefix('model.')  # timm's getter of features is one more wrapper
    return name.replace('blocks_', 'blocks.')


def check_stays_sparse(model, prefix, ticket, loss):
    """Three steps with weight decay, momentum and clipping revive nothing of the ticket inside a wrapper.

    Args:
        model: Somebody's model around the ticket's features.
        prefix: Where the features are in it.
        ticket: The ticket that they came from.
        loss: `model -> scalar`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.1)
    loss(model).backward()
    optimizer.step()  # moments that would revive the dead
    handle = keep_sparse(model, optimizer)  # the mask is found in the zeros

    # what was found is the ticket's mask, less its head and the tensors that have no zeros
    found = {timm_name(name, prefix): alive for name, alive in handle.mask.items() if name.startswith(prefix)}
    held = {timm_name(name, prefix) for name, _ in model.named_parameters() if name.startswith(prefix)}
    expected = {name: alive for name, alive in ticket.mask.items() if name in held and not alive.all()}
    assert len(expected) > 10
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], alive) for name, alive in expected.items())

    optimizer.param_groups[0]['lr'] = 1e-2
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    params = dict(model.named_parameters())
    for name, alive in handle.mask.items():
        assert not params[name][~alive].any(), name
        assert not params[name].grad[~alive].any(), name
        assert not torch.equal(params[name][alive], before[name][alive]), name
    assert Mask.from_zeros(model).sparsity == handle.mask.sparsity
