import re

import evaluate
import pytest
import release
import timm
import torch
import train
import yaml

from timm_supertickets import Ticket, load_ticket, verify_ticket
from timm_supertickets.card import read_facts

FEW = [
    'model=supernet_mbv2_tiny', 'model_args={width: 0.5}', 'rounds=2', 'round_steps=8', 'cooldown_steps=8',
    'recalibrate=2', 'batch_size=32', 'targets=[0.5,0.8]', 'threads=1',
]  # fmt: skip
DENSE = [*FEW, 'model=test_resnet', 'model_args={}', 'targets=[0]']


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    """A run and a dense reference, released into folders of the test's own."""
    root = tmp_path_factory.mktemp('released')
    train.main([*FEW, f'output={root / "run"}'])
    train.main([*DENSE, f'output={root / "dense"}'])
    cards = root / 'cards'
    cards.mkdir()
    (cards / 'superticket_mbv2_s50.st_few.yaml').write_text('about: A word of a person.\ntop1: 0.5\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(release, 'TICKETS', root / 'tickets')
        patch.setattr(release, 'CARDS', cards)
        said = ['tag=st_few', 'hardware=an abacus', 'commit=abc1234']
        release.main([f'runs=[{root / "run"}]', f'references=[{root / "dense"}]', *said])
    return root


def test_a_released_ticket_is_the_drawn_one_with_halved_values(released):
    for name in ('superticket_mbv2_s50', 'superticket_mbv2_s80'):
        drawn, shipped = load_ticket(released / 'run' / name), verify_ticket(released / 'tickets' / f'{name}.st_few')
        assert shipped.arch == drawn.arch
        assert all(shipped.mask[key].equal(alive) for key, alive in drawn.mask.items())
        for key, tensor in drawn.weights.items():
            wanted = tensor.to(torch.float16) if tensor.dtype == torch.float32 else tensor
            assert shipped.weights[key].dtype == wanted.dtype
            assert torch.equal(shipped.weights[key], wanted)


def test_its_card_gives_the_score_of_the_halved_values(released, capsys):
    facts = read_facts(released / 'cards/superticket_mbv2_s50.st_few.yaml')
    evaluate.main([f'ticket={released / "tickets/superticket_mbv2_s50.st_few"}', 'threads=1'])
    out = capsys.readouterr().out
    assert f': top-1 {facts["top1"]:.4f}, n = 599; 50.00 % sparse' in out
    assert facts['about'] == 'A word of a person.'
    assert (facts['supernet'], facts['commit']) == ('supernet_mbv2_tiny(width=0.5)', 'abc1234')
    card = (released / 'cards/superticket_mbv2_s50.st_few.md').read_text()
    assert card.count("timm.create_model('superticket_mbv2_s50.st_few', pretrained=True") == 3
    assert 'local-dir' not in card


def test_a_ticket_without_a_classifier_is_not_scored(tmp_path):
    net = timm.create_model('supernet_mbv2_tiny', num_classes=0, width=0.5)
    about = {'input_size': (3, 32, 32), 'label_names': [str(digit) for digit in range(10)]}
    Ticket.draw(net, {}, data_config=about).save(tmp_path / 'ticket')
    with pytest.raises(ValueError, match="dataset 'digits' has 10 classes, the ticket knows 0"):
        evaluate.main([f'ticket={tmp_path / "ticket"}', 'threads=1'])


def test_evaluated_as_drawn_it_scores_what_the_run_said(released, capsys):
    ticket = load_ticket(released / 'run/superticket_mbv2_s80')
    evaluate.main([f'ticket={released / "run/superticket_mbv2_s80"}', 'threads=1'])
    assert f'top-1 {ticket.facts["top1"]:.4f}' in capsys.readouterr().out


def test_the_index_lists_tickets_and_dense_references(released):
    text = (released / 'cards/README.md').read_text()
    rows = {line.split('|')[1].strip(): line for line in text.splitlines() if 'st_few' in line and line[0] == '|'}
    assert list(rows) == [
        '[`superticket_mbv2_s50.st_few`](superticket_mbv2_s50.st_few.md)',
        '[`superticket_mbv2_s80.st_few`](superticket_mbv2_s80.st_few.md)',
        'timm `test_resnet.st_few`, dense',
    ]
    dense = yaml.safe_load((released / 'cards/REFERENCES.yaml').read_text())['test_resnet.st_few']
    assert dense['dead'] == 0
    assert f'| {dense["params"]:,} | {dense["params"]:,} | {dense["macs"]:,} | {dense["macs"]:,} |' in text
    assert re.findall(r'!\[.*\]\((.*)\)', text) == ['index.png', 'run.rounds.png']
    assert all((released / 'cards' / name).read_bytes()[:4] == b'\x89PNG' for name in ('index.png', 'run.rounds.png'))


def test_the_index_of_this_repository_is_what_its_facts_say():
    cards = {path.stem: read_facts(path) for path in sorted(release.CARDS.glob('superticket*.yaml'))}
    rounds = sorted(path.name for path in release.CARDS.glob('*.rounds.png'))
    text = release.index(cards, release.read_rows(release.CARDS / release.REFERENCES), rounds)
    assert (release.CARDS / release.INDEX).read_text() == text


@pytest.mark.parametrize(
    ('main', 'args', 'says'),
    [
        (release.main, ['runs=[nowhere]'], 'nowhere/config.yaml'),
        (evaluate.main, [], 'ticket is missing'),
        (evaluate.main, ['ticket=nowhere'], 'nowhere does not exist'),
    ],
)
def test_bad_input_is_one_clear_line(main, args, says):
    with pytest.raises(ValueError, match=says) as raised:
        main(args)
    assert '\n' not in str(raised.value)
