import json

import pytest
import transfer
from parts.scenes import write_scenes

from timm_supertickets import load_ticket

pytestmark = pytest.mark.slow
FEW = 'rounds=1,round_steps=2,batch_size=4,recalibrate=1,workers=0'


@pytest.fixture(scope='module')
def moved(tmp_path_factory):
    """Digits to segmented scenes, on as few steps as there can be."""
    root = tmp_path_factory.mktemp('moved')
    scenes = write_scenes(root / 'scenes', 'cityscapes', train=8, val=4)
    args = [
        'draw={classify: smoke.yaml}', 'use={segment: segment_ticket.yaml}', f'changes=[{FEW}]', 'seeds=1',
        'drawn=[cooldown_steps=1, prune_every=1, search_until=1.0]',
        f'used=[dataset=cityscapes, data_dir={scenes}, img_size=64]', f'output={root / "runs"}',
        f'results={root / "results"}',
    ]  # fmt: skip
    transfer.main(args)
    return root, args


def test_a_ticket_and_its_dense_counterpart_are_drawn_and_used(moved):
    said = json.loads((moved[0] / 'results/results.json').read_text())
    found = [(row['kind'], row['drawn'], row['used'], row['metric'], row['n']) for row in said['results']]
    assert found == [
        ('sparse', 'classify', None, 'top1', 599),
        ('dense', 'classify', None, 'top1', 599),
        ('sparse', 'classify', 'segment', 'miou', 4),
        ('dense', 'classify', 'segment', 'miou', 4),
    ]
    assert [round(row['sparsity'], 3) for row in said['results'][:2]] == [0.8, 0]


def test_the_mask_is_kept_where_there_is_one(moved):
    def tickets(kind, where):
        folders = (moved[0] / 'runs/seed_0' / kind / 'classify' / where).glob('*/ticket.safetensors')
        return [load_ticket(path.parent) for path in folders]

    (drawn,), (used,) = tickets('sparse', 'drawn'), tickets('sparse', 'used_to_segment')
    assert 0.79 < drawn.sparsity < 0.81
    assert used.mask.keys() == drawn.mask.keys()
    assert all(bool((used.mask[name] == alive).all()) for name, alive in drawn.mask.items())
    (dense,) = tickets('dense', 'used_to_segment')
    assert dense.sparsity == 0


def test_the_page_has_both_tables(moved):
    text = (moved[0] / 'results/README.md').read_text()
    assert '| drawn on | s80 | dense | difference |' in text
    assert '| drawn on | used to segment (miou) |' in text
    assert text.count('classify, mask kept') == 1


def test_run_again_it_trains_nothing(moved, monkeypatch):
    monkeypatch.setattr('parts.cells.run_cell', None)
    transfer.main(moved[1])


def test_dense_nets_are_there_for_the_tasks_that_are_named(moved, monkeypatch):
    monkeypatch.setattr('parts.cells.run_cell', None)
    transfer.main([*moved[1], 'dense=[]', f'results={moved[0] / "fewer"}'])
    said = json.loads((moved[0] / 'fewer/results.json').read_text())
    assert [(row['kind'], row['used']) for row in said['results']] == [('sparse', None), ('sparse', 'segment')]
    text = (moved[0] / 'fewer/README.md').read_text()
    assert 'classify, dense' not in text
    assert 'against its dense counterpart' not in text


def test_a_table_goes_on_with_other_tasks_but_not_with_the_same_by_another_config(moved):
    def claim(**draw):
        config = transfer.parse(moved[1], transfer.Config, 'transfer_scenes.yaml', 'transfer.py')
        config.draw = draw
        transfer.claim(config, ('seeds', 'dense'))

    claim(segment='segment_scenes.yaml')
    claim(classify='smoke.yaml')
    for other in ({'classify': 'mbv2_digits.yaml'}, {'segment': 'smoke.yaml'}):
        with pytest.raises(ValueError, match=r'holds the runs of another comparison.*draw is'):
            claim(**other)


@pytest.mark.parametrize(
    ('args', 'says'),
    [
        (
            ['draw={sort: smoke.yaml}'],
            r"draw must have tasks out of classify, segment, keypoints, detect, got \['sort'\]",
        ),
        (['use={}'], r'use must have tasks'),
        (['dense=[sort]'], r"dense: 'sort' is unknown; choose from classify, segment, keypoints, detect"),
        (['jobs=0'], 'jobs must be at least 1, got 0'),
        (['sparsity=1.0'], r'sparsity must be in \(0, 1\), got 1'),
    ],
)
def test_bad_input_is_one_clear_line(args, says):
    with pytest.raises(ValueError, match=says) as caught:
        transfer.parse(args, transfer.Config, 'transfer_scenes.yaml', 'transfer.py')
    assert '\n' not in str(caught.value)
