"""What the spaces share: checks of an arch, timm's description of a model, and its construction."""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg
from torch import Tensor, nn

from ..arch import MAX_WEIGHTS, Arch
from ..files import read_json
from ..packing import unpack_for_model

TICKETS = Path(__file__).parents[1] / 'tickets'  # those that travel with the package, a folder each


def describe(**changes: Any) -> dict[str, Any]:
    """A `pretrained_cfg` for ImageNet's images and our layers' names, with changes."""
    return {
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': (0.485, 0.456, 0.406),
        'std': (0.229, 0.224, 0.225),
        'num_classes': 1000,
        'first_conv': 'conv_stem',
        'classifier': 'classifier',
        'license': 'apache-2.0',
        **changes,
    }


def released(name: str) -> dict[str, Any]:
    """The `pretrained_cfg` of a ticket that travels with the package; without weights as long as it does not.

    Args:
        name: `MODEL.TAG`, its folder in `tickets/`.
    """
    folder = TICKETS / name
    if not folder.is_dir():
        return describe()
    cfg = read_json(folder / 'config.json')['pretrained_cfg']
    cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
    return describe(file=str(folder / cfg.pop('hf_hub_filename')), **cfg)


def member(supernet: Arch, blocks: Sequence[Mapping[int, int]]) -> Arch:
    """The member of a supernet's shape that has these blocks: hidden channels by kernel size."""
    return Arch.from_json({'space': supernet.space, 'shape': dict(supernet.shape), 'blocks': blocks})


def create(cls: type[nn.Module], variant: str, pretrained: bool, feature_cfg: dict[str, Any], **kwargs: Any) -> Any:
    """Build a registered model as timm does; its weights may be a packed ticket."""
    return build_model_with_cfg(
        cls, variant, pretrained, feature_cfg=feature_cfg, pretrained_filter_fn=unpack_for_model, **kwargs
    )


def carry_over(model: nn.Module, small: nn.Module) -> None:
    """Give a rebuilt model what timm hangs on its models, and the training mode."""
    for name in ('pretrained_cfg', 'default_cfg', 'pretrained_model_args', '_traits', '_model_args'):
        if hasattr(model, name):
            setattr(small, name, copy(getattr(model, name)))
    small.train(model.training)


def positive(value: Any) -> bool:
    """Whether a value from a file is a whole number above zero."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_ends(arch: Arch, in_chans: int, num_classes: int) -> None:
    """Check the numbers of input channels and classes.

    Raises:
        ValueError: No channels, or so many channels or classes that no net of these widths can be meant.
    """
    if in_chans < 1:
        raise ValueError(f'in_chans must be at least 1, got {in_chans}')
    if max(in_chans, num_classes) * arch.widest > MAX_WEIGHTS:
        raise ValueError(f'{in_chans} input channels and {num_classes} classes are too many for a net of these widths')


def check_size(x: Tensor, stride: int) -> None:
    """Check that an image is not smaller than what one value of the last map stands for.

    Raises:
        ValueError: It is.
    """
    if min(x.shape[-2], x.shape[-1]) < stride:
        raise ValueError(f'an image of {x.shape[-2]}x{x.shape[-1]} is smaller than the stride of {stride}; resize it')


def check_depth(arch: Arch, depths: Iterable[int]) -> None:
    """Check, before blocks are counted out, that stages do not ask for more of them than the arch has.

    Raises:
        ValueError: They do.
    """
    total = sum(depths)
    if total > len(arch.blocks):
        raise ValueError(f'arch has {len(arch.blocks)} blocks, but its stages ask for {total}')


def check_blocks(arch: Arch, places: Sequence[tuple[str, bool]], kernels: Sequence[int]) -> Arch:
    """Check the blocks of an arch against the places that its shape has for them.

    Args:
        arch: To be checked.
        places: Per block its module path, and whether it can be dropped.
        kernels: Kernel sizes of the space.

    Raises:
        ValueError: More or fewer blocks than places, a kernel size that the space has not, a block without
            channels that cannot be dropped, or tokens where the shape has none.
    """
    if len(arch.blocks) != len(places):
        raise ValueError(f'arch has {len(arch.blocks)} blocks, but its stages ask for {len(places)}')
    for (name, droppable), block in zip(places, arch.blocks, strict=True):
        for kernel, _ in block:
            if kernel not in kernels:
                choices = ', '.join(map(str, kernels))
                raise ValueError(f'arch: {name} has kernel size {kernel}; space "{arch.space}" has {choices}')
        if not block and not droppable:
            raise ValueError(f'arch: {name} has no channels, and only residual blocks can be dropped')
    if bool(arch.tokens) != any(name == 'tokens' for name, _ in arch.shape):
        raise ValueError('arch: tokens per block and "tokens" in the shape belong together; only one of them is there')
    return arch
