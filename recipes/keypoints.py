"""Keypoints: put a ticket, its mask kept, to work on persons whose key points are to be found in their boxes.

accelerate launch recipes/keypoints.py ticket=FOLDER [--config recipes/configs/NAME.yaml] [key=value ...]
"""

from dataclasses import dataclass
from pathlib import Path

import finetune
import torch
from finetune import begin, falling, finish
from parts.config import parse
from parts.heatmaps import decode
from parts.pose import Keypoints
from parts.program import program
from parts.report import TRUNK
from parts.state import State
from train import Run, measure, saved_if_stopped, train

from timm_supertickets.pictures import DPI, create_figure

PICTURE = 'predictions.png'
SHOWN = 8


@dataclass
class Config(finetune.Config):
    """What a run of keypoints.py does; see finetune.py. The embedded default are scenes composed from digits."""

    task: str = 'keypoints'
    dataset: str = 'scenes'


def main(argv: list[str]) -> None:
    """Train with the mask held while the learning rate falls to zero; save; show what is found."""
    config = parse(argv, Config, 'keypoints_ticket.yaml', 'keypoints.py')
    run, state = begin(config, 'keypoints.py', argv)
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
    """The first test crops with the points that are there, and with those that are found."""
    net, task, crops = state.best.eval(), run.task, run.data.val.dataset
    assert isinstance(task, Keypoints)
    count = min(SHOWN, len(crops))
    figure = create_figure(1.5 * count, 4.2)
    axes = figure.subplots(2, count, squeeze=False)
    mean, std = (torch.tensor(run.data.config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    for column in range(count):
        item = crops[column]
        maps = task.predicted(net, item['image'][None].to(run.accelerator.device), crops.dataset.order)
        found = decode(maps.cpu())[0][0]
        labelled = item['points'][item['weights'] > 0]
        for row, points in ((0, labelled), (1, found)):
            axes[row, column].imshow((item['image'] * std + mean).clamp(0, 1).permute(1, 2, 0))
            axes[row, column].plot(points[:, 0] - 0.5, points[:, 1] - 0.5, '.', color='#ee6677', markersize=3)
            axes[row, column].set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel('annotation')
    axes[1, 0].set_ylabel('prediction')
    figure.savefig(path, dpi=DPI)


if __name__ == '__main__':
    program(main)
