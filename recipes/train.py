"""Draw SuperTickets: search and prune a supernet in one run, and draw a ticket at every target sparsity.

A model of timm that is no supernet is pruned alike, without search.

accelerate launch recipes/train.py [--config recipes/configs/NAME.yaml] [key=value ...]
"""

import os
import shlex
import subprocess
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration, set_seed
from parts import plan
from parts.backbone import is_searchable, searched_macs, ticket_part
from parts.config import Config, Setup, parse
from parts.data import Data, batches
from parts.pictures import draw_pictures
from parts.program import Stopped, program
from parts.report import TRUNK, Report
from parts.state import State, find_checkpoint
from parts.task import Task, find_task
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

import timm_supertickets
from timm_supertickets import Mask, Ticket, prunable
from timm_supertickets.channels import ChannelGroup, Keep
from timm_supertickets.compiled import load_kernels
from timm_supertickets.cost import channel_macs, model_cost
from timm_supertickets.models.stock import inverted_residual_groups
from timm_supertickets.search.importance import GatePenalty, gate_importance, penalty_weights, shares_by_cost
from timm_supertickets.search.select import select_by_budget, select_by_threshold
from timm_supertickets.search.shrink import searchable
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.reactivate import regrow, reset
from timm_supertickets.sparsity.scores import lamp, magnitude
from timm_supertickets.ticket import PACKED

BACKWARD = 2  # a backward pass costs about two forward passes
HERE = ('output', 'resume', 'data_dir', 'tracker')  # keys that are of a place, not of what is done there
SCORES = {'magnitude': magnitude, 'lamp': lamp}


@dataclass
class Run:
    """What stays the same throughout a run.

    Args:
        config: What is to be done.
        task: What is learned.
        accelerator: Processes and precision.
        data: The images.
        report: What a person sees.
        command: What to type to do it again.
        origin: Where the tickets come from, for their facts.
    """

    config: Setup
    task: Task
    accelerator: Accelerator
    data: Data
    report: Report
    command: str
    origin: dict[str, Any]


def main(argv: list[str]) -> None:
    """A trunk of rounds with an event after each; at every target sparsity, a branch that finishes a ticket."""
    config = parse(argv)
    accelerator = create_accelerator(config)
    task = find_task(config)
    data = task.create_data(accelerator, pretrained_cfg(config))
    net = create_net(config, task, data).to(accelerator.device)
    config = replace(config, search=chosen_search(config, net))
    report = Report(config, task.metric, accelerator)
    run = Run(config, task, accelerator, data, report, command('train.py', argv, accelerator), origin(config, net))
    state = start(config, net, Mask.dense(prunable(net)))
    if config.keep_initial:
        state.keep_initial()
    supernet, supernet_macs = getattr(net, 'arch', None), searched_macs(net, model_cost(net, data.input_size))
    if path := find_checkpoint(config.resume, report.output, accelerator):
        rows = state.load(accelerator, path)
        under_way = state.step + (state.branch.step if state.branch else 0)
        report.resume(rows, state.round * config.round_steps + state.drawn * config.cooldown_steps + under_way)

    with saved_if_stopped(run, state):
        while state.round < config.rounds or state.loss is not None:
            if state.loss is None:
                state.loss = train_round(run, config, state)
                state.round += 1
                # the event: channels die
                step = state.round * config.round_steps
                if plan.choosing(config, step):
                    state.shrink(living_channels(run, config, state, plan.budget(config, step) * supernet_macs))

            # then weights; at a target, a branch goes off first
            step = state.round * config.round_steps
            for target in plan.due(config, step, state.drawn):
                draw(run, state, target, config.cooldown_steps)
            state.mask = pruned(config, state, plan.sparsity(config, step))
            state.zero_dead_weights_()
            report.add(name=TRUNK, step=step, round=state.round, loss=state.loss, **measure(run, state))

            # until the next event, some of the dead may compete again
            if plan.reactivating(config, step):
                state.mask = reactivated(config, state, plan.regrow_share(config, step))
                state.zero_dead_weights_()
            state.loss = None
            state.save(accelerator, report.output, report.rows)

    if accelerator.is_main_process:
        draw_pictures(report.output, report.rows, supernet, task.metric)
    report.finish(f'{len(report.tickets)} tickets from one run of {config.model} on {config.dataset}')


def create_accelerator(config: Setup) -> Accelerator:
    """Processes and precision as `accelerate launch` has them; on a CPU, all cores are used.

    Raises:
        ValueError: The tracker is unknown or not installed, or kernels cannot be compiled.
    """
    there = [str(tracker) for tracker in get_available_trackers()]
    default = 'tensorboard' if 'tensorboard' in there else 'none'
    tracker = default if config.tracker == 'auto' else config.tracker
    if tracker not in ('none', *there):
        raise ValueError(f'tracker {tracker!r} is unknown or not installed; there is: none, {", ".join(there)}')
    accelerator = Accelerator(
        gradient_accumulation_steps=config.accumulate,
        log_with=None if tracker == 'none' else tracker,
        project_config=ProjectConfiguration(config.output, logging_dir=f'{config.output}/tracker'),
    )
    if accelerator.device.type == 'cpu':
        torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    if config.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when CUDA is first used
        set_seed(config.seed, deterministic=True)
    if config.kernels and accelerator.device.type == 'cpu':
        with accelerator.local_main_process_first():  # the others find what it compiled
            compiled = load_kernels('gradients.cpp')
        if not compiled:
            raise ValueError('kernels=true needs a C++ compiler and ninja (`pip install ninja`); or give kernels=false')
    return accelerator


@contextmanager
def saved_if_stopped(run: Run, state: State) -> Iterator[None]:
    """If a signal stops what is done here, save the state as it then is."""
    try:
        yield
    except Stopped as stopped:
        path = state.save(run.accelerator, run.report.output, run.report.rows)
        raise Stopped(stopped.number, f'{stopped.where}; the same command goes on from {path}') from None


def command(recipe: str, argv: list[str], accelerator: Accelerator) -> str:
    """What to type to do it again, on one machine; where things lie is no part of what was done."""
    apart = [f'--{key}' for key in HERE]  # in two words
    said = [
        arg
        for before, arg in zip(['', *argv], argv, strict=False)
        if arg.lstrip('-').partition('=')[0] not in HERE and before not in apart
    ]
    launch = 'accelerate launch'
    if accelerator.num_processes > 1:
        here = 'ACCELERATE_USE_CPU=true ' if accelerator.device.type == 'cpu' else ''
        launch = f'{here}torchrun --nproc_per_node {accelerator.num_processes}'
    return f'{launch} {shlex.join([f"recipes/{recipe}", *said])}'


def pretrained_cfg(config: Config) -> dict[str, Any] | None:
    """What timm says of the weights that training starts from, if it starts from any.

    Raises:
        ValueError: The model has no such weights.
    """
    try:
        known = timm.get_pretrained_cfg(config.model) if config.pretrained else None
    except RuntimeError as error:
        raise ValueError(f'model={config.model}: {error}') from None
    return None if known is None else known.to_dict()


def origin(config: Config, net: nn.Module) -> dict[str, Any]:
    """Where a ticket of this run comes from, for its facts."""
    if hasattr(net, 'arch'):
        return {'supernet': called(config)}
    first = 'pretrained' if config.pretrained else 'random'
    return {'how': f'{config.model} was pruned while it trained, from {first} weights.'}


def called(config: Config) -> str:
    """The model with its arguments, as a person writes it."""
    args = ', '.join(f'{name}={value!r}' for name, value in config.model_args.items())
    return f'{config.model}({args})' if args else config.model


def create_net(config: Config, task: Task, data: Data) -> nn.Module:
    """The model of a run, tried on one input.

    Raises:
        ValueError: It cannot be made, it does not take images of this size, or it has nothing to prune.
    """
    torch.manual_seed(config.seed)

    def make(**kwargs: Any) -> nn.Module:
        model: nn.Module = timm.create_model(
            config.model,
            pretrained=config.pretrained,
            in_chans=config.in_chans,
            pretrained_cfg_overlay={'input_size': data.input_size},  # some models are built for one size
            **{**config.model_args, **kwargs},
        )
        return model

    what = f'model={config.model}'
    net = tried(task, make, data, what, f' with model_args={config.model_args}, pretrained={config.pretrained}')
    if not prunable(net):
        raise ValueError(f'{what} has no weight that can be pruned')
    return net


def tried(task: Task, make: Callable[..., nn.Module], data: Data, what: str, made_with: str = '') -> nn.Module:
    """A task's net around a model, tried on one input.

    Args:
        task: The task.
        make: Makes the model.
        data: Its images.
        what: What to call the model when something is wrong.
        made_with: What else to say of it when it cannot be made.

    Raises:
        ValueError: It cannot be made, or it does not take images of this size.
    """
    said = f'{what}{made_with} cannot be made'
    try:
        net = task.create_net(make, data)
        said = f'{what} does not take images of {data.input_size[1]}x{data.input_size[2]}'
        model_cost(net, data.input_size)
    except Exception as error:  # what timm, a model or the Hub make of bad arguments is up to them
        raise ValueError(f'{said}: {" ".join(str(error).split())}') from error
    return net


def chosen_search(config: Config, net: nn.Module) -> Literal['budget', 'threshold', 'none']:
    """How channels are chosen, decided for this model.

    Raises:
        ValueError: A search is asked for, and the model has no channels to search, or no event falls into its time.
    """
    has_channels = is_searchable(net)
    search = config.search if config.search != 'auto' else 'budget' if has_channels else 'none'
    if search != 'none' and not has_channels:
        choices = ', '.join(timm.list_models('supernet_*'))
        raise ValueError(
            f'search={config.search}: model={config.model} has no channels to search; give search=none, or one of '
            f'{choices}'
        )
    if search != 'none' and not plan.last_choice(config):
        share = f'search_until={config.search_until:g} of rounds={config.rounds}'
        raise ValueError(f'search={search}, but no event falls within {share}: give more rounds=, or search=none')
    return search


def start(config: Setup, net: nn.Module, mask: Mask) -> State:
    """A net, its optimizer, and what lives of it."""
    optimizer = create_optimizer_v2(
        net, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum
    )
    for group in optimizer.param_groups:
        group['initial_lr'] = group['lr']  # where timm's schedulers start from, round after round
    ema = ModelEmaV3(net, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
    return State(net, optimizer, mask, ema)


def train_round(run: Run, config: Config, state: State) -> float:
    """One round of the trunk: the learning rate stays or decays, and the gates pay while the search is on."""
    rate = StepLRScheduler(
        state.optimizer,
        decay_t=config.decay_steps or config.steps + 1,
        decay_rate=config.decay_rate,
        warmup_t=config.warmup_steps,
        t_in_epochs=False,
        initialize=False,
    )
    first = state.round * config.round_steps
    text = f'round {state.round + 1} of {config.rounds}'
    growing = config.reactivation == 'regrow' and plan.reactivating(config, first + config.round_steps)
    return train(run, state, text, first, config.round_steps, rate, lambda step: plan.penalty(config, step), growing)


def train(
    run: Run,
    state: State,
    text: str,
    first: int,
    steps: int,
    rate: Any,
    rho: Callable[[int], float] = lambda step: 0.0,
    keep_gradients: bool = False,
) -> float:
    """Train with the mask held, on from where the state is in this stretch; returns the mean loss.

    Args:
        run: What stays the same.
        state: Is trained.
        text: What is under way; it also seeds the order of the images.
        first: The first step's number.
        steps: How many steps.
        rate: A scheduler of timm's over the state's optimizer.
        rho: Weight of the gates' penalty at a step.
        keep_gradients: Remember the dense gradients of the last step.
    """
    config, accelerator, net, mask = run.config, run.accelerator, state.net, state.mask
    model, optimizer = state.prepare(accelerator)
    model.train()
    keep_frozen_statistics_(net)
    penalty = gate_penalty(run, state) if rho(first) or rho(first + steps - 1) else None
    if not state.step:
        state.total = torch.zeros((), device=accelerator.device)
    seed, done = zlib.crc32(f'{config.seed} {text}'.encode()), state.step * config.accumulate
    few = batches(run.data.train, steps * config.accumulate, seed, accelerator.device, done)
    for number, (images, targets) in enumerate(few, done):
        step = first + number // config.accumulate
        rate.step_update(step)
        with accelerator.accumulate(model):
            loss = run.task.loss(model, images, targets)
            accelerator.backward(loss + rho(step) * penalty() if penalty else loss)
        state.total += loss.detach()
        if not accelerator.sync_gradients:
            continue  # the step is not whole yet
        if keep_gradients and step == first + steps - 1:
            state.keep_gradients()
        mask.zero_grads_(net)
        if config.clip_grad:
            accelerator.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        mask.zero_weights_(net)
        if state.ema is not None and not optimizer.step_was_skipped:  # fp16 skips some, and no weight moves
            state.ema.update(net, step=step + 1)
        state.step += 1
        run.report.step(text, state.total)
    if steps:
        rate.step_update(first + steps - 1)  # who goes on from a stop behind the last step has none of these steps
    state.step = 0
    for trained in (net, state.best):
        average_buffers_(accelerator, trained)
    images_seen = steps * config.accumulate * config.batch_size * accelerator.num_processes
    state.spent += images_seen * training_macs(net, run.data.input_size)
    mean = accelerator.reduce(state.total, reduction='mean').item() / max(1, steps * config.accumulate)
    return run.report.sound(mean, text)


def keep_frozen_statistics_(net: nn.Module) -> None:
    """Let batch norm that does not train go on with what it has seen."""
    for module in net.modules():
        weights = list(module.parameters()) if isinstance(module, _BatchNorm) else []
        if weights and not any(weight.requires_grad for weight in weights):
            module.eval()


def training_macs(net: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of a step for one image; what does not train costs nothing on the way back."""
    trained = {name.rpartition('.')[0] for name, param in net.named_parameters() if param.requires_grad}
    layers = model_cost(net, input_size).layers
    return sum(layer.macs * (1 + BACKWARD if layer.name in trained else 1) for layer in layers)


def gate_penalty(run: Run, state: State) -> GatePenalty:
    """The penalty on the gates of the net as it is now, by what their channels cost."""
    groups = searchable(state.net).channel_groups()
    return GatePenalty(state.net, penalty_weights(channel_macs(groups, model_cost(state.net, run.data.input_size))))


def living_channels(run: Run, config: Config, state: State, budget: float) -> Keep:
    """Which channels live on: those with large gates, or those that give the most for their MACs, within the budget."""
    groups = searchable(state.net).channel_groups()
    gates = gate_importance(state.best, groups)
    if config.search == 'threshold':
        return select_by_threshold(groups, gates, config.threshold)
    cost = model_cost(state.net, run.data.input_size)
    macs = channel_macs(groups, cost)
    return select_by_budget(groups, shares_by_cost(gates, macs), macs, searched_macs(state.net, cost), budget)


def pruned(config: Setup, state: State, sparsity: float) -> Mask:
    """The mask of this sparsity; the dead stay dead, unless the dying channels took too many of the living along."""
    within = state.mask if state.mask.sparsity <= sparsity else None
    scores = SCORES[config.score](state.net)
    return prune(
        scores, sparsity, scope=config.scope, floor=config.floor, within=within, groups=channel_groups(state.net)
    )


def reactivated(config: Config, state: State, share: float) -> Mask:
    """The mask until the next event, with some of the dead alive."""
    if config.reactivation == 'reset':
        return reset(state.mask)
    return regrow(state.mask, SCORES[config.score](state.net), state.gradients, share, channel_groups(state.net))


def channel_groups(net: Any) -> tuple[ChannelGroup, ...]:
    """What lives or dies whole: the channels of a member of a space, or of inverted residuals."""
    return net.channel_groups() if hasattr(net, 'channel_groups') else inverted_residual_groups(net)


def draw(run: Run, trunk: State, target: float, steps: int) -> None:
    """Finish a fork of the trunk: prune it to the target, hold the mask, let the learning rate fall to zero, save."""
    name = f'{trunk.ticket_name}_s{100 * target:g}'.replace('.', '_')
    if trunk.branch is None:
        trunk.branch = state = trunk.fork()
        state.mask = pruned(run.config, state, target)
        state.zero_dead_weights_()
        for group in state.optimizer.param_groups:
            group['initial_lr'] = group['lr']  # from where the trunk is
    state = trunk.branch
    rate = CosineLRScheduler(state.optimizer, max(1, steps), t_in_epochs=False, initialize=False)
    loss = train(run, state, name, 0, steps, rate)
    state.zero_dead_weights_()
    save_ticket(run, state, name, loss)
    trunk.branch, trunk.drawn = None, trunk.drawn + 1


def save_ticket(run: Run, state: State, name: str, loss: float) -> None:
    """Score the state as it is, and save it as a ticket."""
    config, score = run.config, measure(run, state)
    if run.accelerator.is_main_process:
        facts = {
            'dataset': config.dataset,
            run.task.metric: score[run.task.metric],
            'n': score['n'],
            **run.origin,
            'seed': config.seed,
            'command': run.command,
            **surroundings(run.accelerator),
            'versions': {module.__name__: module.__version__ for module in (timm_supertickets, torch, timm)},
        }
        model, mask = ticket_part(state.best, state.mask)
        ticket = Ticket.draw(model, mask, facts=facts, data_config=run.data.config)
        folder = ticket.save(run.report.output / name)
        score['bytes'] = (folder / PACKED).stat().st_size
        if state.initial:
            how = {
                'dataset': config.dataset,
                'how': f'The mask of {name} on the weights that training began with.',
            }
            model, mask = ticket_part(state.rewound(), state.mask)
            first = Ticket.draw(model, mask, facts=how, data_config=run.data.config)
            first.save(run.report.output / f'{name}_initial')
    run.report.add(name=name, round=state.round, step=state.round * config.round_steps, loss=loss, **score)


def surroundings(accelerator: Accelerator) -> dict[str, Any]:
    """What a run's result depends on beside its command, where it is not the usual."""
    git = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--abbrev=40', '--dirty', '--exclude=*']
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        commit = ''
    return {
        **({'commit': commit} if commit else {}),
        **({'processes': accelerator.num_processes} if accelerator.num_processes > 1 else {}),
        **({'precision': accelerator.mixed_precision} if accelerator.mixed_precision != 'no' else {}),
    }


def measure(run: Run, state: State) -> dict[str, Any]:
    """What the net scores on the test images, and what it costs; batch norm is recalibrated, and stays so."""
    recalibrate(run, state.best)
    cost = model_cost(state.best, run.data.input_size, state.mask)
    return {
        run.task.metric: run.task.score(state.best, run.data, run.accelerator),
        'n': run.data.val_count,
        'sparsity': cost.sparsity,
        'sparsity_all': cost.sparsity_all,
        'macs': cost.macs,
        'sparse_macs': cost.sparse_macs,
        'params': cost.params,
        'dense_bytes': cost.dense_bytes,
        'train_macs': state.spent,
    }


def recalibrate(run: Run, net: nn.Module) -> None:
    """Measure batch norm's statistics anew with the weights as they are; all processes agree on them."""
    if run.config.recalibrate:
        device = run.accelerator.device
        few = batches(run.data.train, run.config.recalibrate, run.config.seed, device)
        update_bn(([images] for images, _ in few), net)  # of a list, it takes the first item
        average_buffers_(run.accelerator, net)


def average_buffers_(accelerator: Accelerator, net: nn.Module) -> None:
    """Let all processes hold the mean of what batch norm has seen in each."""
    for name, buffer in net.named_buffers():
        if name.endswith(('running_mean', 'running_var')):
            buffer.copy_(accelerator.reduce(buffer, reduction='mean'))


if __name__ == '__main__':
    program(main)
