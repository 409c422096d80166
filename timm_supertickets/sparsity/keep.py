"""keep_sparse: a ticket stays a ticket through somebody else's training loop."""

import warnings
from types import TracebackType

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .mask import Mask


class KeptSparse:
    """Handle of `keep_sparse`: `remove()` undoes it, and so does leaving a `with` block. `mask` is the mask held."""

    def __init__(self, mask: Mask, hooks: list[RemovableHandle]) -> None:
        self.mask = mask
        self._hooks = hooks

    def remove(self) -> None:
        """Let go: gradients and weights are no longer masked."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> 'KeptSparse':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def keep_sparse(model: nn.Module, optimizer: Optimizer, mask: Mask | None = None) -> KeptSparse:
    """Tie a mask to a model and its optimizer: whatever loop trains them, dead weights stay dead.

    Gradients are masked as they accumulate, so gradient clipping sees only living weights; weights are masked
    after every step of the optimizer. The dead weights, and gradients that they have, are zeroed at once.

    Args:
        model: The model that the optimizer trains (not a copy, not a compiled or distributed wrapper of it).
        optimizer: Any torch optimizer over parameters of the model, or accelerate's wrapper of one.
        mask: What lives; by default the zero pattern that the weights have now.

    Returns:
        A handle; `handle.remove()` undoes it.

    Raises:
        ValueError: A mask that does not fit the model, or an optimizer that does not train its weights.
    """
    if mask is None:
        mask = Mask.from_zeros(model)
        if not mask:
            warnings.warn(f'keep_sparse: {type(model).__name__} has no zero weights to keep', stacklevel=2)
    mask.check(model)
    inner = getattr(optimizer, 'optimizer', optimizer)  # accelerate's wrapper has no hooks of its own
    trained = {id(param) for group in inner.param_groups for param in group['params']}
    params = {name: param for name, param in model.named_parameters() if name in mask}
    held = Mask({name: mask[name].detach().to(param.device, copy=True) for name, param in params.items()})
    if params and not any(id(param) in trained for param in params.values()):
        raise ValueError(f'keep_sparse: the optimizer trains none of the masked weights of {type(model).__name__}')

    def mask_weights(*_: object) -> None:
        held.zero_weights_(model)

    def mask_gradient(name: str) -> RemovableHandle:
        def hook(grad: Tensor) -> Tensor:
            return grad * held[name].to(grad.device)

        trained = params[name].requires_grad
        handle: RemovableHandle = params[name].requires_grad_(True).register_hook(hook)  # one now frozen may thaw
        params[name].requires_grad_(trained)
        return handle

    hooks = [mask_gradient(name) for name in params]
    hooks.append(inner.register_step_post_hook(mask_weights))
    held.zero_weights_(model)
    held.zero_grads_(model)
    return KeptSparse(held, hooks)
