"""Compiled: kernels of our own, built once per machine with its C++ compiler, and left out where there is none."""

import hashlib
import logging
import os
import tempfile
from functools import cache
from pathlib import Path

import torch

_logger = logging.getLogger(__name__)

FLAGS = {
    'AVX512': ('-mavx512f', '-mavx512dq', '-mavx512vl', '-mavx512bw', '-mfma', '-DCPU_CAPABILITY_AVX512'),
    'AVX2': ('-mavx2', '-mfma', '-DCPU_CAPABILITY_AVX2'),
}


@cache
def load_kernels(source: str) -> bool:
    """Load kernels into this process; they are compiled where this machine has none of this version yet.

    Args:
        source: `kernels.cpp`: inference that skips zeros, as `torch.ops.timm_supertickets`. `gradients.cpp`: from then
            on autograd takes the gradients of the weights of depthwise convolutions with kernels of 5x5 and 7x7, and of
            3x3 on maps of 16 pixels and less, from it, in any model, in float32 on the CPU; they are the same to
            rounding, at 0.1 to 0.3 of oneDNN's time.

    Returns:
        Whether they are there; if not, a warning says why. They need a C++ compiler and ninja, and are kept where torch
        keeps extensions (`TORCH_EXTENSIONS_DIR`).
    """
    from torch.utils import cpp_extension

    path = Path(__file__).with_name(source)
    known = torch.backends.cpu.get_cpu_capability()
    capability = known if known in FLAGS else 'DEFAULT'
    flags = ['-O3', f'-DCPU_CAPABILITY={capability}', *FLAGS.get(capability, ())]
    version = hashlib.sha256(f'{torch.__version__} {flags} {path.read_text()}'.encode()).hexdigest()[:16]
    root = os.environ.get('TORCH_EXTENSIONS_DIR') or cpp_extension.get_default_build_root()
    library = Path(root) / f'timm_supertickets_{version}.so'
    try:
        if library.exists():
            torch.ops.load_library(str(library))
        else:
            _compile_and_load(path, library, flags)
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().partition('\n')[0]
        _logger.warning('%s cannot be compiled here and is left out: %s', source, reason)
        return False
    return True


def _compile_and_load(source: Path, library: Path, flags: list[str]) -> None:
    from torch.utils import cpp_extension

    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # nobody sees half a library, nor waits for a lock
        name = library.stem
        cpp_extension.load(name, [str(source)], flags, build_directory=folder, is_python_module=False)
        os.replace(Path(folder) / f'{name}.so', library)
