"""Export: a ticket as ONNX or as torch.export's .pt2, its zeros kept and its scores compared before a file is left."""

import io
import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .bake import bake as bake_model
from .files import write_atomic
from .sparsity.mask import prunable
from .ticket import CONFIG, Ticket

FORMATS = ('.onnx', '.pt2')
NEEDED = ('onnx', 'onnxruntime', 'onnxscript')
INSTALL = "pip install 'timm_supertickets[export]'"
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        file: Where.
        size: Its bytes.
        weights: Prunable weights in the file: of a baked ticket, those that are left.
        dead: How many of them are dead; every one is zero in the file.
        error: Largest difference of its scores to the ticket's, as a share of the largest score.
        input_size: `(C, H, W)` of the images that it takes.
        batch: How many at once; None for any number.
    """

    file: Path
    size: int
    weights: int
    dead: int
    error: float
    input_size: tuple[int, int, int]
    batch: int | None


def export_ticket(
    ticket: Ticket,
    file: str | Path,
    *,
    img_size: int | None = None,
    batch: int | None = None,
    bake: bool = False,
    force: bool = False,
) -> Exported:
    """Write a ticket as one file that runs without this package.

    What is about to be written is loaded again and checked first: dead weights must be zero where they were dead
    (runtimes fold batch norm into convolutions, which scales weights), and scores of random images must be the
    ticket's, also where it is baked: then the zeros are those of the weights that are left. Its config.json travels
    inside: as metadata `config` in ONNX, as an extra file in .pt2.

    Args:
        ticket: To be exported, in eval mode.
        file: `*.onnx` or `*.pt2`.
        img_size: Height and width of the images; by default those of the ticket's `pretrained_cfg`.
        batch: A fixed number of images at once; None lets the file take any number.
        bake: Whether to write `timm_supertickets.bake(model)`, which is smaller and faster.
        force: Whether an existing file may be replaced.

    Raises:
        ValueError: The file has another suffix, its folder is missing, it exists, a package is not installed, a
            ticket to be baked is no member of a space, or a check fails; then nothing is written.
    """
    file = Path(file)
    _check_target(file, force)
    for name, value in (('img_size', img_size), ('batch', batch)):
        if value is not None and value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}')
    resized = {'img_size': img_size} if img_size and ticket.pretrained_cfg.get('fixed_input_size') else {}
    model = ticket.build(**resized)
    size = input_size(ticket, img_size)
    config = ticket.config()
    config['pretrained_cfg']['input_size'] = size
    written = bake_model(model) if bake else model
    mask = {name: weight != 0 for name, weight in prunable(written).items()} if bake else ticket.mask
    write, read = (to_onnx, _read_onnx) if file.suffix == '.onnx' else (to_pt2, _read_pt2)
    data = write(written, size, batch, json.dumps(config))
    weights, run = read(data)
    dead = _count_dead(written.state_dict().keys(), mask, weights)
    errors = [_error(model, run, size, images) for images in ([batch] if batch else [1, 3])]
    if not all(error <= TOLERANCE for error in errors):  # nan is not
        raise ValueError(f'{file}: its scores differ from the ticket by {errors} of the largest; nothing is written')
    write_atomic(file, data)
    return Exported(file, len(data), sum(alive.numel() for alive in mask.values()), dead, max(errors), size, batch)


def input_size(ticket: Ticket, img_size: int | None = None) -> tuple[int, int, int]:
    """`(C, H, W)` of the images that a ticket takes, or of those of another height and width."""
    cfg: Any = timm.get_pretrained_cfg(ticket.architecture)
    chans, height, width = ticket.pretrained_cfg.get('input_size') or cfg.input_size
    return chans, img_size or height, img_size or width


def _check_target(file: Path, force: bool) -> None:
    if file.suffix not in FORMATS:
        raise ValueError(f'{file}: the suffix names the format, choose from {", ".join(FORMATS)}')
    if not file.parent.is_dir():
        raise ValueError(f'{file}: the folder {file.parent} does not exist')
    if file.exists() and not (force and file.is_file()):
        raise ValueError(f'{file} exists; {"force replaces it" if file.is_file() else "it is not a file"}')
    if file.suffix == '.onnx' and (missing := missing_for_onnx()):
        raise ValueError(f'writing ONNX needs {", ".join(missing)}, not installed: {INSTALL}')


def missing_for_onnx() -> list[str]:
    """Packages that ONNX needs and that are not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


def _images(size: tuple[int, int, int], batch: int | None) -> tuple[Tensor, Any]:
    """Images to trace with, and what torch.export is to know of their shape."""
    images = torch.zeros(batch or 2, *size)  # a traced batch of 1 would be taken for a constant
    return images, None if batch else ({0: torch.export.Dim('batch')},)


def to_onnx(model: nn.Module, size: tuple[int, int, int], batch: int | None, config: str = '') -> bytes:
    """A model as the content of an .onnx file, from `images` to `scores`.

    Args:
        model: In eval mode.
        size: `(C, H, W)` of its images.
        batch: How many at once; None for any number.
        config: Metadata.
    """
    images, shapes = _images(size, batch)
    program = torch.onnx.export(
        model, (images,), dynamo=True, dynamic_shapes=shapes, input_names=['images'], output_names=['scores'],
        verbose=False,
    )  # fmt: skip
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # stack traces, with paths of this machine
    proto.metadata_props.add(key='config', value=config)
    data: bytes = proto.SerializeToString()
    return data


def _read_onnx(data: bytes) -> tuple[dict[str, Tensor], Any]:
    import onnx

    constants = onnx.load_from_string(data).graph.initializer
    session = open_onnx(data)
    weights = {entry.name: torch.from_numpy(onnx.numpy_helper.to_array(entry).copy()) for entry in constants}
    return weights, lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


def open_onnx(data: bytes, threads: int = 0) -> Any:
    """A session of onnxruntime on the CPU; 0 threads are as many as there are cores."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(data, options, providers=['CPUExecutionProvider'])


def to_pt2(model: nn.Module, size: tuple[int, int, int], batch: int | None, config: str) -> bytes:
    """A model as the content of a .pt2 file; arguments as those of `to_onnx`."""
    images, shapes = _images(size, batch)
    file = io.BytesIO()
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    program.example_inputs = None  # would be saved as well, and so would paths of this machine
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'No complete tensor')  # weights in channels_last; they are read as they were
        torch.export.save(program, file, extra_files={CONFIG: config})
    return file.getvalue()


def _read_pt2(data: bytes) -> tuple[dict[str, Tensor], Any]:
    program = torch.export.load(io.BytesIO(data))
    return dict(program.state_dict), program.module()


def _count_dead(names: Collection[str], mask: Mapping[str, Tensor], weights: dict[str, Tensor]) -> int:
    """Counts the dead weights; every one must be zero in the weights that were read back.

    ONNX keeps the names of convolutions, but transposes linear layers under new names.
    """
    dead = 0
    unnamed = {name: tensor for name, tensor in weights.items() if name not in names}
    for name, alive in mask.items():
        pattern, found = ~alive, weights.get(name)
        if found is None:
            twins = (twin for twin, tensor in unnamed.items() if tensor.shape == alive.mT.shape and alive.ndim == 2)
            twin = next((twin for twin in twins if not unnamed[twin].mT[pattern].any()), None)
            found = unnamed.pop(twin).mT if twin else None
        if found is None or found.shape != alive.shape or found[pattern].any():
            raise ValueError(f'export lost the zeros of {name!r}; nothing is written')
        dead += int(pattern.sum())
    return dead


@torch.no_grad()
def _error(model: nn.Module, run: Any, size: tuple[int, int, int], batch: int) -> float:
    """Largest difference on random images, as a share of the largest score; nan where either is no number."""
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch))
    expected, found = model(images), run(images)
    if found.shape != expected.shape:
        raise ValueError(f'export gives scores of shape {tuple(found.shape)}, the ticket {tuple(expected.shape)}')
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / scale)
