"""The typed configuration of a run: a YAML file and key=value on the command line."""

import math
import re
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

CONFIGS = Path(__file__).parents[1] / 'configs'


class Checked:
    """A configuration that can check its own values."""

    def within(self, low: float, high: float, *names: str, start: bool = True, end: bool = True) -> None:
        """Check that values are in a range.

        Args:
            low: Its start.
            high: Its end; may be infinite.
            names: Keys; a list must hold such values only.
            start: Whether the start itself is allowed.
            end: Whether the end itself is.

        Raises:
            ValueError: A value is not; its key is named.
        """
        if math.isinf(high):
            wanted = f'at least {low}'
        else:
            wanted = f'in {"[" if start else "("}{low}, {high}{"]" if end else ")"}'
        for name in names:
            value = getattr(self, name)
            for one in value if isinstance(value, list) else [value]:
                if not low <= one <= high or (one == low and not start) or (one == high and not end):
                    raise ValueError(f'{name} must be {wanted}, got {value}')


@dataclass
class Setup(Checked):
    """What every training has: images, an optimizer, rounds, and a folder.

    Args:
        task: What the net learns: `classify`, `segment`, `keypoints` or `detect`.
        task_args: Settings of the task, e.g. `{ohem: 0.7}` for `segment`.
        dataset: For `classify`: `digits` (embedded), `fashion_mnist`, or a dataset name of timm: `hfds/...`,
            `hfids/...`, `folder`. For `segment`: `scenes` (embedded; composed from digits), `fashion_scenes`,
            `cityscapes`, `ade20k`, `scene_parse_150` or `masks`, a folder of images and masks. For `keypoints` and
            `detect`: `scenes`, `fashion_scenes` or `coco`.
        data_dir: Where the dataset lies.
        train_split: Split to train on, in the words of `datasets`: `train`, or a part of it as `train[:5000]` or
            `train[:10%]`; a dataset that is a folder of images has whole ones only.
        val_split: Split to score on; the test images.
        train_samples: Images of the training split; only for streamed datasets (`hfids/`) that do not say.
        val_samples: Images of the test split, likewise.
        num_classes: Classes of the model; by default those of the dataset.
        in_chans: Input channels, 3 or 1.
        img_size: Side of the input in pixels.
        batch_size: Images per batch and process.
        accumulate: Batches per step and process; the step goes by the mean of their gradients.
        workers: Loader processes.
        hflip: Probability of a horizontal flip.
        scale: Smallest share of the image that a random crop keeps.
        ratio: Widest aspect ratio of a random crop; 1 keeps it square.
        color_jitter: Strength.
        auto_augment: timm's augmentation string, e.g. `rand-m9-mstd0.5`.
        reprob: Probability of random erasing.
        opt: Optimizer, by timm's name.
        lr: Learning rate at first.
        momentum: Momentum.
        weight_decay: Weight decay; not on biases and norms.
        warmup_steps: Steps in which the learning rate rises from zero.
        clip_grad: Largest norm of the gradient of the living weights; 0 does not clip.
        smoothing: Label smoothing.
        ema_decay: Decay of an average of the weights, which is then what a ticket holds; 0 keeps none.
        rounds: Rounds of training; each ends with a score and a checkpoint.
        round_steps: Steps per round.
        recalibrate: Batches that batch norm is measured anew on, after every round and before a ticket is saved.
        floor: Living weights that every tensor keeps.
        scope: Which weights compete: `global` or `tensor`.
        score: By what they compete: `magnitude`, or `lamp`, magnitudes that tensors of any scale can compare.
        threads: Threads of torch on a CPU; 0 shares all cores among the processes (`accelerate launch` allows one).
        kernels: Compile gradients of depthwise convolutions (5x5, 7x7, and 3x3 on the smallest maps) for this CPU,
            which saves a third of a step of the mbv2 space; needs a C++ compiler and ninja. They round otherwise than
            torch's own.
        seed: Seed of everything.
        deterministic: Let torch use deterministic algorithms only, or say which operation has none; a CPU needs no such
            thing, a GPU does for the same bytes twice.
        tracker: Where the rows of summary.csv go as well: `tensorboard`, `wandb`, `mlflow` or another that accelerate
            knows; `none`; `auto` is `tensorboard` where that is installed.
        output: Folder of the run.
        resume: `auto` goes on with what `output` holds, `never` refuses to, or the folder of a checkpoint.
    """

    task: str = 'classify'
    task_args: dict[str, Any] = field(default_factory=dict)
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
    accumulate: int = 1
    workers: int = 0
    hflip: float = 0.0
    scale: float = 1.0
    ratio: float = 1.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    reprob: float = 0.0
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
    recalibrate: int = 36
    floor: int = 1
    scope: Literal['global', 'tensor'] = 'global'
    score: Literal['magnitude', 'lamp'] = 'lamp'
    threads: int = 0
    kernels: bool = False
    seed: int = 0
    deterministic: bool = False
    tracker: str = 'auto'
    output: str = 'output/run'
    resume: str = 'auto'

    def __post_init__(self) -> None:
        self.within(1, math.inf, 'round_steps', 'batch_size', 'accumulate', 'img_size', 'in_chans')
        self.within(
            0, math.inf, 'rounds', 'warmup_steps', 'clip_grad', 'workers', 'floor', 'recalibrate', 'seed', 'threads'
        )
        self.within(0, 1, 'hflip', 'reprob')
        self.within(0, 1, 'ema_decay', 'smoothing', end=False)
        self.within(0, 1, 'scale', start=False)
        self.within(1, math.inf, 'ratio')
        if self.in_chans not in (1, 3):
            raise ValueError(f'in_chans must be 1 or 3, got {self.in_chans}')

    @property
    def steps(self) -> int:
        """Steps of all rounds."""
        return self.rounds * self.round_steps

    @property
    def all_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps

    def to_yaml(self) -> str:
        """The resolved configuration, as a file that `--config` takes."""
        return yaml.safe_dump(asdict(self), sort_keys=False)


@dataclass
class Config(Setup):
    """What a run of train.py does. Shares are of the trunk's steps, which are those of all rounds.

    Args:
        model: A registered supernet, or any other model of timm, which is then pruned without search.
        model_args: More arguments of the model, e.g. `{width: 0.5}`.
        pretrained: Start from the model's pretrained weights, with images normalised as those had them.
        decay_steps: Steps after which the learning rate of the trunk falls, again and again; 0 leaves it constant.
        decay_rate: What it is multiplied by.
        cooldown_steps: Steps of the branch that finishes a ticket: mask fixed, learning rate falling to zero.
        search: How channels are chosen: by what they are of their block for the MACs that they cost (`budget`), by
            their gates (`threshold`), or not at all (`none`); `auto`: `budget` for a supernet, else `none`.
        search_every: Rounds from one event at which channels die to the next.
        search_until: Share of the trunk after which the architecture is fixed.
        budget: Share of the supernet's MACs that the architecture is left with, for `search: budget`; a head that is
            put over the supernet is none of either.
        threshold: Gate magnitude below which a channel dies, for `search: threshold`.
        penalty: Weight of the gates' penalty during the search.
        penalty_warmup: Share of the trunk in which the penalty rises from zero.
        targets: Sparsities at which a ticket is drawn, rising; 0 draws a dense one when pruning ends.
        schedule: How sparsity rises: `cubic`, or in equal `steps` (the paper's).
        prune_every: Rounds from one event at which weights die to the next.
        prune_from: Share of the trunk after which pruning starts.
        prune_until: Share of the trunk at which the last target is reached.
        reactivation: Which dead weights may come back between events: `none`, `reset` or `regrow`.
        reactivate_until: Share of the trunk after which the dead stay dead.
        regrow_share: Share of the living weights that `regrow` trades at first; it falls to zero on the way.
        keep_initial: Also save every ticket with the weights that the run began with, as `NAME_initial`.
    """

    model: str = 'supernet_mbv2_tiny'
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    decay_steps: int = 0
    decay_rate: float = 0.97
    cooldown_steps: int = 160
    search: Literal['auto', 'budget', 'threshold', 'none'] = 'auto'
    search_every: int = 1
    search_until: float = 0.5
    budget: float = 0.5
    threshold: float = 1e-3
    penalty: float = 1e-4
    penalty_warmup: float = 0.1
    targets: list[float] = field(default_factory=lambda: [0.5, 0.8, 0.9])
    schedule: Literal['cubic', 'steps'] = 'cubic'
    prune_every: int = 1
    prune_from: float = 0.0
    prune_until: float = 1.0
    reactivation: Literal['none', 'reset', 'regrow'] = 'regrow'
    reactivate_until: float = 0.5
    regrow_share: float = 0.2
    keep_initial: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within(1, math.inf, 'rounds', 'search_every', 'prune_every')
        if not self.targets:
            raise ValueError('targets is empty; name at least one sparsity, e.g. targets=[0.9]')
        self.within(0, 1, 'targets', 'regrow_share', end=False)
        if any(b <= a for a, b in zip(self.targets, self.targets[1:], strict=False)):
            raise ValueError(
                f'targets must be rising, got {self.targets}: a ticket cannot have less sparsity than the one before'
            )
        self.within(0, math.inf, 'decay_steps', 'cooldown_steps', 'penalty')
        self.within(0, 1, 'decay_rate', start=False)
        self.within(0, 1, 'search_until', 'prune_from', 'prune_until', 'penalty_warmup', 'reactivate_until')
        self.within(0, 1, 'budget', start=False)

    @property
    def all_steps(self) -> int:
        """Steps of the trunk and of all branches."""
        return self.steps + len(self.targets) * self.cooldown_steps


Kind = TypeVar('Kind')


def parse(
    argv: list[str], kind: type[Kind] = Config, default: str = 'mbv2_digits.yaml', prog: str = 'train.py'
) -> Kind:
    """Read `--config FILE key=value ...`.

    Args:
        argv: The command line without the program.
        kind: The configuration that is asked for.
        default: The file in `configs/` that is read when none is named; '' for none.
        prog: The program, for its help.

    Raises:
        ValueError: An unknown key or a value that does not fit, in one line.
    """
    about = (kind.__doc__ or '').splitlines()[0]
    parser = ArgumentParser(prog=prog, description=about, exit_on_error=False)
    parser.add_argument('--config', action='config', help='a YAML file of keys and values')
    parser.add_class_arguments(kind)
    argv = [f'--{arg}' if '=' in arg and not arg.startswith('-') else arg for arg in argv]
    if default and not any(arg == '--config' or arg.startswith('--config=') for arg in argv):
        argv = ['--config', str(CONFIGS / default), *argv]
    try:
        parsed = parser.parse_args(argv)
    except ArgumentError as error:
        message = ' '.join(str(error).split())
        unknown = re.search(r"Option '(\w+)' is not accepted|unrecognized arguments: -*(\w+)", message)
        if unknown:
            known = [f.name for f in fields(kind)]
            key = unknown[1] or unknown[2]
            message = f'unknown key {key!r}; did you mean {", ".join(get_close_matches(key, known, 3) or known)}?'
        raise ValueError(f'{message} (read from: {" ".join(argv)})') from None
    return kind(**{f.name: parsed[f.name] for f in fields(kind)})
