"""Detect: put a ticket, its mask kept, to work on images with boxes, under a detector of torchvision.

accelerate launch recipes/detect.py ticket=FOLDER [--config recipes/configs/NAME.yaml] [key=value ...]
"""

from dataclasses import dataclass
from pathlib import Path

import finetune
import torch
from finetune import begin, falling, finish
from parts.config import parse
from parts.program import program
from parts.report import TRUNK
from parts.state import State
from train import Run, measure, saved_if_stopped, train

from timm_supertickets.pictures import DPI, create_figure

PICTURE = 'predictions.png'
SHOWN = 6
SURE = 0.3  # boxes with smaller scores are not drawn


@dataclass
class Config(finetune.Config):
    """What a run of detect.py does; see finetune.py. The embedded default are scenes composed from digits."""

    task: str = 'detect'
    dataset: str = 'scenes'


def main(argv: list[str]) -> None:
    """Train with the mask held while the learning rate falls to zero; save; show what is found."""
    config = parse(argv, Config, 'detect_ticket.yaml', 'detect.py')
    run, state = begin(config, 'detect.py', argv)
    rate = falling(config, state)
    with saved_if_stopped(run, state):
        while state.round < config.rounds:
            first = state.round * config.round_steps
            loss = train(run, state, f'round {state.round + 1} of {config.rounds}', first, config.round_steps, rate)
            state.round += 1
            run.report.add(name=TRUNK, step=state.round * config.round_steps, round=state.round, loss=loss,
                           **measure(run, state))  # fmt: skip
            state.save(run.accelerator, run.report.output, run.report.rows)

    finish(run, state)
    if run.accelerator.is_main_process:
        draw_predictions(run, state, run.report.output / PICTURE)


@torch.no_grad()
def draw_predictions(run: Run, state: State, path: Path) -> None:
    """The first test images with the boxes that are there, and with those that are found."""
    net, images = state.best.eval(), run.data.val.dataset
    count = min(SHOWN, len(images))
    figure = create_figure(2 * count, 4.5)
    axes = figure.subplots(2, count, squeeze=False)
    for column in range(count):
        image, target = images[column]
        found = net([image.to(run.accelerator.device)])[0]
        sure = found['scores'] > SURE
        for row, boxes, labels in (
            (0, target['boxes'], target['labels']),
            (1, found['boxes'][sure], found['labels'][sure]),
        ):
            axes[row, column].imshow(image.permute(1, 2, 0))
            axes[row, column].set(xticks=[], yticks=[])
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
                axes[row, column].plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color='#ee6677', linewidth=1)
                axes[row, column].text(x1, y1, run.data.labels[label - 1], color='#ee6677', fontsize=7, va='bottom')
    axes[0, 0].set_ylabel('annotation')
    axes[1, 0].set_ylabel('prediction')
    figure.savefig(path, dpi=DPI)


if __name__ == '__main__':
    program(main)
