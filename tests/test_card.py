import copy
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from matplotlib import image
from PIL import Image

from timm_supertickets import Arch, Ticket, card
from timm_supertickets.pictures import KERNEL_COLORS, draw_density, draw_kernels
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import magnitude

ROOT = Path(__file__).parents[1]
RELEASED = sorted((ROOT / 'hub_cards').glob('superticket_*.yaml'))
MICRO = {
    'space': 'mbv2',
    'shape': {'stem': 8, 'stages': [[8, 1, 1], [8, 2, 2]], 'head': 16},
    'blocks': [{'3': 6, '7': 2}, {'3': 4, '5': 4}, {}],
}
SHOWN = {
    'about': 'A thing of the tests.',
    'good_for': ['counting'],
    'limits': ['nothing else'],
    'license': 'mit-0',
    'dataset': 'hfds/someone/pictures',
    'data': {'about': 'many of them', 'source': 'https://example.org/a_b?c=d', 'license': 'CC0'},
    'top1': 0.25,
    'n': 431,
    'runs': {'seeds': [3, 5], 'mean': 0.125, 'lowest': 0.0625, 'highest': 0.1875, 'about': 'On the moon.'},
    'supernet': 'supernet_mbv2_none',
    'seed': 987,
    'how': 'With a spoon.',
    'command': 'launch --now x=1',
    'hardware': 'an abacus',
    'versions': {'torch': '9.9'},
    'commit': 'abc1234',
    'repo_id': 'me/micro.st_none',
}


def draw(name, sparsity=0.5, facts=None, data_config=None, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    return Ticket.draw(model, prune(magnitude(model), sparsity), facts=facts, data_config=data_config)


@pytest.fixture(scope='module')
def micro():
    config = {'input_size': (3, 32, 32), 'label_names': ['a|b', '`', '# c']}
    return draw('superticket_mbv2', arch=MICRO, num_classes=3, data_config=config)


@pytest.fixture(scope='module')
def micro_facts(micro):
    return card.gather_facts(micro, 'micro', SHOWN)


def headings_without_content(text):
    """Headings that are followed by no line of text before the next one of their level."""
    body = re.sub(r'```.*?```', 'code', text.split('\n---\n', 1)[1], flags=re.DOTALL)
    return re.findall(r'^(#+ .*)\n+(?=## |\Z)', body, flags=re.MULTILINE)


def code_blocks(text):
    return re.findall(r'^```python\n(.*?)^```$', text, flags=re.DOTALL | re.MULTILINE)


def as_html(text):
    """The body as GitHub's flavour of Markdown reads it, by a parser that is not ours."""
    return MarkdownIt('commonmark').enable(['table', 'strikethrough']).render(text.split('\n---\n', 1)[1])


@pytest.mark.parametrize('path', RELEASED, ids=lambda path: path.stem)
def test_released_card_equals_what_its_facts_render_to(path):
    facts = card.read_facts(path)
    assert card.render(facts) == path.with_suffix('.md').read_text(encoding='utf-8')
    assert facts['name'] == path.stem
    for picture in facts['pictures'].values():
        assert f']({picture})' in card.render(facts)
        assert image.imread(ROOT / 'hub_cards' / picture).std() > 0.05


def test_there_is_a_released_card_of_every_yaml_and_no_other():
    assert RELEASED
    cards = {path.stem for path in (ROOT / 'hub_cards').glob('*.md')} - {'TEMPLATE', 'README'}
    assert cards == {path.stem for path in RELEASED}


def test_numbers_are_the_tickets(micro, micro_facts, tmp_path):
    folder = micro.save(tmp_path / 'micro', dense=True)
    text = card.render(micro_facts)
    weights = sum(alive.numel() for alive in micro.mask.values())
    dead = sum(int((micro.weights[name] == 0).sum()) for name in micro.mask)
    params = sum(param.numel() for param in micro.build().parameters())
    assert f'({dead:,} of {weights:,} are zero)' in text
    assert f'| {100 * dead / params:.2f} % ({dead:,} of {params:,}) |' in text
    for file in ('ticket.safetensors', 'model.safetensors'):
        assert f'(`{file}`) | {(folder / file).stat().st_size:,} |' in text
    # the stem at 16x16: 3x3x3x8; two blocks; the head at 8x8: 8x16; the classifier: 16x3
    stem, head, classifier = 256 * 216, 64 * 128, 48
    first = 256 * (8 * 8 + 6 * 9 + 2 * 49 + 8 * 8)
    second = 256 * 8 * 8 + 64 * (4 * 9 + 4 * 25 + 8 * 8)
    assert f'| MACs, dense | {stem + first + second + head + classifier:,} |' in text


def test_architecture_is_a_table_of_kernels_and_channels(micro, micro_facts):
    text = card.render(micro_facts)
    rows = [line for line in text.splitlines() if re.match(r'\| \d', line)]
    alive = [
        sum(int(a.sum()) for n, a in micro.mask.items() if n.startswith(block))
        / sum(a.numel() for n, a in micro.mask.items() if n.startswith(block))
        for block in ('blocks.0.0.', 'blocks.1.0.')
    ]
    assert rows == [
        f'| 0 | `blocks.0.0` | 6 | 0 | 2 | 8 | 96 | {alive[0]:.4f} |',
        f'| 1 | `blocks.1.0` | 4 | 4 | 0 | 8 | 96 | {alive[1]:.4f} |',
        '| 2 | dropped | 0 | 0 | 0 | 0 | 96 | |',
    ]


def test_metadata_is_what_the_hub_reads(micro_facts, tmp_path):
    (tmp_path / 'README.md').write_text(card.render(micro_facts), encoding='utf-8')
    data = ModelCard.load(tmp_path / 'README.md').data
    assert (data.library_name, data.license, data.pipeline_tag) == ('timm', 'mit-0', 'image-classification')
    assert {'superticket', 'sparsity'} <= set(data.tags)
    assert (data.datasets, data.metrics) == (['someone/pictures'], ['accuracy'])
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_args) == ('accuracy', 0.25, {'n': 431})
    assert (data.model_name, result.dataset_type) == ('micro', 'someone/pictures')


@pytest.mark.parametrize('key', card.SCORES)
def test_every_score_has_its_words_and_its_metadata(micro, tmp_path, key):
    words, metric, task = card.SCORES[key]
    facts = card.gather_facts(micro, 'x', {key: 0.125, 'dataset': 'scenes', 'n': 8})
    (tmp_path / 'README.md').write_text(card.render(facts), encoding='utf-8')
    assert f'| {words} on scenes, n = 8 | 0.1250 |' in card.render(facts)
    (result,) = ModelCard.load(tmp_path / 'README.md').data.eval_results
    assert (result.metric_type, result.metric_value, result.task_type) == (metric, 0.125, task)


@pytest.mark.parametrize('key', SHOWN)
def test_every_fact_is_shown_and_a_missing_one_has_no_line(micro_facts, key):
    values = {'top1': '0.2500', 'dataset': 'someone/pictures', 'repo_id': 'hf-hub:me/micro.st_none', 'runs': '3, 5'}
    value = SHOWN[key]
    if key in values:
        value = values[key]
    elif isinstance(value, dict):
        value = value.get('about') or next(iter(value.values()))
    elif isinstance(value, list):
        value = value[0]
    with_it = card.render(micro_facts)
    without = card.render({name: fact for name, fact in micro_facts.items() if name not in (key, *_needs(key))})
    assert str(value) in with_it
    assert str(value) not in without
    assert headings_without_content(without) == []
    assert not re.search(r'\bNone\b|\bn/a\b|\bnan\b|Undefined', without)


def _needs(key):
    return ['data'] if key == 'dataset' else []  # the rest of what is said of the data has no name then


def test_a_ticket_without_facts_claims_nothing(micro):
    text = card.render(card.gather_facts(micro, 'bare'))
    for word in ('top-1', 'Training data', 'command', 'seed', 'model-index', 'accuracy', '![', 'good for'):
        assert word not in text
    assert headings_without_content(text) == []
    assert 'local-dir:bare' in text


@pytest.mark.parametrize('dataset', ['digits', 'fashion_mnist'])
def test_a_ticket_of_a_known_dataset_says_what_it_is_not_good_for(micro, dataset):
    text = card.render(card.gather_facts(micro, 'micro', {'dataset': dataset}))
    limits = text.split('## Limits')[1]
    assert 'no general-purpose backbone' in limits
    assert {'digits': '8x8', 'fashion_mnist': '28x28 grey'}[dataset] in limits
    assert {'digits': 'data: CC BY 4.0', 'fashion_mnist': 'data: MIT'}[dataset] in text


CARDS = {
    'mbv2': ('supernet_mbv2_tiny', {'num_classes': 3}, (1, 3)),
    'one input channel': ('supernet_mbv2_tiny', {'num_classes': 3, 'in_chans': 1}, (1, 3)),
    'hr': ('supernet_hr_tiny', {}, (1, 10)),
    'hr, scores of pixels': ('supernet_hr_tiny', {'head': 'dense', 'num_classes': 4}, (1, 4, 8, 8)),
    'a stock model': ('test_resnet', {'num_classes': 7}, (1, 7)),
}


@pytest.mark.parametrize('case', CARDS)
def test_the_code_on_the_card_runs(tmp_path, monkeypatch, case):
    name, kwargs, shape = CARDS[case]
    config = {'mean': (0.5,), 'std': (0.5,)} if kwargs.get('in_chans') == 1 else None
    ticket = draw(name, data_config=config, **kwargs)
    folder = ticket.save(tmp_path / 'my ticket')
    card.write_card(folder, ticket)
    text = (folder / 'README.md').read_text(encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (40, 30), 'red').save('picture.png')
    results = []
    for block in code_blocks(text):
        results.append({})
        exec(block, results[-1])
    classify, features, finetune = results
    assert tuple(classify['scores'].shape)[:2] == shape[:2]
    assert classify['scores'].ndim == len(shape)
    assert torch.allclose(classify['scores'].sum(1), torch.ones(()))
    channels, reductions = re.search(r'of ([\d, ]+) channels at 1/([\d, /]+) of', text).groups()
    maps = features['backbone'](torch.zeros(1, ticket.pretrained_cfg['input_size'][0], 64, 64))
    assert ', '.join(str(m.size(1)) for m in maps) == channels
    assert ', 1/'.join(str(64 // m.size(2)) for m in maps) == reductions
    model, optimizer = finetune['model'], finetune['optimizer']
    model(torch.rand(2, ticket.pretrained_cfg['input_size'][0], 64, 64)).sum().backward()
    optimizer.step()
    assert finetune['kept'].mask.keys() == ticket.mask.keys()
    weights = dict(model.named_parameters())
    assert all(not weights[key][~alive].any() for key, alive in ticket.mask.items())
    if case == 'a stock model':
        assert 'timm_supertickets' not in classify
        assert '## Architecture' not in text
        assert (folder / 'model.safetensors').exists()


def test_a_card_in_a_folder_names_its_pictures_and_is_the_same_again(micro, tmp_path):
    folder = micro.save(tmp_path / 'micro')
    card.write_card(folder, micro, repo_id='me/named', facts={'n': 5})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    text = before['README.md'].decode()
    assert {'kernels.png', 'density.png'} <= before.keys()
    assert re.findall(r'!\[.*\]\((.*)\)', text) == ['kernels.png', 'density.png']
    assert '\n# named\n' in text
    assert text.count("'hf-hub:me/named'") == 2
    card.write_card(folder, micro, repo_id='me/named', facts={'n': 5})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    micro.save(folder)  # a card does not stand in a ticket's way


def test_without_matplotlib_a_card_has_no_pictures(micro, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.warns(UserWarning, match=r'without pictures: .*pip install "timm_supertickets\[card\]"'):
        card.write_card(micro.save(tmp_path / 'micro'), micro)
    assert '![' not in (tmp_path / 'micro/README.md').read_text(encoding='utf-8')
    with pytest.raises(ValueError, match='matplotlib, which is not installed'):
        draw_density(tmp_path / 'a.png', {'a': micro.mask})


def test_released_facts_hold_the_ticket_and_keep_what_was_said(micro, tmp_path):
    path = tmp_path / 'superticket_x.st_y.yaml'
    path.write_text(
        'limits: [only this]\nparams: 1\ndataset: digits\nfeatures: {channels: [1], reductions: [2]}\n',
        encoding='utf-8',
    )
    card.write_released(path, micro)
    facts, text = card.read_facts(path), path.with_suffix('.md').read_text(encoding='utf-8')
    assert card.render(facts) == text
    assert facts['limits'] == ['only this']
    assert facts['params'] == sum(param.numel() for param in micro.build().parameters())
    assert 'features' not in facts  # of another ticket: this one has too few levels
    assert 'data' not in facts  # DATA.yaml has it, once for all
    assert (tmp_path / 'superticket_x.st_y.kernels.png').exists()
    card.write_released(path, micro)
    assert (card.read_facts(path), path.with_suffix('.md').read_text(encoding='utf-8')) == (facts, text)


@pytest.mark.parametrize(
    ('facts', 'width', 'whole'),
    [
        ({'supernet': 'supernet_mbv2_tiny'}, 1.0, [192, 96, 192, 192, 192, 192, 288, 288, 384]),
        ({'supernet': 'supernet_mbv2_tiny(width=0.5)'}, 0.5, [96, 96, 96, 96, 96, 96, 192, 192, 192]),
        ({}, 1.0, [None] * 9),
    ],
)
def test_supernet_is_shown_if_the_ticket_comes_from_one(facts, width, whole):
    known = card.gather_facts(draw('supernet_mbv2_tiny', facts=facts, width=width), 'x')
    assert [block.get('supernet') for block in known['blocks']] == whole
    assert ('| supernet |' in card.render(known)) == bool(facts)


def test_tokens_are_counted_beside_their_block():
    ticket = draw('supernet_hr_tiny', num_classes=2, tokens=3)
    facts = card.gather_facts(ticket, 'x')
    row = facts['blocks'][0]
    assert (row['name'], row['tokens']) == ('stages.0.fuse.0.0.block', 3)
    masks = [
        alive
        for name, alive in ticket.mask.items()
        if name.startswith(('stages.0.fuse.0.0.block.', 'stages.0.fuse.0.0.tokens.'))
    ]
    assert row['density'] == round(torch.cat([alive.flatten() for alive in masks]).float().mean().item(), 4)
    assert '| `stages.0.fuse.0.0.block` | 32 | 32 | 32 | 96 | 3 |' in card.render(facts)


@pytest.mark.parametrize(
    ('facts', 'says'),
    [
        ({'limitz': ['x']}, r"unknown fact 'limitz'; the facts that can be given are: about, good_for, limits"),
        ({'top1': '0.9'}, r"fact 'top1' must be a number from 0 to 1, got '0.9'"),
        ({'top1': float('nan')}, r"fact 'top1' must be a number from 0 to 1, got nan"),
        ({'n': True}, r"fact 'n' must be a whole number from 0, got True"),
        ({'limits': 'a text'}, r"fact 'limits' must be a list of texts"),
        ({'about': '\u200b \n'}, r"fact 'about' must be a text"),
        ({'data': 'digits'}, r"fact 'data' must be a mapping of \{name: a text"),
        ({'data': {'source': 'javascript:alert(1)'}}, r"fact 'data' must be"),
        ({'data': {'source': 'https://a.b/> <b>'}}, r"fact 'data' must be"),
        ({'data': {'about': 'x'}}, r"TEMPLATE.md shows 'name', which the facts lack"),
        ({'repo_id': "me/x', pretrained=False)#"}, r"fact 'repo_id' must be 'owner/name'"),
        ({'runs': {'seeds': [0]}}, r"fact 'runs' must be a mapping of .* with seeds, mean, lowest, highest, got"),
    ],
)
def test_wrong_facts_are_named(micro, tmp_path, facts, says):
    with pytest.raises(ValueError, match=says) as error:
        card.write_card(micro.save(tmp_path / 'micro'), micro, facts=facts)
    assert '\n' not in str(error.value)


def test_wrong_facts_of_a_ticket_and_of_a_file_are_named(micro, micro_facts, tmp_path):
    wrong = copy.copy(micro)
    wrong.facts = {'top1': [1], 'anything else': [1]}
    with pytest.raises(ValueError, match="fact 'top1' must be a number"):
        card.gather_facts(wrong, 'x')
    with pytest.raises(ValueError, match="lack 'params'"):
        card.render({key: fact for key, fact in micro_facts.items() if key != 'params'})
    with pytest.raises(ValueError, match=r"'pictures' must be .*png"):
        card.render({**micro_facts, 'pictures': {'kernels': '../x.png'}})
    for text, says in (('- a', 'must be a mapping'), ('a: [', 'cannot be read'), (None, 'cannot be read')):
        path = tmp_path / 'facts.yaml'
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(ValueError, match=says) as error:
            card.read_facts(path)
        assert '\n' not in str(error.value)


HOSTILE = [
    '---\nlicense: other\n---\n',
    '{{ 7 * 7 }} {% raw %}',
    '| a | b |\n| --- | --- |',
    '<script>alert(1)</script> <!-- ',
    '[x](javascript:alert(1)) ![y](z)',
    '```\nrm -rf\n```',
    '``` `` `',
    '# heading',
    '1. first',
    '- item',
    '=====',
    '    indented',
    '*a* _b_ __c__ ~~d~~ snake_case_ _x',
    '&lt;b&gt; &amp; \\| \\',
    '{a: b, "c": [d}',
    "!!python/object/apply:os.system ['true']",
    '* *x* $$y$$ \x00\x85\u2028\u202e',
    "it's: a # comment",
]
# where a fact stands, and how the card holds it: as text, or in a code span
PLACES = ['about', 'how', 'hardware', 'license', 'command', 'commit', 'good_for', 'limits', 'dataset', 'label_names']


def check_that_it_is_text(facts, place, hostile):
    """The card with this fact is the card with a harmless one, but for the text itself."""

    def card_with(text):
        value = [text] if isinstance(facts[place], list) else text
        rest = {key: fact for key, fact in facts.items() if key != 'data' or place != 'dataset'}
        return card.render({**rest, place: value})

    def replaced(value):
        if isinstance(value, dict):
            return {key: replaced(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [replaced(entry) for entry in value]
        return value.replace('harmlessword', line) if isinstance(value, str) else value

    plain, bad = card_with('harmlessword'), card_with(hostile)
    line = ' '.join(''.join(char if char.isprintable() else ' ' for char in hostile).split())
    assert as_html(bad) == as_html(plain).replace('harmlessword', escapeHtml(line))
    metadata = [yaml.safe_load(text.split('\n---\n')[0].removeprefix('---\n')) for text in (plain, bad)]
    assert metadata[1] == replaced(metadata[0])


@pytest.mark.parametrize('place', PLACES)
def test_hostile_facts_are_text(micro_facts, place):
    for hostile in HOSTILE:
        check_that_it_is_text(micro_facts, place, hostile)


@settings(max_examples=100, deadline=None)
@given(place=st.sampled_from(PLACES), hostile=st.text(st.characters(codec='utf-8'), min_size=1).filter(card.TEXT.fits))
def test_any_fact_is_text(micro_facts, place, hostile):
    check_that_it_is_text(micro_facts, place, hostile)


def test_a_hostile_name_breaks_neither_code_nor_headings(micro_facts):
    for name in ("x', pretrained=False) or print('", '```', "a\nb'''", '{{ 1 }} | --- |'):
        text = card.render({key: fact for key, fact in {**micro_facts, 'name': name}.items() if key != 'repo_id'})
        assert len(code_blocks(text)) == 2
        for block in code_blocks(text):
            assert block.count(repr('local-dir:' + name)) == 1
            compile(block, 'card', 'exec')
        assert as_html(text).count('<h1>') == 1
        assert as_html(text).count('<table>') == 2


def colors(path):
    pixels = (image.imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    packed = pixels @ [65536, 256, 1]
    return {kernel: int((packed == int(color[1:], 16)).sum()) for kernel, color in KERNEL_COLORS.items()}


def test_kernels_are_drawn_by_their_share(tmp_path):
    arch = Arch('mbv2', {'stem': 1}, [{3: 30, 5: 10}, {3: 20, 5: 20}])
    draw_kernels(tmp_path / 'a.png', {'a $\\broken{$': arch})
    found = colors(tmp_path / 'a.png')
    legend = found[7]  # in the bars there is none
    assert (found[3] - legend) / (found[5] - legend) == pytest.approx(50 / 30, rel=0.05)
    draw_kernels(tmp_path / 'b.png', {'a': arch}, Arch('mbv2', {'stem': 1}, [{3: 80}, {3: 80}]))
    assert colors(tmp_path / 'b.png')[3] < 0.7 * found[3]  # the outline makes the axis twice as high
