"""Fine-tune a ticket on any images: its mask is kept, and its classifier is made anew for other classes.

accelerate launch recipes/finetune.py ticket=FOLDER [--config recipes/configs/NAME.yaml] [key=value ...]
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from parts.backbone import PREFIX, OnBackbone
from parts.config import Setup, parse
from parts.data import Data
from parts.distillation import Distilled, find_teacher
from parts.program import program
from parts.report import TRUNK, Report
from parts.state import State, find_checkpoint
from parts.task import Task, find_task
from timm.scheduler import CosineLRScheduler
from torch import nn
from train import Run, command, create_accelerator, measure, pruned, save_ticket, saved_if_stopped, start, train, tried

from timm_supertickets import Mask, Ticket, prunable
from timm_supertickets.hub import HUB, find_ticket
from timm_supertickets.pictures import DPI, create_figure

PICTURE = 'predictions.png'
SHOWN = 12


@dataclass
class Config(Setup):
    """What a run of finetune.py does.

    Args:
        ticket: A ticket's folder or .safetensors file, a pretrained model's name, or `hf-hub:OWNER/NAME[@REVISION]`.
        weights: Where training starts: from the ticket's weights (`ticket`) or from random ones (`fresh`).
        mask: Which weights live: those of the ticket (`keep`), as many of every layer in other places (`shuffle`), or
            all of them (`dense`).
        tune: What is trained: all of the net, or its head alone (`head`): the classifier, and what the ticket does not
            bring. The ticket then stays as it is, what its batch norm has seen included; nothing is recalibrated.
        sparsity: Prune to this at once before training; 0 does not.
        teacher: Learn from this one's scores too: a ticket as above, or a model of timm with pretrained weights.
        distill: Share of the loss that is the teacher's.
        temperature: Divides scores before they are compared with the teacher's.
    """

    ticket: str = ''
    weights: Literal['ticket', 'fresh'] = 'ticket'
    mask: Literal['keep', 'shuffle', 'dense'] = 'keep'
    tune: Literal['all', 'head'] = 'all'
    sparsity: float = 0.0
    teacher: str = ''
    distill: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within(0, 1, 'sparsity', end=False)
        self.within(0, 1, 'distill')
        self.within(0, math.inf, 'temperature', start=False)
        if self.teacher and self.task != 'classify':
            raise ValueError(f'teacher={self.teacher} has scores of classes; task {self.task!r} has no use for it')
        if not self.ticket:
            raise ValueError(
                f'ticket is missing; give ticket=FOLDER, such as train.py writes, or ticket={HUB}OWNER/NAME'
            )


def main(argv: list[str]) -> None:
    """Train with the mask held while the learning rate falls to zero; save; show what the net says."""
    config = parse(argv, Config, 'finetune_digits.yaml', 'finetune.py')
    run, state = begin(config, 'finetune.py', argv)
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


def begin(config: Config, recipe: str, argv: list[str]) -> tuple[Run, State]:
    """A ticket, the images it goes to, and its net and optimizer, as they are at first or as a checkpoint has them.

    At first it is pruned once, if asked to.

    Args:
        config: What is to be done.
        recipe: The file that does it.
        argv: Its arguments.
    """
    if config.tune == 'head':
        config = replace(config, recalibrate=0)
    accelerator = create_accelerator(config)
    ticket = find_ticket(config.ticket)
    task = find_task(config)
    data = task.create_data(accelerator, ticket.pretrained_cfg)
    net = create_net(config, ticket, task, data).to(accelerator.device)
    if config.teacher:
        teacher = find_teacher(config.teacher, data).to(accelerator.device)
        task = Distilled(task, teacher, config.distill, config.temperature)
    report = Report(config, task.metric, accelerator)
    run = Run(config, task, accelerator, data, report, command(recipe, argv, accelerator), origin(config, ticket))
    state = start(config, net, chosen_mask(config, ticket, net))
    state.zero_dead_weights_()
    if path := find_checkpoint(config.resume, report.output, accelerator):
        report.resume(state.load(accelerator, path), state.round * config.round_steps + state.step)
    elif config.sparsity:
        state.mask = pruned(config, state, config.sparsity)
        state.zero_dead_weights_()
    return run, state


def falling(config: Setup, state: State) -> CosineLRScheduler:
    """A learning rate that rises if it is to, and falls to zero until the last step."""
    return CosineLRScheduler(
        state.optimizer,
        max(1, config.steps - config.warmup_steps),
        warmup_t=config.warmup_steps,
        warmup_prefix=True,
        t_in_epochs=False,
        initialize=False,
    )


def finish(run: Run, state: State) -> None:
    """Save the ticket, and say how to load it."""
    state.zero_dead_weights_()
    name = f'{state.ticket_name}_s{round(100 * state.mask.sparsity, 1):g}'.replace('.', '_')
    save_ticket(run, state, name, run.report.rows[-1]['loss'] if run.report.rows else float('nan'))
    assert isinstance(run.config, Config)
    run.report.finish(f'{run.config.ticket}, fine-tuned on {run.config.dataset}')


@torch.inference_mode()
def draw_predictions(run: Run, state: State, path: Path) -> None:
    """The first test images with their labels, and in red where the net gives another one."""
    images, labels = next(iter(run.data.val))
    images, labels = images[:SHOWN].to(run.accelerator.device), labels[:SHOWN].tolist()
    said = state.best.eval()(images).argmax(1).tolist()
    mean, std = (images.new_tensor(run.data.config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    seen = (images * std + mean).clamp(0, 1)[:, : 3 if images.shape[1] > 2 else 1].permute(0, 2, 3, 1).cpu()
    names = run.data.labels or range(run.data.num_classes)
    figure = create_figure(9, 3.6)
    for axis, image, label, guess in zip(figure.subplots(2, SHOWN // 2).flat, seen, labels, said, strict=False):
        axis.imshow(image, cmap='gray', vmin=0, vmax=1)
        right = label == guess
        axis.set_title(
            f'{names[label]}' if right else f'{names[label]}:\n{names[guess]}', fontsize=8, color='k' if right else 'r'
        )
    for axis in figure.axes:
        axis.set_axis_off()
    figure.savefig(path, dpi=DPI)


def create_net(config: Config, ticket: Ticket, task: Task, data: Data) -> nn.Module:
    """A net for the task, made of the ticket's model."""
    torch.manual_seed(config.seed)
    size = {'img_size': data.input_size[1:]} if ticket.pretrained_cfg.get('fixed_input_size') else {}

    def make(**kwargs: Any) -> nn.Module:
        args = {'in_chans': config.in_chans, **size, **kwargs}
        if config.weights == 'ticket':
            return ticket.build(**args)
        model: nn.Module = timm.create_model(ticket.architecture, **{**ticket.model_args, **args})
        return model

    net = tried(task, make, data, f'ticket={config.ticket}')
    if config.tune == 'head':
        freeze_(net, ticket)
    return net


def freeze_(net: Any, ticket: Ticket) -> None:
    """Ask no gradient for what the ticket brings, but for its classifier."""
    prefix, heads = (PREFIX, ()) if isinstance(net, OnBackbone) else ('', net.get_classifier())
    spared = {param for head in (heads if isinstance(heads, tuple) else (heads,)) for param in head.parameters()}
    for name, param in net.named_parameters():
        if name.removeprefix(prefix) in ticket.weights and name.startswith(prefix) and param not in spared:
            param.requires_grad_(False)


def chosen_mask(config: Config, ticket: Ticket, net: nn.Module) -> Mask:
    """Which weights live when training starts; what the ticket has not, a new head, is not masked."""
    device = next(net.parameters()).device
    mask = ticket.mask
    if config.mask == 'dense':
        return Mask.dense(prunable(net))
    if config.mask == 'shuffle':
        mask = mask.shuffled(torch.Generator().manual_seed(config.seed))
    prefix = PREFIX if isinstance(net, OnBackbone) else ''
    return Mask({prefix + name: alive.to(device) for name, alive in mask.items() if prefix + name in prunable(net)})


def origin(config: Config, ticket: Ticket) -> dict[str, Any]:
    """Where the new ticket comes from, for its facts."""
    start = 'fresh weights' if config.weights == 'fresh' else 'its weights'
    mask = {'keep': 'its mask kept', 'shuffle': 'its mask shuffled', 'dense': 'no mask'}[config.mask]
    once = f', pruned at once to {config.sparsity:g}' if config.sparsity else ''
    alone = ', its head alone' if config.tune == 'head' else ''
    known = f'drawn on {ticket.facts["dataset"]}' if 'dataset' in ticket.facts else ticket.architecture
    return {'how': f'A ticket {known} was fine-tuned on {config.dataset} from {start}, with {mask}{alone}{once}.'}


if __name__ == '__main__':
    program(main)
