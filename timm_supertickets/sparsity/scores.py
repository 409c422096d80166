"""Scores: functions from a net to `{name: tensor}`, higher = more worth keeping.

All of them score every prunable weight, frozen ones too, and leave the net as it was.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .mask import prunable

TINY = 2.0**-512


@torch.no_grad()
def magnitude(model: nn.Module) -> dict[str, Tensor]:
    """The absolute value of every prunable weight.

    Source:
        Han et al., Learning both weights and connections, https://arxiv.org/abs/1506.02626.
    """
    return {name: param.abs() for name, param in prunable(model).items()}


@torch.no_grad()
def lamp(model: nn.Module) -> dict[str, Tensor]:
    """Layer-adaptive magnitude: a weight's square by the sum of the squares of its tensor that are not smaller.

    Weights of all tensors can be compared: what scales a whole tensor, such as a batch norm behind it would undo,
    changes no score, and the largest weight of every tensor scores 1. Within a tensor the order is that of magnitude.

    Source:
        Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, https://arxiv.org/abs/2010.07611.
    """
    return {name: _lamp(param) for name, param in prunable(model).items()}


def _lamp(param: Tensor) -> Tensor:
    weights = param.detach().flatten().to(torch.promote_types(param.dtype, torch.float32))
    squares, order = weights.square().sort(descending=True, stable=True)
    scores = squares / squares.cumsum(0).clamp_min(torch.finfo(squares.dtype).tiny)
    return torch.empty_like(scores).scatter_(0, order, scores).view(param.shape)


def random(model: nn.Module, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Uniform numbers in [0, 1), the baseline that a criterion has to beat.

    They are drawn on the generator's device, or else on the CPU: the same for a model wherever it lies.

    Args:
        model: Its prunable weights are scored.
        generator: Where the numbers come from; torch's own by default.
    """
    device = torch.device('cpu') if generator is None else generator.device
    return {
        name: torch.rand(param.shape, generator=generator, device=device).to(param.device)
        for name, param in prunable(model).items()
    }


def snip(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Connection sensitivity, `|w * dL/dw|`: how much the loss would change without the weight, to first order.

    The scores are not divided by their sum, which changes no order.

    Args:
        model: Its prunable weights are scored.
        loss: Runs the model on some data and returns a scalar; called once, in the modes that the model is in.

    Raises:
        ValueError: A loss that is no scalar, or that depends on no prunable weight.

    Source:
        Lee et al., SNIP, https://arxiv.org/abs/1810.02340.
    """
    weights = prunable(model)
    with _untouched(model):
        gradients = _gradients(weights, loss)
    return {name: (param.detach() * gradients[name]).abs() for name, param in weights.items()}


def grasp(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Gradient signal preservation, `w * Hg`: how much gradient flow is lost without the weight, to first order.

    Gradient flow is half the squared norm of the gradient g of the prunable weights, H the Hessian of the loss. The
    paper scores the change by a removal, `S(-w) = -w * Hg`, and removes the weights with the highest S. Here the sign
    is turned: a positive score means that gradient flow would fall, and such weights are kept first.

    Args:
        model: Its prunable weights are scored.
        loss: Runs the model on some data and returns a scalar that can be differentiated twice; called once, in the
            modes that the model is in.

    Raises:
        ValueError: A loss that is no scalar, or that depends on no prunable weight.

    Source:
        Wang et al., Picking winning tickets before training, https://arxiv.org/abs/2002.07376.
    """
    weights = prunable(model)
    with _untouched(model):
        gradients = _gradients(weights, loss, create_graph=True)
        with torch.enable_grad():
            flow = sum((gradient.detach() * gradient).sum() for gradient in gradients.values())
        assert isinstance(flow, Tensor)
        if flow.requires_grad:
            products = torch.autograd.grad(flow, list(weights.values()), materialize_grads=True)
        else:  # a loss that is linear in the weights has no curvature
            products = tuple(torch.zeros_like(param) for param in weights.values())
    return {name: param.detach() * product for (name, param), product in zip(weights.items(), products, strict=True)}


def synflow(model: nn.Module, input_size: Sequence[int]) -> dict[str, Tensor]:
    """Synaptic flow: the sum over all paths through a weight of the product of |w| along them. It needs no data.

    It is `|w| * dR/d|w|`, R the summed output for an input of ones, with every parameter by its absolute value, biases
    zero and batch norm neutral (scale one, statistics of a standard normal), in eval mode and float64. The input is in
    truth a tiny constant, and the scores are scaled back: activations that saturate, such as ReLU6, stay linear.
    The paper prunes in many small steps and scores anew before each.

    Args:
        model: Its prunable weights are scored. It returns a tensor, or a list or tuple of tensors.
        input_size: Shape of one input without the batch, e.g. `(3, 224, 224)`.

    Returns:
        The scores in float64: they go beyond the range of float32 in deep nets.

    Raises:
        ValueError: No path leads from the input to the output, or R is beyond float64.

    Source:
        Tanaka et al., SynFlow, https://arxiv.org/abs/2006.05467.
    """
    weights = prunable(model)
    tensors = _linear(model)
    leaves = [tensors[param].requires_grad_() for param in weights.values()]
    named = {name: tensors[tensor] for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    device = next(model.parameters()).device
    with _untouched(model), torch.enable_grad():
        model.eval()
        ones = torch.full((1, *input_size), TINY, dtype=torch.float64, device=device)
        # called on other tensors: the model's own are never written to
        outputs = torch.func.functional_call(model, named, (ones,))
        total = sum(output.sum() for output in ([outputs] if isinstance(outputs, Tensor) else outputs))
        assert isinstance(total, Tensor)
        flow = total.item() / TINY
        if not 0 < flow < float('inf'):
            raise ValueError(f'synaptic flow of {type(model).__name__} is {flow}, it must be positive and finite')
        gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
    return {
        name: leaf.detach() * gradient / TINY for name, leaf, gradient in zip(weights, leaves, gradients, strict=True)
    }


def agree(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make scores the same on all processes, to the bit: their mean. Without torch.distributed they stay.

    All processes call it, with the same names in the same order. The mean of scores is not the score of the mean loss:
    it averages `|w * dL/dw|`, not the gradients within.

    Args:
        scores: This process' scores, of floats, on a device that the process group can use.

    Returns:
        New tensors; the scores given are left alone.
    """
    agreed = {name: score.detach().clone(memory_format=torch.contiguous_format) for name, score in scores.items()}
    if dist.is_available() and dist.is_initialized():
        for score in agreed.values():
            dist.all_reduce(score)
            score /= dist.get_world_size()
            dist.broadcast(score, src=0)  # a sum may be rounded in another order elsewhere
    return agreed


def _linear(model: nn.Module) -> dict[Tensor, Tensor]:
    """Per parameter and buffer its stand-in in float64 that makes the net a sum of products of |w|."""
    tensors: dict[Tensor, Tensor] = {}
    for name, param in model.named_parameters():
        double = param.detach().to(torch.float64, copy=True)
        tensors[param] = double.zero_() if name.endswith('bias') else double.abs_()
    for buffer in model.buffers():
        tensors[buffer] = buffer.to(torch.float64 if buffer.is_floating_point() else buffer.dtype, copy=True)
    for module in model.modules():
        own = {**module._parameters, **module._buffers}
        if own.get('running_var') is not None:
            neutral = {'running_mean': 0.0, 'running_var': 1 - float(getattr(module, 'eps', 0.0)), 'weight': 1.0}
            for key, value in neutral.items():
                tensor = own.get(key)
                if tensor is not None:
                    tensors[tensor].fill_(value)
    return tensors


def _gradients(
    weights: Mapping[str, Tensor], loss: Callable[[], Tensor], create_graph: bool = False
) -> dict[str, Tensor]:
    """Gradients of the loss, by name; zero where it does not depend on a weight. Within `_untouched`."""
    with torch.enable_grad():
        for param in weights.values():
            param.requires_grad_()
        value = loss()
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f'shape {tuple(value.shape)}' if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f'loss() must return a scalar tensor, got {got}')
        found: Sequence[Tensor | None] = []
        if value.requires_grad and weights:
            found = torch.autograd.grad(value, list(weights.values()), create_graph=create_graph, allow_unused=True)
        if all(gradient is None for gradient in found):
            raise ValueError(f'loss() depends on none of the {len(weights)} prunable weight tensors')
    return {
        name: torch.zeros_like(param) if gradient is None else gradient
        for (name, param), gradient in zip(weights.items(), found, strict=True)
    }


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put modes, requires_grad, gradients and buffers back, whatever happens within."""
    modes = [(module, module.training) for module in model.modules()]
    params = [(param, param.requires_grad, param.grad) for param in model.parameters()]
    buffers = [
        (module, key, buffer, buffer.detach().clone())
        for module, _ in modes
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    for param, _, _ in params:
        param.grad = None
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for param, required, gradient in params:
            param.requires_grad_(required)
            param.grad = gradient
        for module, key, buffer, saved in buffers:
            buffer.data.copy_(saved)
            module._buffers[key] = buffer
