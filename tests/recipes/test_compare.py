import json
import re
from pathlib import Path

import compare
import finetune
import pytest
import train
from parts.cells import Cell, spread
from parts.config import parse

from timm_supertickets import load_ticket

CONFIG = ['--config', str(Path(__file__).parents[2] / 'recipes/configs/compare_smoke.yaml')]
FEW = 'rounds=4,round_steps=1,cooldown_steps=2,batch_size=8,recalibrate=1'
SHORT = [f'changes=[{FEW}]', 'targets=[0.8]', 'baseline=test_resnet']


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    """All arms, at one sparsity, on as few steps as there can be."""
    output = tmp_path_factory.mktemp('compared')
    args = [*CONFIG, *SHORT, f'other_changes=[seed=7,{FEW}]']
    args += [f'output={output / "runs"}', f'results={output / "results"}']
    compare.main(args)
    return output, args


@pytest.fixture(scope='module')
def results(compared):
    said = json.loads((compared[0] / 'results/results.json').read_text())
    return {row['arm']: row for row in said['results']}


def test_every_arm_has_a_result_at_its_sparsity(results):
    assert list(results) == list(compare.ARMS)
    for arm, row in results.items():
        assert row['n'] == 599
        assert 0 <= row['top1'] <= 1
        if arm in compare.DENSE:
            assert (row['sparsity'], row['nonzero']) == (0, row['params'])
        else:
            assert row['sparsity'] == 0.8
            assert row['nonzero'] < 0.6 * row['params']


def drawn(compared, name):
    folders = (compared[0] / 'runs/seed_0' / name).glob('*/ticket.safetensors')
    (folder,) = {path.parent for path in folders if not path.parent.name.endswith('_initial')}
    return load_ticket(folder)


def test_cells_do_what_their_names_say(compared):
    runs = compared[0] / 'runs/seed_0'

    def ticket(name):
        return drawn(compared, name)

    joint = ticket('joint/0.8')
    assert joint.sparsity == pytest.approx(0.8, abs=1e-4)
    assert ticket('magnitude/0.8').mask.alive == pytest.approx(joint.mask.alive, abs=1)
    counts = {name: int(alive.sum()) for name, alive in joint.mask.items()}
    for name, kept in (('retrained', True), ('mask_fresh', True), ('mask_initial', True), ('random_mask', False)):
        other = ticket(f'{name}/0.8')
        assert other.arch == joint.arch
        assert {name: int(alive.sum()) for name, alive in other.mask.items()} == counts
        assert all(other.mask[name].equal(alive) for name, alive in joint.mask.items()) == kept
    assert ticket('moved/0.8').arch == ticket('other').arch
    assert ticket('two_stage_2x/0.8').arch == load_ticket(runs / 'dense/superticket_mbv2_s0').arch


def test_compute_is_that_of_all_that_led_to_a_ticket(results, compared):
    def spent(name):
        return int(Cell('train', compared[0] / 'runs/seed_0' / name, list).ticket(0.8)['train_macs'])

    dense = Cell('train', compared[0] / 'runs/seed_0/dense', list)
    assert results['two_stage_2x']['train_macs'] == dense.train_macs(0) + spent('two_stage_2x/0.8')
    assert results['no_retraining']['train_macs'] == dense.train_macs(0)
    assert results['retrained']['train_macs'] == results['joint']['train_macs'] + spent('retrained/0.8')
    # the trunk is counted once, and with one sparsity all tickets are that one
    assert results['joint']['arm_macs'] == results['joint']['train_macs'] == spent('joint/0.8')
    assert results['two_stage_2x']['arm_macs'] == results['two_stage_2x']['train_macs']
    assert results['magnitude']['train_macs'] == spent('magnitude/0.8')  # the joint run only said how many should live


def test_two_stages_take_as_many_steps_as_a_joint_run(compared):
    def steps(name):
        config = parse(['--config', str(compared[0] / 'runs/seed_0' / name / 'config.yaml')], train.Config)
        return config.all_steps

    def tuned(name):
        kind = finetune.Config
        return parse(['--config', str(compared[0] / 'runs/seed_0' / name / 'config.yaml')], kind).all_steps

    assert steps('dense_half') + tuned('two_stage_1x/0.8') == steps('joint/0.8') == 6
    assert steps('dense') + tuned('two_stage_2x/0.8') == 2 * steps('joint/0.8')
    assert tuned('mask_fresh/0.8') == tuned('random_mask/0.8') == steps('joint/0.8')


def test_the_page_says_what_the_results_say(results, compared):
    page = (compared[0] / 'results/README.md').read_text()
    for arm, row in results.items():
        (line,) = re.findall(rf'\| [^|]*\(`{arm}`\) \|.*', page)
        assert f' {100 * row["top1"]:.2f} |' in line
    difference = 100 * (results['joint']['top1'] - results['two_stage_2x']['top1'])
    assert f'| `joint` - `two_stage_2x` |  | {difference:.2f} |' in page
    assert {path.name for path in (compared[0] / 'results').glob('*.png')} == {
        f'{name}.png' for name in compare.PICTURES
    }


def test_run_again_it_trains_nothing(compared, monkeypatch):
    output, args = compared
    before = (output / 'results/results.json').read_text()
    monkeypatch.setattr('parts.cells.run_cell', None)
    compare.main(args)
    assert json.loads((output / 'results/results.json').read_text())['results'] == json.loads(before)['results']


def test_a_picture_has_two_arms_at_least(compared, tmp_path):
    compare.main([*compared[1], 'arms=[joint,two_stage_2x,family]', f'results={tmp_path}'])
    assert {path.name for path in tmp_path.glob('*.png')} == {'accuracy.png', 'ablations.png'}


def test_a_family_costs_its_trunk_and_its_branches(tmp_path):
    (tmp_path / 'summary.csv').write_text(
        'name,round,step,sparsity,train_macs\ns50,1,4,0.5,130\ntrunk,1,4,0.6,100\ns90,2,8,0.9,190\ntrunk,2,8,0.9,150\n'
    )
    family = Cell('train', tmp_path, list)
    assert family.run_macs() == 150 + (130 - 100) + (190 - 150)
    assert (family.train_macs(0.5), family.train_macs(0.9)) == (130, 190)


def test_runs_of_another_comparison_are_left_alone(compared):
    with pytest.raises(ValueError, match=r"baseline is 'test_resnet' there, 'resnet18' here.*choose another output="):
        compare.main([*compared[1], 'baseline=resnet18'])


def test_a_cell_that_fails_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"seed_0/joint/0.8: error: dataset 'nowhere'"):
        compare.main([
            *CONFIG, 'changes=[dataset=nowhere]', 'targets=[0.8]', 'arms=[joint]', f'output={tmp_path}',
            f'results={tmp_path}',
        ])  # fmt: skip


def test_spread_and_differences_by_hand():
    rows = [
        {'arm': arm, 'sparsity': 0.9, 'seed': seed, 'top1': top1}
        for arm, values in (('a', (0.90, 0.94)), ('b', (0.91, 0.91)), ('c', (0.5,)))
        for seed, top1 in enumerate(values)
    ]
    assert compare.differ(rows, 'a', 'b', 0.9) == pytest.approx([-1, 3])
    assert compare.differ(rows, 'a', 'c', 0.9) == pytest.approx([40])
    assert spread([-1.0, 3.0]) == '1.00 ± 2.83'
    assert (spread([2.0]), spread([])) == ('2.00', '')


@pytest.mark.parametrize('key', ['seeds', 'jobs'])
def test_at_least_one_run(key):
    with pytest.raises(ValueError, match=rf'{key} must be at least 1, got 0'):
        parse([f'{key}=0'], compare.Config, 'compare_digits.yaml', 'compare.py')


def test_unknown_arms_are_refused():
    with pytest.raises(ValueError, match=r"arms: 'jiont' is unknown; choose from joint, "):
        parse(['arms=[jiont]'], compare.Config, 'compare_digits.yaml', 'compare.py')
