"""Segment: put a ticket, its mask kept, to work on images with a class for every pixel.

accelerate launch recipes/segment.py ticket=FOLDER [--config recipes/configs/NAME.yaml] [key=value ...]
"""

from dataclasses import dataclass
from pathlib import Path

import finetune
import torch
from finetune import begin, falling, finish
from parts.config import parse
from parts.pixels import IGNORE
from parts.program import program
from parts.report import TRUNK
from parts.segmentation import Segmentation
from parts.state import State
from train import Run, measure, saved_if_stopped, train

from timm_supertickets.pictures import DPI, create_figure

PICTURE = 'predictions.png'
SHOWN = 6


@dataclass
class Config(finetune.Config):
    """What a run of segment.py does; see finetune.py. The embedded default are scenes composed from digits."""

    task: str = 'segment'
    dataset: str = 'scenes'


def main(argv: list[str]) -> None:
    """Train with the mask held while the learning rate falls to zero; save; show what the net sees."""
    config = parse(argv, Config, 'segment_ticket.yaml', 'segment.py')
    run, state = begin(config, 'segment.py', argv)
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


@torch.inference_mode()
def draw_predictions(run: Run, state: State, path: Path) -> None:
    """The first test images: what is seen, what is there, what the net says."""
    net, task, pixels = state.best.eval(), run.task, run.data.val.dataset
    assert isinstance(task, Segmentation)
    count, last = min(SHOWN, len(pixels)), run.data.num_classes - 1
    figure = create_figure(1.5 * count, 4.5)
    axes = figure.subplots(3, count, squeeze=False)
    mean, std = (torch.tensor(run.data.config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    for column in range(count):
        image, mask = pixels[column]
        said = task.predicted(net, image[None].to(run.accelerator.device), mask.shape)[0].argmax(0).cpu()
        axes[0, column].imshow((image * std + mean).clamp(0, 1).permute(1, 2, 0))
        for row, labels in ((1, mask), (2, said)):
            shown = labels.float().masked_fill(mask == IGNORE, float('nan'))
            axes[row, column].imshow(shown, cmap='tab20', vmin=0, vmax=max(1, last), interpolation='nearest')
    for row, words in enumerate(('image', 'annotation', 'prediction')):
        axes[row, 0].set_ylabel(words)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=DPI)


if __name__ == '__main__':
    program(main)
