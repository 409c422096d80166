"""Data: loaders, what is known of their images, and batches whose order depends on a seed alone."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from parts.config import Setup
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

LARGEST_SEED = 2**32 - 2**16  # numpy's, and every process adds its number
LARGEST_EPOCH = 2**30  # timm's streams count them in 32 bits with a sign
CHANNELS_LAST = torch.channels_last  # of the images is enough for the whole net; on a CPU it halves a step


@dataclass
class Data:
    """Loaders and what is known of the images.

    Args:
        train: Loader of training batches.
        val: Loader of test batches, in order.
        val_count: Test images, over all processes.
        labels: Names of the classes.
        num_classes: Classes of the model.
        config: Input size, mean and std, as timm's `pretrained_cfg` has them.
    """

    train: Any
    val: Any
    val_count: int
    labels: list[str]
    num_classes: int
    config: dict[str, Any]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """`(C, H, W)`."""
        size: tuple[int, int, int] = self.config['input_size']
        return size


def normalization(in_chans: int, known: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel."""
    mean, std = (tuple(known.get(key) or ()) for key in ('mean', 'std'))
    if len(mean) == len(std) == in_chans:
        return mean, std
    return IMAGENET_INCEPTION_MEAN[:in_chans], IMAGENET_INCEPTION_STD[:in_chans]


def share(
    train: Dataset[Any],
    val: Dataset[Any],
    config: Setup,
    accelerator: Accelerator,
    collate: Any,
    val_batch: int | None = None,
) -> list[Any]:
    """Loaders over datasets of torch's kind: every process has its part of both, and scores each of its items once.

    Args:
        train: Items to train on.
        val: Items to score on.
        config: Batch size and workers.
        accelerator: Knows the processes.
        collate: Items to batch.
        val_batch: Items to score on at a time; by default as many as to train on.
    """
    count, mine = accelerator.num_processes, accelerator.process_index
    parts = DistributedSampler(train, count, mine, drop_last=True), range(mine, len(val), count)  # type: ignore[arg-type]
    shared = {'num_workers': config.workers, 'collate_fn': collate}
    return [
        DataLoader(train, config.batch_size, sampler=parts[0], drop_last=True, **shared),
        DataLoader(Subset(val, parts[1]), val_batch or config.batch_size, **shared),
    ]


def check_splits(config: Setup, accelerator: Accelerator, train: Any, val: Any) -> None:
    """Check that there is something to train and to score on.

    Raises:
        ValueError: A split is empty, or the first is smaller than a batch.
    """
    for split, dataset in ((config.train_split, train), (config.val_split, val)):
        if len(dataset) == 0:
            raise ValueError(f'split {split!r} of dataset {config.dataset!r} is empty')
    if len(train) < config.batch_size * accelerator.num_processes:
        raise ValueError(
            f'split {config.train_split!r} of dataset {config.dataset!r} has {len(train)} images, fewer than a batch '
            f'of {config.batch_size} on {accelerator.num_processes} processes; give a smaller batch_size='
        )


class Randomness:
    """A stream of random numbers of its own: while it is entered, all that is drawn comes out of it.

    Args:
        seed: Where it begins; every process has another.
        device: Where numbers are drawn beside the CPU.
    """

    def __init__(self, seed: int, device: torch.device | str) -> None:
        self.on_cuda = torch.device(device).type == 'cuda'
        self._others = self._state()
        set_seed(seed, device_specific=True)
        self._ours = self._state()
        self._go_on(self._others)

    def __enter__(self) -> None:
        self._others = self._state()
        self._go_on(self._ours)

    def __exit__(self, *error: object) -> None:
        self._ours = self._state()
        self._go_on(self._others)

    def _state(self) -> tuple[Any, ...]:
        cuda = torch.cuda.get_rng_state() if self.on_cuda else None
        return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda

    def _go_on(self, state: tuple[Any, ...]) -> None:
        python, numpy, cpu, cuda = state
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def batches(
    loader: Any, steps: int, seed: int, device: torch.device | str = 'cpu', done: int = 0
) -> Iterator[tuple[Any, Any]]:
    """Batches of images and what belongs to them, on the device.

    Args:
        loader: Where they come from, epoch after epoch.
        steps: How many.
        seed: Which ones, and how they are augmented, depends on it alone, whatever a model draws meanwhile. What that
            draws depends on it as well, unless some batches are behind it.
        device: Where they go.
        done: Those that are behind us already, which are passed over.
    """
    seed %= LARGEST_SEED
    if not done:
        set_seed(seed, device_specific=True)
    images, randomness = forever(loader, seed % LARGEST_EPOCH, device), Randomness(seed, device)
    for number in range(steps):
        with randomness:
            batch = next(images)
        if number >= done:
            yield batch


def forever(loader: Any, epoch: int, device: torch.device | str) -> Iterator[tuple[Any, Any]]:
    """A loader's batches on the device, epoch after epoch."""
    while True:
        for owner in (loader.sampler, loader.dataset):
            if hasattr(owner, 'set_epoch'):
                owner.set_epoch(epoch)
        yield from on_device(loader, device)
        epoch += 1


def on_device(loader: Any, device: torch.device | str) -> Iterator[tuple[Any, Any]]:
    """A loader's batches on the device, images in the faster memory order unless they are a list."""
    for batch in loader:
        images, targets = send_to_device(batch, device)
        yield (images.to(memory_format=CHANNELS_LAST) if isinstance(images, Tensor) else images), targets
