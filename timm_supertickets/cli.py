"""The `supertickets` command."""

import argparse
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from . import bench, card, export, hub, show
from .hub import HUB, find_ticket
from .ticket import PACKED, load_ticket, locate, verify_ticket

OUTPUT = 'output'
FAILED, INTERRUPTED = 2, 130
TICKET = f"{HUB}OWNER/NAME[@REVISION], a ticket's folder or .safetensors file, or a pretrained model's name"
LOGIN = (
    'The token is what `hf auth login` stored or HF_TOKEN holds; there is no option for it, because others on the '
    'machine can read command lines.'
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; by default those of the process.

    Returns:
        The exit code: 0, 2 after an error, 130 after Ctrl-C.
    """
    args = make_parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _complain(f'warning: {message}')
        try:
            return int(args.run(args))
        except KeyboardInterrupt:
            return INTERRUPTED
        except Exception as error:
            if args.traceback:
                raise
            _complain(_describe(error))
            return FAILED


def make_parser() -> argparse.ArgumentParser:
    """The command line: a function per command, with its sentence and its example."""
    parser = Parser(
        prog='supertickets',
        description='Look at, check, share and export tickets: sparse vision models for timm.',
        epilog='supertickets COMMAND --help says more, with an example. The exit code is 2 after an error.',
    )
    parser.add_argument('--version', action='version', version=f'%(prog)s {version("timm_supertickets")}')
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], about: str, more: str, *examples: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=about,
            description=textwrap.fill(f'{about[0].upper()}{about[1:]}. {more}', 79),
            epilog='\n  '.join(['example:', *(f'supertickets {name} {example}' for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument('--traceback', action='store_true', help='on an error, show where it comes from')
        sub.set_defaults(run=run)
        return sub

    sub = command(
        'list', run_list, 'list the models of this package and the tickets below a folder',
        'Tickets are read, not verified: see verify.', 'output/mbv2_digits',
    )  # fmt: skip
    sub.add_argument(
        'folder', nargs='?', type=Path, help=f'where to look for tickets; by default {OUTPUT}, if it is there'
    )

    sub = command(
        'show', run_show, 'show what a ticket is, costs and scores, and a row per block',
        'Tickets of stock timm models have a row per layer. Bars show hidden channels by kernel size, and the share of '
        'weights that live; sparse MACs count those alone.',
        'output/mbv2_digits/superticket_mbv2_s90',
        'hf-hub:me/superticket_mbv2_s90.st_fmnist',
    )  # fmt: skip
    sub.add_argument('ticket', nargs='+', help=TICKET)

    sub = command(
        'verify', run_verify, 'check every byte of tickets against their hashes',
        'Prints a line per ticket that is whole; one that is not is an error that names the file and the tensor.',
        'output/mbv2_digits/superticket_mbv2_s*',
    )  # fmt: skip
    sub.add_argument('ticket', nargs='+', help=TICKET)

    sub = command(
        'card', run_card, "write a ticket's model card: README.md and its pictures",
        "The card is rendered from the ticket's facts; a YAML file adds to them or overrides them.",
        'output/mbv2_digits/superticket_mbv2_s90 --facts facts.yaml',
    )  # fmt: skip
    sub.add_argument('folder', type=Path, help="a ticket's folder")
    sub.add_argument('--facts', type=Path, metavar='FILE.yaml', help='more facts, by name')

    sub = command(
        'push', run_push, 'push a ticket to the Hugging Face Hub, in one commit',
        f'Running it again completes it or changes nothing. {LOGIN}',
        'output/mbv2_fmnist_64/superticket_mbv2_s90 me/superticket_mbv2_s90.st_fmnist --private',
    )  # fmt: skip
    sub.add_argument('folder', type=Path, help="a ticket's folder, or its .safetensors file")
    sub.add_argument('repo_id', help='OWNER/NAME; made if it is missing')
    sub.add_argument('--private', action='store_true', help='make a new repository private')
    sub.add_argument('--revision', metavar='BRANCH', help='the branch to push to; by default the main one')
    sub.add_argument('--message', default='Upload ticket', help='first line of the commit (default: %(default)s)')

    sub = command(
        'pull', run_pull, 'download a ticket from the Hugging Face Hub and verify every byte',
        f'The commit that it came from is kept in its facts. {LOGIN}',
        'me/superticket_mbv2_s90.st_fmnist --revision v1',
    )  # fmt: skip
    sub.add_argument('repo_id', help='OWNER/NAME')
    sub.add_argument('folder', nargs='?', type=Path, help='where to write it; by default NAME, in the current folder')
    sub.add_argument('--revision', help='branch, tag or commit; by default the main branch')

    sub = command(
        'export', run_export, 'export a ticket to ONNX or torch.export, zeros kept and scores compared',
        'What is written is read again first: every dead weight must still be zero, and the scores of random images '
        'must be those of the ticket to 1e-5 of the largest. ONNX needs the extra timm_supertickets[export].',
        'output/mbv2_digits/superticket_mbv2_s90 digits.onnx',
        'hf-hub:me/superticket_mbv2_s90.st_in1k photos.pt2 --img-size 256 --batch 1 --bake',
    )  # fmt: skip
    sub.add_argument('ticket', help=TICKET)
    sub.add_argument('file', type=Path, help='*.onnx or *.pt2')
    sub.add_argument('--img-size', type=int, metavar='N', help="height and width of images; by default the ticket's")
    sub.add_argument('--batch', type=int, metavar='N', help='a fixed number of images at once; by default any number')
    sub.add_argument(
        '--bake', action='store_true', help='fold batch norm and leave out what zeros made constant or unread: faster'
    )
    sub.add_argument('--force', action='store_true', help='replace FILE if it exists')

    sub = command(
        'bench', run_bench, 'measure how long an image takes on this machine, as it is and baked',
        'Ways to run the ticket take turns on the CPU, one image at a time; medians and their ratios are what to '
        'look at. onnxruntime is measured if timm_supertickets[export] is installed.',
        'superticket_mbv2_s90 --threads 1',
    )  # fmt: skip
    sub.add_argument('ticket', help=TICKET)
    sub.add_argument('--img-size', type=int, metavar='N', help="height and width of images; by default the ticket's")
    sub.add_argument('--threads', type=int, metavar='N', help="by default torch's choice")
    sub.add_argument('--repeats', type=int, metavar='N', default=50, help='turns of each (default: %(default)s)')
    sub.add_argument('--compile', action='store_true', help='torch.compile as well; needs a compiler, takes minutes')
    sub.add_argument('--against', metavar='MODEL', help='a model of timm as well, such as mobilenetv2_100')
    return parser


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and where to read on."""
        _complain(f'error: {message} (see {self.prog} --help)')
        self.exit(FAILED)


def run_list(args: argparse.Namespace) -> int:
    """The models, and the tickets below a folder."""
    console = show.make_console()
    show.show_models(console)
    root = args.folder or Path(OUTPUT)
    if args.folder is None and not root.is_dir():
        return 0
    found: list[Any] = []
    code = _each(args, show.find_folders(root), lambda folder: found.append(show.read_folder(folder)))
    console.print()
    if found:
        show.show_folders(console, found)
    else:
        console.print(f'no tickets below {root}')
    return code


def run_show(args: argparse.Namespace) -> int:
    """Tickets, one below the other."""
    console = show.make_console()

    def show_one(name: str) -> None:
        show.show_ticket(console, find_ticket(name), name, _packed_size(name))
        if len(args.ticket) > 1:
            console.print()

    return _each(args, args.ticket, show_one)


def run_verify(args: argparse.Namespace) -> int:
    """A line per ticket that is whole."""
    console = show.make_console()

    def verify(name: str) -> None:
        ticket = find_ticket(name) if name.startswith(HUB) else verify_ticket(name)
        text = f'{ticket.architecture}, {100 * ticket.sparsity:.2f} % sparse, {len(ticket.weights)} tensors'
        console.print(f'ok  {name}  {text}', soft_wrap=True)

    return _each(args, args.ticket, verify)


def run_card(args: argparse.Namespace) -> int:
    """README.md and pictures, in the ticket's folder."""
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder} is not a folder; a card is written into its ticket's")
    facts = card.read_facts(args.facts) if args.facts else None
    card.write_card(args.folder, load_ticket(args.folder), facts=facts)
    show.make_console().print(f'wrote {args.folder / card.CARD}', soft_wrap=True)
    return 0


def run_push(args: argparse.Namespace) -> int:
    """One commit."""
    url = hub.push_ticket(
        args.folder, args.repo_id, private=args.private, revision=args.revision, commit_message=args.message
    )
    show.make_console().print(f'pushed {args.folder}: {url}', soft_wrap=True)
    return 0


def run_pull(args: argparse.Namespace) -> int:
    """A folder that holds the ticket."""
    folder = args.folder or Path(args.repo_id.rpartition('/')[2])
    ticket = hub.pull_ticket(args.repo_id, revision=args.revision)
    ticket.save(folder)
    show.make_console().print(f'pulled {args.repo_id}@{ticket.facts[hub.PIN]["revision"]} to {folder}', soft_wrap=True)
    return 0


def run_export(args: argparse.Namespace) -> int:
    """A file that runs without this package."""
    done = export.export_ticket(
        find_ticket(args.ticket),
        args.file,
        img_size=args.img_size,
        batch=args.batch,
        bake=args.bake,
        force=args.force,
    )
    console = show.make_console()
    shape = ' x '.join(map(str, (done.batch or 'any', *done.input_size)))
    console.print(f'wrote {done.file}: {done.size:,} bytes, takes {shape}', soft_wrap=True)
    if args.bake:
        console.print(f'baked: {done.weights:,} prunable weights are left, {done.weights - done.dead:,} of them alive')
    console.print(f'zeros: all {done.dead:,} dead weights are zero in it')
    console.print(f'scores: off by {done.error:.1e} of the largest at most, on random images')
    return 0


def run_bench(args: argparse.Namespace) -> int:
    """A table."""
    timings = bench.bench_ticket(
        find_ticket(args.ticket),
        img_size=args.img_size,
        threads=args.threads,
        repeats=args.repeats,
        compiled=args.compile,
        against=args.against,
    )
    console = show.make_console()
    bench.show_timings(console, timings)
    if missing := export.missing_for_onnx():
        console.print(f'onnxruntime is not measured without {", ".join(missing)}: {export.INSTALL}')
    return 0


def _packed_size(name: str) -> int | None:
    if name.startswith(HUB):
        return None
    path = locate(name)
    file = path / PACKED if path.is_dir() else path
    return file.stat().st_size if file.name == PACKED and file.exists() else None


def _each(args: argparse.Namespace, items: Iterable[Any], run: Callable[[Any], None]) -> int:
    """Every item, whatever becomes of the others."""
    code = 0
    for item in items:
        try:
            run(item)
        except Exception as error:
            if args.traceback:
                raise
            _complain(_describe(error))
            code = FAILED
    return code


def _describe(error: Exception) -> str:
    if isinstance(error, (ValueError, OSError, ImportError)) and str(error):
        return f'error: {error}'
    return f'error: {type(error).__name__}: {error} (--traceback shows where)'


def _complain(message: str) -> None:
    """One line on stderr, without anything that a terminal would obey: files are quoted in it."""
    line = ''.join(char if char.isprintable() else '?' for char in ' '.join(message.split()))
    print(f'supertickets: {line}', file=sys.stderr)
