"""State: everything that a run carries from round to round, through shrinks, forks and checkpoints."""

import copy
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from safetensors import SafetensorError
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from timm_supertickets import Arch, Mask
from timm_supertickets.channels import Keep, take
from timm_supertickets.files import (
    dump_json,
    dump_safetensors,
    flush_to_disk,
    read_json,
    read_safetensors,
    write_atomic,
)
from timm_supertickets.search.shrink import searchable, shrink, shrink_optimizer_

CHECKPOINTS = 'checkpoints'
SAVING = '.saving'
BRANCH = 'branch'
DIGESTED = ('arch', 'mask', 'weights', 'optimizer', 'average')


@dataclass
class State:
    """What a run carries.

    Args:
        net: The model itself, not a wrapper of it.
        optimizer: Trains the net's parameters.
        mask: Which weights live.
        ema: Average of the weights, if one is kept.
        round: Rounds whose training is behind us.
        drawn: Tickets that have been drawn.
        loss: Mean loss of the last round while the event after it is under way.
        step: Steps of the stretch of training that is under way.
        total: Sum of their losses, in this process.
        branch: The fork that a ticket is being drawn from.
        gradients: Dense gradients of the masked weights at the end of the last round; only `regrow` asks for them.
        spent: Multiply-accumulates that training has cost.
        initial: The weights that training began with, of what is left of the net; only if they are asked for.
    """

    net: nn.Module
    optimizer: Optimizer
    mask: Mask
    ema: ModelEmaV3 | None = None
    round: int = 0
    drawn: int = 0
    loss: float | None = None
    step: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    branch: 'State | None' = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    spent: int = 0
    initial: dict[str, Tensor] = field(default_factory=dict)

    def prepare(self, accelerator: Accelerator) -> tuple[nn.Module, Any]:
        """Wrap net and optimizer for this process; the wrappers are good until the next `prepare`."""
        accelerator.free_memory()  # or accelerate would save every model that it ever prepared
        self.release()
        model, optimizer = accelerator.prepare(self.net, self.optimizer)
        return model, optimizer

    def release(self) -> None:
        """Undo what preparing did to the net, which may then be copied, shrunk and prepared again."""
        self.net = extract_model_from_parallel(self.net, keep_fp32_wrapper=False)
        self.net.__dict__.pop('forward', None)
        for thing in (self.net, self.optimizer):
            thing.__dict__.pop('_is_accelerate_prepared', None)

    def fork(self) -> 'State':
        """An independent copy: the optimizer of the copy trains the net of the copy."""
        self.release()
        return copy.deepcopy(self)

    def shrink(self, keep: Keep) -> None:
        """Leave the dying channels behind, everywhere."""
        groups = searchable(self.net).channel_groups()
        small = shrink(self.net, keep)
        shrink_optimizer_(self.optimizer, self.net, small, groups, keep)
        self.mask = Mask(take(self.mask, groups, keep))
        self.gradients = take(self.gradients, groups, keep)
        self.initial = take(self.initial, groups, keep)
        if self.ema is not None:
            self.ema.module = shrink(self.ema.module, keep)
        self.net = small

    def zero_dead_weights_(self) -> None:
        """Zero what the mask says is dead, in the net and in its average."""
        self.mask.zero_weights_(self.net)
        if self.ema is not None:
            self.mask.zero_weights_(self.ema.module)

    @torch.no_grad()
    def keep_gradients(self) -> None:
        """Remember the dense gradients of the masked weights; of what a loss does not depend on they are zero."""
        params = self.net.named_parameters()
        # what overflows in fp16, whose step the scaler then skips, says nothing of how large a gradient is
        self.gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            for name, p in params
            if name in self.mask
        }

    def keep_initial(self) -> None:
        """Remember the weights as they are now, through all shrinks."""
        state = self.net.state_dict()
        self.initial = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in state.items()}

    def rewound(self) -> nn.Module:
        """A copy of the net as it is, with the weights that were remembered."""
        self.release()
        net = copy.deepcopy(self.net)
        net.load_state_dict(self.initial)
        return net

    @property
    def ticket_name(self) -> str:
        """What a ticket of this net is called, without its sparsity."""
        arch = getattr(self.net, 'arch', None)
        return f'superticket_{arch.space}' if isinstance(arch, Arch) else str(self.net.pretrained_cfg['architecture'])

    @property
    def best(self) -> nn.Module:
        """The net that a ticket is drawn from: the average, if one is kept."""
        return self.net if self.ema is None else self.ema.module

    def digest(self) -> Tensor:
        """What all processes must hold alike: a sha256 each of `DIGESTED`, uint8 `(5, 32)`.

        Within a stretch of training, batch norm's statistics are each process's own.
        """
        nets = (self.net, None if self.ema is None else self.ema.module)
        weights, average = (
            net and (dict(net.named_parameters()) if self.step else net.state_dict()) for net in nets
        )  # fmt: skip
        parts = (repr(getattr(self.net, 'arch', None)), dict(self.mask), weights, self.optimizer.state_dict(), average)
        return torch.stack([torch.frombuffer(bytearray(sha256(part)), dtype=torch.uint8) for part in parts])

    def check_same(self, accelerator: Accelerator) -> None:
        """Check that every process holds the same, to the bit.

        Raises:
            ValueError: One does not; its rank is named, and what it holds.
        """
        if accelerator.num_processes == 1:
            return
        self.release()
        digests = accelerator.gather(self.digest()[None].to(accelerator.device)).cpu()
        most, _ = Counter(bytes(one.flatten().tolist()) for one in digests).most_common(1)[0]
        expected = torch.frombuffer(bytearray(most), dtype=torch.uint8).view_as(digests[0])
        for rank, found in enumerate(digests):
            differ = [part for part, a, b in zip(DIGESTED, found, expected, strict=True) if not torch.equal(a, b)]
            if differ:
                raise ValueError(
                    f'rank {rank} of {len(digests)} differs from the others in its {", ".join(differ)} after round '
                    f'{self.round}, which is not saved; the same command goes on from the checkpoint before'
                )

    def name(self) -> str:
        """What a checkpoint of this state is called: by the rounds that are wholly behind us."""
        if self.loss is not None:
            return f'round_{self.round - 1:05d}_stopped'
        return f'round_{self.round:05d}_stopped' if self.step else f'round_{self.round:05d}'

    def save(self, accelerator: Accelerator, output: Path, rows: list[dict[str, Any]]) -> Path:
        """Write a checkpoint of what all processes hold alike, whole or not at all; let go of all but the last two.

        Args:
            accelerator: Writes it.
            output: Folder of the run.
            rows: What the summary holds so far.

        Returns:
            The checkpoint.

        Raises:
            ValueError: A process holds something else, or the disk is full or read-only.
        """
        folder = output / CHECKPOINTS
        saving, path = folder / SAVING, folder / self.name()
        if accelerator.is_main_process:
            with one_line(path, output):
                discard(saving)
        accelerator.wait_for_everyone()
        if self.branch is not None:
            self.branch._write(accelerator, saving / BRANCH, path, output, [])
        self._write(accelerator, saving, path, output, rows)
        if accelerator.is_main_process:
            with one_line(path, output):
                flush_to_disk(output)  # the folders of tickets, which the checkpoint says are drawn
                put_in_place(saving, path)
                for old in checkpoints(output)[:-2]:
                    discard(old)
        accelerator.wait_for_everyone()
        return path

    def _write(
        self, accelerator: Accelerator, folder: Path, path: Path, output: Path, rows: list[dict[str, Any]]
    ) -> None:
        """Write all that this state holds to a folder, on the way to a checkpoint of that path."""
        self.check_same(accelerator)
        self.prepare(accelerator)  # what was prepared last may be another
        with one_line(path, output):
            accelerator.save_state(str(folder))
            if self.step:
                mine = {'total': self.total, **self._buffers()}
                write_atomic(folder / own_file(accelerator), dump_safetensors(mine, {}))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with one_line(path, output):
                self._write_rest(folder, accelerator.num_processes, rows)

    def _buffers(self) -> dict[str, Tensor]:
        """Batch norm's statistics, of the net and of its average."""
        nets = {'net': self.net} if self.ema is None else {'net': self.net, 'average': self.ema.module}
        return {f'{of}.{name}': buffer for of, net in nets.items() for name, buffer in net.named_buffers()}

    def _write_rest(self, folder: Path, processes: int, rows: list[dict[str, Any]]) -> None:
        """Add to a folder what accelerate knows nothing of, and a word on everything in it."""
        tensors = {'mask': self.mask, 'initial': self.initial}
        if self.name().endswith('_stopped'):
            tensors['gradients'] = self.gradients
        if self.ema is not None:
            tensors['ema'] = self.ema.module.state_dict()
        for name, some in tensors.items():
            if some or name == 'mask':
                write_atomic(folder / f'{name}.safetensors', dump_safetensors(some, {}))
        arch = getattr(self.net, 'arch', None)
        files = sorted(file for file in folder.rglob('*') if file.is_file())
        about = {
            'round': self.round,
            'drawn': self.drawn,
            'loss': self.loss,
            'step': self.step,
            'spent': self.spent,
            'arch': arch.to_json() if isinstance(arch, Arch) else None,
            'processes': processes,
            'rows': rows,
            'files': {file.relative_to(folder).as_posix(): file_sha256(file) for file in files},
        }
        for file in files:
            flush_to_disk(file)
        write_atomic(folder / 'state.json', dump_json(about))

    def load(self, accelerator: Accelerator, path: Path) -> list[dict[str, Any]]:
        """Go on from a checkpoint. The net must have been built by the same configuration.

        Args:
            accelerator: Prepares the loaded state.
            path: The checkpoint.

        Returns:
            The rows of the summary at that time.

        Raises:
            ValueError: It is of another net, or of another number of processes.
        """
        about = read_json(path / 'state.json')
        processes = about.get('processes', accelerator.num_processes)
        if processes != accelerator.num_processes:
            raise ValueError(
                f'checkpoint {path} is of a run on {processes} processes, and this is {accelerator.num_processes}, '
                'with which a step would see another number of images; start as many as then'
            )
        device = next(self.net.parameters()).device
        if about['arch'] is not None:
            small = searchable(self.net).rebuild(Arch.from_json(about['arch']))
            rebind_(self.optimizer, self.net, small)
            self.net = small
        mask, _ = read_safetensors(path / 'mask.safetensors')
        self.mask = Mask({name: alive.to(device) for name, alive in mask.items()})
        if self.initial:
            self.initial, _ = read_safetensors(path / 'initial.safetensors')
        if self.ema is not None:
            average, _ = read_safetensors(path / 'ema.safetensors')
            self.ema.module = copy.deepcopy(self.net).eval()
            self.ema.module.load_state_dict(average)
        self.round, self.drawn, self.spent = about['round'], about['drawn'], about['spent']
        self.loss, self.step = about.get('loss'), about.get('step', 0)
        if (path / 'gradients.safetensors').exists():
            gradients, _ = read_safetensors(path / 'gradients.safetensors')
            self.gradients = {name: gradient.to(device) for name, gradient in gradients.items()}
        self.prepare(accelerator)
        try:
            accelerator.load_state(str(path))  # reads tensors and plain values only, out of pickles too
        except Exception as error:  # what torch and accelerate make of another net's state is up to them
            raise ValueError(f'checkpoint {path} cannot be loaded: {" ".join(str(error).split())}') from error
        if self.step:
            self.release()
            mine, _ = read_safetensors(path / own_file(accelerator))
            self.total = mine.pop('total').to(device)
            for name, buffer in self._buffers().items():
                buffer.copy_(mine[name])
        if (path / BRANCH).exists():
            self.branch = self.fork()
            self.branch.load(accelerator, path / BRANCH)
        rows: list[dict[str, Any]] = about['rows']
        return rows


def own_file(accelerator: Accelerator) -> str:
    """What a process alone holds of a checkpoint."""
    return f'process_{accelerator.process_index}.safetensors'


def sha256(thing: Any) -> bytes:
    """Digest of tensors, their types and shapes, and of plain values among them in dicts and lists."""
    digest = hashlib.sha256()

    def add(thing: Any) -> None:
        if isinstance(thing, Tensor):
            digest.update(f'{thing.dtype} {tuple(thing.shape)}'.encode())
            flat = thing.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(thing, Mapping):
            for key, value in thing.items():
                digest.update(repr(key).encode())
                add(value)
        elif isinstance(thing, (list, tuple)):
            for value in thing:
                add(value)
        else:
            digest.update(repr(thing).encode())

    add(thing)
    return digest.digest()


def rebind_(optimizer: Optimizer, model: nn.Module, other: nn.Module) -> None:
    """Let an optimizer train another member's parameters of the same names, from its beginning."""
    names = {id(param): name for name, param in model.named_parameters()}
    params: Mapping[str, nn.Parameter] = dict(other.named_parameters())
    for group in optimizer.param_groups:
        group['params'] = [params[names[id(p)]] for p in group['params'] if names[id(p)] in params]
    optimizer.state.clear()


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((output / CHECKPOINTS).glob('round_*'))


def newest_checkpoint(output: Path, tell: Callable[[str], None] = lambda fault: None) -> Path | None:
    """The newest checkpoint of a run that is whole, if it has any; `tell` is told of those that are not."""
    for path in reversed(checkpoints(output)):
        fault = find_fault(path)
        if not fault:
            return path
        tell(f'checkpoint {path} is not whole: {fault}')
    return None


def find_fault(path: Path) -> str:
    """What is wrong with a checkpoint; empty if every file is as it was written."""
    try:
        about = read_json(path / 'state.json')
        for name, digest in about.get('files', {}).items():  # those of older versions do not say
            if file_sha256(path / name) != digest:
                return f'{name} has other bytes than were written'
    except FileNotFoundError as error:
        return f'{Path(error.filename).name} is missing'
    except (ValueError, OSError) as error:
        return str(error)
    return ''


def find_checkpoint(resume: str, output: Path, accelerator: Accelerator) -> Path | None:
    """The checkpoint to go on from, if any; the same for all processes.

    Args:
        resume: `auto`: the newest in `output`; `never`; or the folder of a checkpoint.
        output: Folder of the run.
        accelerator: Knows the processes.

    Raises:
        ValueError: The folder is no checkpoint, none in `output` is whole, or not all processes see the same.
    """
    if resume == 'never':
        return None
    if resume == 'auto':
        faults: list[str] = []
        found = newest_checkpoint(output, faults.append)
        if faults and not found:
            raise ValueError(f'{faults[0]}, and there is no other that is; delete {output / CHECKPOINTS} to begin anew')
        for fault in faults:
            accelerator.print(f'{fault}; going on from {found}')
        left = output / CHECKPOINTS / SAVING
        if left.exists():
            accelerator.print(
                f'{left} was being written when the run stopped; going on from {found or "the beginning"}'
            )
    else:
        found = Path(resume)
        if fault := find_fault(found):
            raise ValueError(
                f'resume={resume} is neither "auto" nor "never" nor a checkpoint folder such as '
                f'{output / CHECKPOINTS}/round_00004: {fault}'
            )
    seen = sha256(str(found and found.name))[:8]
    all_seen = accelerator.gather(torch.tensor([list(seen)], device=accelerator.device))
    if len(all_seen.unique(dim=0)) > 1:
        raise ValueError(
            f'the processes see different checkpoints in {output}; all machines must share the disk that output= is on'
        )
    return found


@contextmanager
def one_line(path: Path, output: Path) -> Iterator[None]:
    """Say in one line that a checkpoint cannot be written, and which one there is."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # Python's, torch's and safetensors' word for a full disk
        shutil.rmtree(path.with_name(SAVING), ignore_errors=True)
        kept, free = newest_checkpoint(output), shutil.disk_usage(output).free
        raise ValueError(
            f'checkpoint {path} cannot be written: {" ".join(str(error).split())}; {free:,} bytes are free '
            f'on its disk; {f"the same command goes on from {kept}" if kept else "there is no other yet"}'
        ) from None


def put_in_place(saving: Path, path: Path) -> None:
    """Give a checkpoint that is written its name; whenever this is interrupted, there is a whole one."""
    old = path.with_name(f'{path.name}.old')
    flush_to_disk(saving)
    if path.exists():
        discard(old)
        os.replace(path, old)
    os.replace(saving, path)
    flush_to_disk(path.parent)
    discard(old)


def discard(path: Path) -> None:
    """Delete a folder, which has another name while that lasts: nobody takes half of a checkpoint for one."""
    if path.exists():
        going = path.with_name('.going')
        shutil.rmtree(going, ignore_errors=True)
        os.replace(path, going)
        shutil.rmtree(going)


def file_sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
