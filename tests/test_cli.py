import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torch

from timm_supertickets import Mask, Ticket, bench, cli, export, hub, load_ticket, prunable, show
from timm_supertickets.models.hr import block_places

ROOT = Path(__file__).parents[1]
# 32x32 images: the stem and block 0 work on 16x16, block 1 halves that, block 2 is gone
ARCH = {
    'space': 'mbv2',
    'shape': {'stem': 8, 'stages': [[8, 1, 1], [8, 2, 2]], 'head': 16},
    'blocks': [{'3': 6, '7': 2}, {'3': 4, '5': 4}, {}],
}
FACTS = {
    'command': 'train.py seed=3',
    'top1': 0.75,
    'n': 599,
    'dataset': 'digits',
    'seed': 3,
    'versions': {'a': '1', 'b': '2'},
}


def draw(facts=FACTS, arch=ARCH):
    """82 dead weights: half of block 0's expansion, half of block 1's 5x5 kernels."""
    torch.manual_seed(0)
    model = timm.create_model('superticket_mbv2', arch=arch, num_classes=3)
    mask = Mask.dense(prunable(model))
    mask['blocks.0.0.conv_pw.weight'][:4] = False
    mask['blocks.1.0.conv_dw.k5.weight'].flatten()[::2] = False
    return Ticket.draw(model, mask, facts=facts, data_config={'input_size': (3, 32, 32)})


@pytest.fixture(autouse=True)
def width(monkeypatch):
    for name in ('COLUMNS', 'FORCE_COLOR', 'NO_COLOR', 'TTY_COMPATIBLE'):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    return draw().save(tmp_path_factory.mktemp('saved') / 'ticket')


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / 'runs' / 'mine'))


@pytest.fixture(scope='module')
def stock():
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=4)
    mask = Mask.dense(prunable(model))
    name = next(iter(mask))
    mask[name].flatten()[:3] = False
    return Ticket.draw(model, mask), name


def run(capsys, *argv):
    code = cli.main([str(arg) for arg in argv])
    return code, *capsys.readouterr()


def refused(capsys, *argv):
    """The one line that an error is."""
    try:
        code = cli.main([str(arg) for arg in argv])
    except SystemExit as error:  # argparse leaves this way
        code = error.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ''
    assert err.startswith('supertickets: error: ')
    assert err.count('\n') == 1
    return err


def damage(folder, name='ticket.safetensors'):
    """Turn one bit of the last byte."""
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)


def cells(out):
    """Lines of a table as lists, without the bars."""
    drawn = {*show.SHADES.values(), *show.EIGHTHS.strip(), '█'}
    return [[word for word in line.split() if not {*word} <= drawn] for line in out.splitlines()]


def test_show_by_hand(capsys, folder):
    code, out, err = run(capsys, 'show', folder)
    assert (code, err) == (0, '')
    lines = cells(out)
    assert lines[0] == ['superticket_mbv2', str(folder)]
    # stem 216 + 16, block 0 64 + 54 + 98 + 64 + 48, block 1 64 + 36 + 100 + 64 + 48, head 128 + 32, classifier 51
    assert ' '.join(lines[1]) == 'parameters 1,083, of them 672 prunable weights'
    # 82 of 672, 82 of 1083
    assert ' '.join(lines[2]) == 'sparsity 12.20 % over prunable weights, 7.57 % over all of them'
    assert ' '.join(lines[3]) == 'MACs 164,400 dense, 153,008 sparse, at 3 x 32 x 32'
    packed = (folder / 'ticket.safetensors').stat().st_size
    assert lines[4][:3] == ['bytes', f'{packed:,}', 'packed,']
    assert lines[5:10] == [
        ['dataset', 'digits'],
        ['top-1', '0.75', '(n', '=', '599)'],
        ['seed', '3'],
        ['command', 'train.py', 'seed=3'],
        ['versions', 'a', '1,', 'b', '2'],
    ]
    table = lines[11:]
    assert [words[0] for words in table] == ['block', 'blocks.0.0', 'blocks.1.0', 'block', 'other', 'total']
    assert table[0][1:4] == ['3x3', '5x5', '7x7']
    assert table[0][-3:] == ['alive', 'kMACs', 'sparse']
    # block 0: 280 weights of which 32 are dead, each used at 256 places
    assert table[1][1:] == ['6', '-', '2', '88.57', '%', '71.7', '63.5']
    # block 1: 64 at 256 places, 136 and 64 at 64 places, of the 136 are 50 dead
    assert table[2][1:] == ['4', '4', '-', '81.06', '%', '29.2', '26.0']
    assert table[3][:3] == ['block', '2,', 'dropped']
    assert table[3][-3:] == ['-', '0.0', '0.0']
    # stem 216 at 256, head 128 at 64, classifier 48: 63,536
    assert table[4][-4:] == ['100.00', '%', '63.5', '63.5']
    assert table[5][1:] == ['10', '4', '2', '87.80', '%', '164.4', '153.0']


def test_bars_by_hand(capsys, folder, monkeypatch):
    monkeypatch.setenv('COLUMNS', '120')
    _, out, _ = run(capsys, 'show', folder)
    first, second, last = (
        next(line for line in out.splitlines() if line.startswith(name)) for name in ('blocks.0', 'blocks.1', 'total')
    )
    # 24 characters for the 8 channels of the largest block, 12 for a density of 1
    assert '█' * 18 + '░' * 6 + '   88.57 %  ' + '█' * 10 + '▋' in first  # 10.63 = 10 + 5/8
    assert '█' * 12 + '▓' * 12 + '   81.06 %  ' + '█' * 9 + '▊' in second  # 9.73 = 9 + 6/8
    assert '█' not in last


@pytest.fixture(scope='module')
def branches(tmp_path_factory):
    """The names of its blocks are long, and tokens stand beside them."""
    torch.manual_seed(0)
    model = timm.create_model('supernet_hr_tiny', num_classes=2, tokens=4)
    folder = Ticket.draw(model, Mask.dense(prunable(model))).save(tmp_path_factory.mktemp('branches') / 't')
    return folder, [place.path for place in block_places(model.arch)]


@pytest.mark.parametrize('columns', [50, 80, 120])
def test_no_name_is_cut_and_no_line_too_long(capsys, branches, monkeypatch, columns):
    folder, names = branches
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv('COLUMNS', str(columns))
    code, out, _ = run(capsys, 'show', folder.name)
    assert code == 0
    assert max(map(len, out.splitlines())) <= max(80, columns)
    assert '…' not in out
    assert {*names} <= {line.split()[0] for line in out.splitlines() if line}
    assert '█' in out


def test_tokens_have_a_column(capsys, branches):
    folder, names = branches
    _, out, _ = run(capsys, 'show', folder)
    rows = {words[0]: words[1:] for words in cells(out) if words}
    assert rows['block'][3] == 'tokens'
    assert {name: rows[name][3] for name in names} == dict.fromkeys(names, '4')
    assert rows['total'][3] == str(4 * len(names))


def test_a_pipe_gets_whole_lines_without_colour_and_a_terminal_colour(capsys, tmp_path, monkeypatch):
    command = 'python ' + 'x=1 ' * 60
    folder = draw({'command': command}).save(tmp_path / 't')
    _, out, _ = run(capsys, 'show', folder)
    assert command.strip() in out
    assert '\x1b' not in out
    monkeypatch.setenv('FORCE_COLOR', '1')
    _, out, _ = run(capsys, 'show', folder)
    assert '\x1b[' in out


def test_a_stdout_without_block_characters(folder, monkeypatch):
    monkeypatch.setenv('COLUMNS', '120')
    raw = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(raw, encoding='ascii'))
    assert cli.main(['show', str(folder)]) == 0
    sys.stdout.flush()
    assert b'#' * 18 + b'-' * 6 + b'   88.57 %  ' + b'#' * 11 in raw.getvalue()


def test_show_of_a_stock_model_has_a_row_per_layer(capsys, tmp_path, stock):
    ticket, name = stock
    code, out, _ = run(capsys, 'show', ticket.save(tmp_path / 't'))
    assert code == 0
    rows = {words[0]: words[1:] for words in cells(out) if words}
    total = ticket.weights[name].numel()
    assert rows[name.removesuffix('.weight')][:3] == [f'{total:,}', f'{100 * (total - 3) / total:.2f}', '%']
    assert rows['fc'][:2] == ['-', '-']  # the classifier is no prunable weight
    layers = {entry.removesuffix('.weight') for entry, tensor in ticket.weights.items() if tensor.ndim > 1}
    assert layers <= rows.keys()


def test_show_of_the_dense_file_alone_counts_what_packing_would_take(capsys, tmp_path):
    folder = draw().save(tmp_path / 't', dense=True)
    packed = (folder / 'ticket.safetensors').stat().st_size
    _, out, _ = run(capsys, 'show', folder / 'model.safetensors')
    assert f'{packed:,} packed' in out


def test_nothing_in_a_file_reaches_the_terminal(capsys, tmp_path):
    facts = {
        '\x1b]0;x\x07': 'a',
        'dataset': '\x1b[31mred\nline [bold]',
        'sparsity': 'mine',
        'nested': {'\x1b': ['\x9b1m', None]},
    }
    folder = draw(facts).save(tmp_path / 't')
    _, out, _ = run(capsys, 'show', folder)
    assert not {'\x1b', '\x07', '\x9b'} & {*out}
    assert 'dataset     ?[31mred line [bold]' in out
    assert '12.20 % over prunable' in out  # what is measured is not replaced by what is said
    _, out, _ = run(capsys, 'list', tmp_path)
    assert '\x1b' not in out


def test_show_goes_on_after_a_broken_one(capsys, folder, tmp_path):
    code = cli.main(['show', str(tmp_path / 'gone'), str(folder)])
    out, err = capsys.readouterr()
    assert code == 2
    assert out.startswith('superticket_mbv2')
    assert err.startswith(f'supertickets: error: {tmp_path / "gone"} does not exist; ')
    assert err.count('\n') == 1


@pytest.fixture
def shelf(folder, tmp_path):
    """Beside a whole ticket: a dense one, odd values, half-written, cut, one file lost, and what is none of ours."""
    (tmp_path / 'half').mkdir()
    (tmp_path / 'half' / '.ticket.safetensors.tmp').write_bytes(b'')
    for name in ('cut', 'lost', 'odd', '.hidden'):
        shutil.copytree(folder, tmp_path / name)
    data = (folder / 'ticket.safetensors').read_bytes()
    (tmp_path / 'cut' / 'ticket.safetensors').write_bytes(data[:-5])
    (tmp_path / 'lost' / 'ticket.safetensors').unlink()
    odd = {'supertickets': {'sparsity': 10**400, 'facts': {'top1': 'best'}}}
    (tmp_path / 'odd' / 'config.json').write_text(json.dumps(odd))
    draw({}).save(tmp_path / 'dense', dense=True)
    (tmp_path / 'dense' / 'ticket.safetensors').unlink()
    for name, text in (('other', '{"architecture": "resnet18"}'), ('broken', '{')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(text)
    return tmp_path


def test_list_goes_on_after_broken_tickets(capsys, shelf, folder):
    code = cli.main(['list', str(shelf)])
    out, err = capsys.readouterr()
    assert code == 2
    size = f'{(folder / "ticket.safetensors").stat().st_size:,}'
    dense = f'{(shelf / "dense" / "model.safetensors").stat().st_size:,}'
    assert [line.split() for line in out.partition('\n\n')[2].splitlines()] == [
        ['ticket', 'sparsity', 'score', 'bytes'],
        [str(shelf / 'dense'), '12.20', '%', '-', dense],
        [str(shelf / 'odd'), '-', '-', size],
        [str(folder), '12.20', '%', '0.7500', 'top-1', size],
    ]
    cut, half, lost = err.splitlines()
    assert cut.startswith(
        f'supertickets: error: {shelf / "cut" / "ticket.safetensors"} is not a whole safetensors file'
    )
    assert half == f'supertickets: error: {shelf / "half" / "config.json"} is missing'
    assert lost == f'supertickets: error: {shelf / "lost" / "ticket.safetensors"} is missing'


def test_list_names_our_models_and_their_weights(capsys, tmp_path, monkeypatch):
    tags = ['resnet18.a1_in1k', 'superticket_mbv2.x', 'superticket_mbv2.y']
    monkeypatch.setattr(timm, 'list_pretrained', lambda: tags)
    _, out, _ = run(capsys, 'list', tmp_path)
    rows = dict(line.split(maxsplit=1) for line in out.partition('\n\n')[0].splitlines())
    assert rows.pop('model') == 'pretrained weights'
    assert rows.pop('superticket_mbv2') == 'x, y'
    supernets = ('supernet_mbv2', 'supernet_mbv2_small', 'supernet_mbv2_tiny')
    spaces = ('supernet_hr', 'supernet_hr_tiny', 'superticket_hr', *supernets)
    found = [f'superticket_{space}_s{sparsity}' for space in ('hr', 'mbv2') for sparsity in (50, 80, 90)]
    assert rows == dict.fromkeys((*spaces, *found), '-')


def test_list_without_a_folder_looks_in_output(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, 'list')
    assert code == 0
    assert 'ticket' not in out.replace('superticket_', '')
    folder.parent.rename('output')
    _, out, _ = run(capsys, 'list')
    assert 'output/mine ' in out
    (tmp_path / 'empty').mkdir()
    code, out, _ = run(capsys, 'list', 'empty')
    assert code == 0
    assert out.endswith('no tickets below empty\n')


def test_verify_says_a_line_per_ticket(capsys, folder, tmp_path):
    bad = Path(shutil.copytree(folder, tmp_path / 'bad'))
    damage(bad)
    tensors = len(load_ticket(folder).weights)
    code = cli.main(['verify', str(folder), str(bad), str(folder / 'ticket.safetensors')])
    out, err = capsys.readouterr()
    assert code == 2
    text = f'superticket_mbv2, 12.20 % sparse, {tensors} tensors'
    assert out.splitlines() == [f'ok  {folder}  {text}', f'ok  {folder / "ticket.safetensors"}  {text}']
    assert err.count('\n') == 1
    assert err.startswith(f'supertickets: error: {bad / "ticket.safetensors"}: ')
    assert "'" in err  # the tensor
    assert run(capsys, 'verify', folder)[0] == 0


def test_verify_reads_the_dense_file_as_well(capsys, tmp_path):
    folder = draw().save(tmp_path / 't', dense=True)
    damage(folder, 'model.safetensors')
    assert run(capsys, 'show', folder)[0] == 0
    assert str(folder / 'model.safetensors') in refused(capsys, 'verify', folder)


def test_card_is_written_with_facts_from_a_file(capsys, folder, tmp_path):
    (tmp_path / 'facts.yaml').write_text('about: A ticket made of two dead halves.\n')
    code, out, _ = run(capsys, 'card', folder, '--facts', tmp_path / 'facts.yaml')
    assert code == 0
    assert out == f'wrote {folder / "README.md"}\n'
    assert 'A ticket made of two dead halves.' in (folder / 'README.md').read_text()


def test_push_and_pull_pass_on_what_they_are_told(capsys, folder, tmp_path, monkeypatch):
    calls = []
    ticket = draw({hub.PIN: {'repo_id': 'me/mine', 'revision': 'abc'}})
    monkeypatch.setattr(
        hub, 'push_ticket', lambda *args, **kwargs: calls.append((args, kwargs)) or 'https://hub/commit'
    )
    monkeypatch.setattr(hub, 'pull_ticket', lambda *args, **kwargs: calls.append((args, kwargs)) or ticket)
    monkeypatch.chdir(tmp_path)
    _, out, _ = run(capsys, 'push', folder, 'me/mine', '--private', '--revision', 'v1', '--message', 'first')
    assert out == f'pushed {folder}: https://hub/commit\n'
    _, out, _ = run(capsys, 'pull', 'me/mine', '--revision', 'v1')
    assert out == 'pulled me/mine@abc to mine\n'
    assert torch.equal(load_ticket('mine').weights['conv_stem.weight'], ticket.weights['conv_stem.weight'])
    run(capsys, 'pull', 'me/mine', 'there')
    assert load_ticket('there').facts == ticket.facts
    assert run(capsys, 'show', 'hf-hub:me/mine@v2')[1].startswith('superticket_mbv2  hf-hub:me/mine@v2\n')
    assert calls == [
        ((folder, 'me/mine'), {'private': True, 'revision': 'v1', 'commit_message': 'first'}),
        (('me/mine',), {'revision': 'v1'}),
        (('me/mine',), {'revision': None}),
        (('me/mine',), {'revision': 'v2'}),
    ]


def test_export_says_what_it_wrote(capsys, folder, tmp_path):
    code, out, _ = run(capsys, 'export', folder, tmp_path / 'x.pt2', '--batch', '2')
    wrote, zeros, scores = out.splitlines()
    size = f'{(tmp_path / "x.pt2").stat().st_size:,}'
    assert (code, wrote) == (0, f'wrote {tmp_path / "x.pt2"}: {size} bytes, takes 2 x 3 x 32 x 32')
    assert zeros == 'zeros: all 82 dead weights are zero in it'
    assert scores == 'scores: off by 0.0e+00 of the largest at most, on random images'
    # block 0's four channels with a dead expansion are the constant 0, and go; the dead taps in block 1 stay
    code, out, _ = run(capsys, 'export', folder, tmp_path / 'baked.pt2', '--bake')
    wrote, baked, zeros, _ = out.splitlines()
    assert (code, wrote[:5]) == (0, 'wrote')
    left = 672 - 4 * (8 + 9 + 8)
    assert baked == f'baked: {left} prunable weights are left, {left - 50} of them alive'
    assert zeros == 'zeros: all 50 dead weights are zero in it'


def test_bench_prints_a_table_and_what_is_missing(capsys, folder, monkeypatch):
    calls = []

    def measured(*_, **options):
        calls.append(options)
        return [bench.Timing('torch', 10**6, [0.001, 0.003], [1.0, 1.0])]

    monkeypatch.setattr(bench, 'bench_ticket', measured)
    monkeypatch.setattr(export, 'missing_for_onnx', lambda: ['onnxruntime'])
    code, out, _ = run(capsys, 'bench', folder, '--img-size', '64', '--threads', '2', '--repeats', '2', '--compile')
    assert code == 0
    assert out.splitlines()[1].split() == ['torch', '2.00', '1.50', 'to', '2.50', '1.00', '1.00']
    assert out.splitlines()[2] == (
        "onnxruntime is not measured without onnxruntime: pip install 'timm_supertickets[export]'"
    )
    run(capsys, 'bench', folder, '--against', 'mobilenetv2_100')
    assert calls == [
        {'img_size': 64, 'threads': 2, 'repeats': 2, 'compiled': True, 'against': None},
        {'img_size': None, 'threads': None, 'repeats': 50, 'compiled': False, 'against': 'mobilenetv2_100'},
    ]


@pytest.mark.parametrize(
    ('argv', 'expected'),
    [
        (['show', 'gone'], 'gone does not exist; a ticket is a folder'),
        (['verify', 'empty'], 'config.json is missing'),
        (['show', 'other'], 'it has no "supertickets" section'),
        (['show', 'notes.txt'], 'notes.txt is not a whole safetensors file'),
        (['verify', 'bad'], 'ticket.safetensors: '),
        (['push', 'bad', 'me/bad'], 'ticket.safetensors: '),
        (['push', 'gone', 'me/bad'], 'gone does not exist'),
        (['pull', 'a/b/c'], "'a/b/c'"),
        (['show', 'hf-hub:a/b/c@main'], "'a/b/c'"),
        (['card', 'gone'], 'gone is not a folder'),
        (['card', 'mine', '--facts', 'gone.yaml'], 'gone.yaml'),
        (['card', 'mine', '--facts', 'odd.yaml'], "unknown fact 'colour'"),
        (['export', 'mine', 'x.tflite'], 'x.tflite: the suffix names the format, choose from .onnx, .pt2'),
        (['export', 'gone', 'x.pt2'], 'gone does not exist'),
        (['export', 'mine', 'x.pt2', '--batch', '0'], 'batch must be at least 1, got 0'),
        (['export', 'mine', 'x.pt2', '--batch', 'two'], "argument --batch: invalid int value: 'two'"),
        (['bench', 'gone'], 'gone does not exist'),
        (['bench', 'mine', '--repeats', '1'], 'repeats must be at least 2, got 1'),
        (['bench', 'mine', '--threads', '0'], 'threads must be at least 1, got 0'),
        (['bench', 'mine', '--img-size', '-8'], 'img_size must be at least 1, got -8'),
        (['train'], "invalid choice: 'train'"),
        ([], 'the following arguments are required: COMMAND (see supertickets --help)'),
        (['show'], 'the following arguments are required: ticket (see supertickets show --help)'),
        (['push', 'mine', 'me/mine', '--token', 'hf_x'], 'unrecognized arguments: --token hf_x'),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_code_2(capsys, folder, monkeypatch, argv, expected):
    monkeypatch.chdir(folder.parent)
    damage(Path(shutil.copytree('mine', 'bad')))
    Path('empty').mkdir()
    Path('other').mkdir()
    Path('other/config.json').write_text('{}')
    shutil.copy('mine/ticket.safetensors', 'other')
    Path('notes.txt').write_text('hello')
    Path('odd.yaml').write_text('colour: red\n')
    assert expected in refused(capsys, *argv)


def test_list_of_a_missing_folder(capsys, tmp_path):
    code = cli.main(['list', str(tmp_path / 'gone')])
    assert (code, capsys.readouterr().err) == (2, f'supertickets: error: {tmp_path / "gone"} is not a folder\n')


def test_pull_leaves_a_folder_alone_that_holds_something_else(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, 'pull_ticket', lambda *_, **__: draw())
    (tmp_path / 'notes.txt').write_text('mine')
    assert 'holds something that is not a ticket' in refused(capsys, 'pull', 'me/mine', tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['notes.txt']


def test_a_traceback_is_shown_when_asked_for(tmp_path):
    for command in ('show', 'card'):
        with pytest.raises(ValueError, match='gone'):
            cli.main([command, str(tmp_path / 'gone'), '--traceback'])


def test_an_error_nobody_foresaw_is_named(capsys, folder, monkeypatch):
    def broken(name):
        raise KeyError(f'\x1b[31m{name}\n')

    monkeypatch.setattr(cli, 'find_ticket', broken)
    err = refused(capsys, 'export', folder, folder / 'x.pt2')
    assert 'KeyError: ' in err
    assert '(--traceback shows where)' in err
    assert '\x1b' not in err


def test_a_warning_is_one_line(capsys, folder, monkeypatch):
    def noisy(*_, **__):
        warnings.warn('nothing to commit', stacklevel=1)
        return 'url'

    monkeypatch.setattr(hub, 'push_ticket', noisy)
    monkeypatch.setattr('warnings.filters', [])
    code, out, err = run(capsys, 'push', folder, 'me/mine')
    assert (code, out) == (0, f'pushed {folder}: url\n')
    assert err == 'supertickets: warning: nothing to commit\n'


def test_ctrl_c_is_quiet(capsys, folder, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, 'find_ticket', interrupted)
    assert run(capsys, 'show', folder) == (130, '', '')


def test_every_command_has_a_sentence_and_an_example_that_parses(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(['--help'])
    assert done.value.code == 0
    listed = capsys.readouterr().out
    for name in ('list', 'show', 'verify', 'card', 'push', 'pull', 'export', 'bench'):
        assert f'\n    {name} ' in listed
        with pytest.raises(SystemExit):
            cli.main([name, '--help'])
        text = capsys.readouterr().out
        assert max(map(len, text.partition('example:')[0].splitlines())) <= 80
        examples = [line.split()[1:] for line in text.partition('example:\n')[2].splitlines()]
        assert examples
        for example in examples:
            assert example[0] == name
            assert cli.make_parser().parse_args(example).run.__name__ == f'run_{name}'
        assert ('HF_TOKEN' in text) == (name in ('push', 'pull'))


@pytest.fixture(scope='module')
def script(tmp_path_factory):
    """The console script as pip installs it, and the environment to run it in."""
    source, site = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('site')
    for name in ('timm_supertickets', 'hub_cards'):
        shutil.copytree(ROOT / name, source / name)
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    pip = [
        sys.executable,
        '-m',
        'pip',
        'install',
        '--quiet',
        '--no-deps',
        '--no-build-isolation',
        '--target',
        site,
        source,
    ]
    subprocess.run(pip, check=True, capture_output=True)
    return site / 'bin' / 'supertickets', {**os.environ, 'PYTHONPATH': str(site)}


def test_the_installed_command_helps(script, tmp_path):
    command, env = script
    for flag, expected in (
        ('--help', 'usage: supertickets '),
        ('--version', f'supertickets {version("timm_supertickets")}\n'),
    ):
        done = subprocess.run([command, flag], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(expected)
        assert done.stderr == ''


def test_the_installed_command_verifies(script, folder, tmp_path):
    command, env = script
    bad = Path(shutil.copytree(folder, tmp_path / 'bad'))
    damage(bad)
    done = subprocess.run([command, 'verify', folder, bad], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.startswith(f'ok  {folder}  superticket_mbv2, 12.20 % sparse')
    assert done.stdout.count('\n') == 1
    assert done.stderr.startswith(f'supertickets: error: {bad}')
    assert done.stderr.count('\n') == 1
