"""Task: what a training loop does not know of itself: images, a net for them, a loss and a score."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Protocol

from accelerate import Accelerator
from parts.classification import Classification
from parts.config import Setup
from parts.data import Data
from parts.detection import Detection
from parts.pose import Keypoints
from parts.segmentation import Segmentation
from torch import Tensor, nn


class Task(Protocol):
    """What a training loop asks for."""

    metric: str
    """Name of the score, in summary.csv and in the facts of tickets; higher is better."""

    def create_data(self, accelerator: Accelerator, known: Mapping[str, Any] | None = None) -> Data:
        """Loaders; `known` is the `pretrained_cfg` of weights that are used to a mean and a standard deviation."""

    def create_net(self, make: Callable[..., nn.Module], data: Data) -> nn.Module:
        """A net for these images around the model that `make(num_classes=..., ...)` makes."""

    def loss(self, model: nn.Module, images: Any, targets: Any) -> Tensor:
        """What training makes small."""

    def score(self, net: nn.Module, data: Data, accelerator: Accelerator) -> float:
        """How good the net is on the test images, which count once each."""


TASKS: dict[str, Callable[..., Task]] = {
    'classify': Classification,
    'segment': Segmentation,
    'keypoints': Keypoints,
    'detect': Detection,
}


CLASSIFY_ONLY = ('train_split', 'val_split', 'train_samples', 'val_samples', 'num_classes')


def find_task(config: Setup) -> Task:
    """The task of a configuration.

    Raises:
        ValueError: It is unknown, or has other settings than those given.
    """
    if config.task not in TASKS:
        raise ValueError(f'task {config.task!r} is unknown; choose from {", ".join(TASKS)}')
    try:
        task = TASKS[config.task](config, **config.task_args)
    except TypeError as error:
        raise ValueError(f'task_args={config.task_args} do not fit task {config.task!r}: {error}') from None
    if config.task != 'classify':
        for one in fields(Setup):
            value = getattr(config, one.name)
            if one.name in CLASSIFY_ONLY and value != one.default:
                raise ValueError(f'{one.name}={value} is for task classify; task {config.task!r} has no use for it')
    return task
