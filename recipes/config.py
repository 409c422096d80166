"""The typed configuration of a run: a YAML file and key=value on the command line."""

import re
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

CONFIGS = Path(__file__).parent / 'configs'


@dataclass
class Config:
    """What a run does. Shares are of the trunk's steps.

    Args:
        dataset: `digits` (embedded), `fashion_mnist`, or a dataset name of timm: `hfds/...`, `hfids/...`, `folder`.
        data_dir: Where the dataset lies.
        train_split: Split to train on.
        val_split: Split to score on; the test images.
        train_samples: Images of the training split; only for streamed datasets (`hfids/`) that do not say.
        val_samples: Images of the test split, likewise.
        num_classes: Classes of the model; by default those of the dataset.
        in_chans: Input channels, 3 or 1.
        img_size: Side of the input in pixels.
        batch_size: Images per step and process.
        workers: Loader processes.
        hflip: Probability of a horizontal flip.
        scale: Smallest share of the image that a random crop keeps.
        ratio: Widest aspect ratio of a random crop; 1 keeps it square.
        color_jitter: Strength.
        auto_augment: timm's augmentation string, e.g. `rand-m9-mstd0.5`.
        reprob: Probability of random erasing.
        model: A registered supernet, or any other model of timm, which is then pruned without search.
        model_args: More arguments of the model, e.g. `{width: 0.5}`.
        pretrained: Start from the model's pretrained weights, with images normalised as those had them.
        opt: Optimizer, by timm's name.
        lr: Learning rate of the trunk.
        momentum: Momentum.
        weight_decay: Weight decay; not on biases and norms.
        warmup_steps: Steps in which the learning rate rises from zero.
        clip_grad: Largest norm of the gradient of the living weights; 0 does not clip.
        smoothing: Label smoothing.
        ema_decay: Decay of an average of the weights, which is then what a ticket holds; 0 keeps none.
        rounds: Rounds of the trunk; an event follows each.
        round_steps: Steps per round.
        cooldown_steps: Steps of the branch that finishes a ticket: mask fixed, learning rate falling to zero.
        recalibrate: Batches that batch norm is measured anew on, after every event and before a ticket is saved.
        search: How channels are chosen: `budget`, `threshold` or `none`; `auto`: `budget` for a supernet, else `none`.
        search_until: Share of the trunk after which the architecture is fixed.
        budget: Share of the supernet's MACs that the architecture is left with, for `search: budget`.
        threshold: Gate magnitude below which a channel dies, for `search: threshold`.
        penalty: Weight of the gates' penalty during the search.
        penalty_warmup: Share of the trunk in which the penalty rises from zero.
        targets: Sparsities at which a ticket is drawn, rising.
        schedule: How sparsity rises: `cubic`, or in equal `steps` (the paper's).
        prune_from: Share of the trunk after which pruning starts.
        prune_until: Share of the trunk at which the last target is reached.
        scope: Which weights compete: `global` or `tensor`.
        floor: Living weights that every tensor keeps.
        reactivation: Which dead weights may come back between events: `none`, `reset` or `regrow`.
        regrow_share: Share of the living weights that `regrow` trades at first; it falls to zero until `prune_until`.
        threads: Threads of torch on a CPU; 0 shares all cores among the processes (`accelerate launch` allows one).
        seed: Seed of everything.
        output: Folder of the run.
        resume: `auto` goes on with what `output` holds, `never` refuses to, or the folder of a checkpoint.
    """

    dataset: str = 'digits'
    data_dir: str | None = None
    train_split: str = 'train'
    val_split: str = 'test'
    train_samples: int | None = None
    val_samples: int | None = None
    num_classes: int | None = None
    in_chans: int = 3
    img_size: int = 32
    batch_size: int = 64
    workers: int = 0
    hflip: float = 0.0
    scale: float = 1.0
    ratio: float = 1.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    reprob: float = 0.0
    model: str = 'supernet_mbv2_tiny'
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    opt: str = 'sgd'
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    clip_grad: float = 0.0
    smoothing: float = 0.0
    ema_decay: float = 0.0
    rounds: int = 16
    round_steps: int = 40
    cooldown_steps: int = 160
    recalibrate: int = 36
    search: Literal['auto', 'budget', 'threshold', 'none'] = 'auto'
    search_until: float = 0.5
    budget: float = 0.5
    threshold: float = 1e-3
    penalty: float = 1e-4
    penalty_warmup: float = 0.1
    targets: list[float] = field(default_factory=lambda: [0.5, 0.8, 0.9])
    schedule: Literal['cubic', 'steps'] = 'cubic'
    prune_from: float = 0.0
    prune_until: float = 1.0
    scope: Literal['global', 'tensor'] = 'global'
    floor: int = 1
    reactivation: Literal['none', 'reset', 'regrow'] = 'regrow'
    regrow_share: float = 0.2
    threads: int = 0
    seed: int = 0
    output: str = 'output/digits'
    resume: str = 'auto'

    def __post_init__(self) -> None:
        _in_range('targets', self.targets, [0 <= t < 1 for t in self.targets], 'sparsities in [0, 1)')
        rising = [b > a for a, b in zip(self.targets, self.targets[1:], strict=False)]
        _in_range('targets', self.targets, rising, 'rising: a ticket cannot have less sparsity than the one before')
        if not self.targets:
            raise ValueError('targets is empty; name at least one sparsity, e.g. targets=[0.9]')
        for name in ('rounds', 'round_steps', 'batch_size', 'img_size', 'in_chans'):
            _in_range(name, getattr(self, name), [getattr(self, name) >= 1], 'at least 1')
        for name in (
            'cooldown_steps',
            'warmup_steps',
            'clip_grad',
            'penalty',
            'workers',
            'floor',
            'recalibrate',
            'seed',
            'threads',
        ):
            _in_range(name, getattr(self, name), [getattr(self, name) >= 0], 'at least 0')
        for name in ('search_until', 'prune_from', 'prune_until', 'penalty_warmup', 'hflip', 'reprob'):
            _in_range(name, getattr(self, name), [0 <= getattr(self, name) <= 1], 'in [0, 1]')
        for name in ('regrow_share', 'ema_decay', 'smoothing'):
            _in_range(name, getattr(self, name), [0 <= getattr(self, name) < 1], 'in [0, 1)')
        for name in ('budget', 'scale'):
            _in_range(name, getattr(self, name), [0 < getattr(self, name) <= 1], 'in (0, 1]')
        _in_range('ratio', self.ratio, [self.ratio >= 1], 'at least 1')
        _in_range('in_chans', self.in_chans, [self.in_chans in (1, 3)], '1 or 3')

    @property
    def steps(self) -> int:
        """Steps of the trunk."""
        return self.rounds * self.round_steps

    def to_yaml(self) -> str:
        """The resolved configuration, as a file that `--config` takes."""
        return yaml.safe_dump(asdict(self), sort_keys=False)


def _in_range(name: str, value: object, holds: list[bool], wanted: str) -> None:
    if not all(holds):
        raise ValueError(f'{name} must be {wanted}, got {value}')


def parse(argv: list[str], default: str = 'mbv2_digits.yaml') -> Config:
    """Read `--config FILE key=value ...`.

    Args:
        argv: The command line without the program.
        default: The file in `configs/` that is read when none is named.

    Raises:
        ValueError: An unknown key or a value that does not fit, in one line.
    """
    parser = ArgumentParser(prog='train.py', description='Draw tickets from a supernet.', exit_on_error=False)
    parser.add_argument('--config', action='config', help='a YAML file of keys and values')
    parser.add_class_arguments(Config)
    argv = [f'--{arg}' if '=' in arg and not arg.startswith('-') else arg for arg in argv]
    if not any(arg == '--config' or arg.startswith('--config=') for arg in argv):
        argv = ['--config', str(CONFIGS / default), *argv]
    try:
        parsed = parser.parse_args(argv)
    except ArgumentError as error:
        message = ' '.join(str(error).split())
        unknown = re.search(r"Option '(\w+)' is not accepted|unrecognized arguments: -*(\w+)", message)
        if unknown:
            known = [f.name for f in fields(Config)]
            key = unknown[1] or unknown[2]
            message = f'unknown key {key!r}; did you mean {", ".join(get_close_matches(key, known, 3) or known)}?'
        raise ValueError(f'{message} (read from: {" ".join(argv)})') from None
    return Config(**{f.name: parsed[f.name] for f in fields(Config)})
