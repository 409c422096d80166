"""Program: how a recipe that trains is run, stopped and ended: by a signal, or with one line for what went wrong."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
HURRY = 1.0  # seconds after which a signal is another one; launchers pass on what a terminal sends anyway
received: list[signal.Signals] = []


class Stopped(Exception):
    """A signal asked the run to stop.

    Args:
        number: The signal's.
        where: Where the run is, and how it goes on.
    """

    def __init__(self, number: int, where: str) -> None:
        super().__init__(f'stopped by {signal.Signals(number).name} {where}')
        self.number, self.where = number, where


def program(main: Callable[[list[str]], None]) -> None:
    """Run a recipe with the command line's arguments, and leave with the exit code that shells expect.

    SIGINT and SIGTERM are noted, and obeyed between two steps; a second one stops at once.

    Args:
        main: The recipe's.
    """
    keep_freed_memory()
    last = time.monotonic()

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal last
        name = signal.Signals(number).name
        if not received:
            received.append(signal.Signals(number))
            last = time.monotonic()
            tell(f'{name}: stopping after this step; a second one stops at once')
        elif time.monotonic() - last > HURRY:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    try:
        main(sys.argv[1:])
    except Stopped as stopped:
        tell(str(stopped))
        sys.exit(128 + stopped.number)
    except ValueError as error:
        sys.exit(f'error: {line_of(error)}')
    except OSError as error:
        if error.filename is None:  # not a matter of files
            raise
        sys.exit(f'error: {error}; what was saved before is whole, and the same command goes on from it')


def line_of(error: ValueError) -> str:
    """An error's own line, out of what torch says around one that came from a worker of a loader."""
    said = str(error)
    if said.startswith('Caught ValueError in DataLoader worker'):
        said = said.strip().splitlines()[-1].removeprefix('ValueError: ')
    return said


def keep_freed_memory() -> None:
    """Let glibc keep what large tensors free: getting pages anew takes up to a third of a training step on a CPU."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    for option, variable in ((MMAP_THRESHOLD, 'MALLOC_MMAP_THRESHOLD_'), (TRIM_THRESHOLD, 'MALLOC_TRIM_THRESHOLD_')):
        if variable not in os.environ:
            mallopt(option, 2**31 - 1)


def tell(text: str) -> None:
    """Print a line of a machine's first process, past all buffers: a signal may come in the middle of a print."""
    if os.environ.get('LOCAL_RANK', '0') == '0':
        os.write(2, f'\n{text}\n'.encode())
