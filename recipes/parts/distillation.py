"""Distillation: a task whose net also learns from a teacher's scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from accelerate import Accelerator
from parts.data import Data
from parts.task import Task
from torch import Tensor, nn
from torch.nn.functional import kl_div

from timm_supertickets.cost import model_cost
from timm_supertickets.hub import find_ticket


@dataclass
class Distilled:
    """A task of classification beside a teacher.

    Args:
        task: The task itself.
        teacher: Scores the same images.
        share: Of the loss that is the teacher's, in [0, 1]; the rest is the task's own.
        temperature: Divides the scores of both before they are compared; the loss is multiplied by its square
            (https://arxiv.org/abs/1503.02531).
    """

    task: Task
    teacher: nn.Module
    share: float
    temperature: float

    def __post_init__(self) -> None:
        self.metric = self.task.metric
        self.teacher.eval().requires_grad_(False)

    def create_data(self, accelerator: Accelerator, known: Mapping[str, Any] | None = None) -> Data:
        """The task's."""
        return self.task.create_data(accelerator, known)

    def create_net(self, make: Callable[..., nn.Module], data: Data) -> nn.Module:
        """The task's."""
        return self.task.create_net(make, data)

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """The task's loss, and how far the scores are from the teacher's."""
        scores: list[Tensor] = []

        def kept(x: Tensor) -> Tensor:
            scores.append(model(x))
            return scores[-1]

        own = self.task.loss(kept, images, targets)  # type: ignore[arg-type]
        with torch.no_grad():
            wanted = (self.teacher(images) / self.temperature).log_softmax(1)
        found = (scores[0] / self.temperature).log_softmax(1)
        apart = kl_div(found, wanted, reduction='batchmean', log_target=True) * self.temperature**2
        return (1 - self.share) * own + self.share * apart

    def score(self, net: nn.Module, data: Data, accelerator: Accelerator) -> float:
        """The task's."""
        return self.task.score(net, data, accelerator)


class Renormalised(nn.Module):
    """A model that is given images with another mean and standard deviation than its own.

    Args:
        model: The model; its `pretrained_cfg` names its own.
        mean: That the images have, per channel.
        std: Likewise.
    """

    def __init__(self, model: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        ours, theirs = ([torch.tensor(cfg[key]).view(-1, 1, 1) for key in ('mean', 'std')]
                        for cfg in ({'mean': mean, 'std': std}, model.pretrained_cfg))  # fmt: skip
        self.register_buffer('factor', ours[1] / theirs[1])
        self.register_buffer('shift', (ours[0] - theirs[0]) / theirs[1])

    def forward(self, x: Tensor) -> Tensor:
        """The model's scores."""
        scores: Tensor = self.model(x * self.factor + self.shift)
        return scores


def find_teacher(name: str, data: Data) -> nn.Module:
    """A teacher by name, for these images.

    Args:
        name: A ticket as `finetune.py` takes it, or a model of timm with pretrained weights of as many classes.
        data: The images.

    Raises:
        ValueError: There is no such model, or it knows other classes.
    """
    if timm.is_model(name.partition('.')[0]) and timm.is_model_pretrained(name):
        teacher: Any = timm.create_model(name, pretrained=True)
    else:
        teacher = find_ticket(name).build()
    if teacher.num_classes != data.num_classes:
        raise ValueError(f'teacher={name} knows {teacher.num_classes} classes, the images have {data.num_classes}')
    if len(teacher.pretrained_cfg['mean']) != data.input_size[0]:
        raise ValueError(f'teacher={name} takes other channels than the {data.input_size[0]} of the images')
    found = Renormalised(teacher, data.config['mean'], data.config['std'])
    try:
        model_cost(found, data.input_size)
    except Exception as error:  # what a model makes of another size is up to it
        size = f'{data.input_size[1]}x{data.input_size[2]}'
        raise ValueError(f'teacher={name} does not take images of {size}: {" ".join(str(error).split())}') from error
    return found
