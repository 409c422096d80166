from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import compare
import finetune
import pytest
import transfer
import yaml
from parts.config import CONFIGS, Config, parse

KINDS = {'finetune': finetune.Config, 'compare': compare.Config, 'transfer': transfer.Config}


def test_default_is_the_digits_file():
    values = yaml.safe_load((CONFIGS / 'mbv2_digits.yaml').read_text())
    config = parse([])
    assert values
    assert all(getattr(config, key) == value for key, value in values.items())


def test_command_line_beats_file_beats_default(tmp_path):
    file = tmp_path / 'mine.yaml'
    file.write_text('lr: 0.3\nrounds: 7\n')
    config = parse(['--config', str(file), 'lr=0.25', 'targets=[0.1,0.7]', 'model_args={width: 0.5}'])
    assert (config.lr, config.rounds, config.targets) == (0.25, 7, [0.1, 0.7])
    assert config.model_args == {'width': 0.5}
    assert config.round_steps == Config().round_steps


def test_resolved_config_is_a_config_again(tmp_path):
    config = parse(['seed=3'])
    file = tmp_path / 'resolved.yaml'
    file.write_text(config.to_yaml())
    assert parse(['--config', str(file)]) == config


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.yaml')), ids=lambda path: path.stem)
def test_every_config_is_read_and_says_what_it_costs(path):
    recipe = 'finetune' if path.stem.endswith('_ticket') else path.stem.partition('_')[0]
    more = ['ticket=somewhere'] if recipe == 'finetune' else []
    assert parse(['--config', str(path), *more], KINDS.get(recipe, Config))
    head = path.read_text()
    default = path.stem in ('mbv2_digits', 'compare_digits', 'transfer_scenes') or recipe == 'finetune'
    assert f'--config recipes/configs/{path.name}' in head or default
    assert '# hardware:' in head
    assert '# expect:' in head


@pytest.mark.parametrize(
    ('argv', 'says'),
    [
        (['lrr=0.1'], r"unknown key 'lrr'; did you mean lr"),
        (['lr=fast'], r'"lr".*float.*fast'),
        (['seed=1.5'], r'"seed".*int.*1.5'),
        (['search=wide'], r'search'),
        (['targets=[0.5,1.0]'], r'targets must be in \[0, 1\), got \[0.5, 1.0\]'),
        (['targets=[0.8,0.5]'], r'targets must be rising.*got \[0.8, 0.5\]'),
        (['targets=[]'], r'targets is empty'),
        (['rounds=0'], r'rounds must be at least 1, got 0'),
        (['budget=0'], r'budget must be in \(0, 1\], got 0'),
        (['in_chans=2'], r'in_chans must be 1 or 3, got 2'),
        (['--config', 'nowhere.yaml'], r'nowhere.yaml'),
    ],
)
def test_bad_input_is_one_clear_line(argv, says):
    with pytest.raises(ValueError, match=says) as caught:
        parse(argv)
    assert '\n' not in str(caught.value)


def test_help_says_what_every_key_means(capsys):
    with pytest.raises(SystemExit) as done:
        parse(['--help'])
    assert done.value.code == 0
    text = ' '.join(capsys.readouterr().out.split())
    assert 'Sparsities at which a ticket is drawn, rising; 0 draws a dense one when pruning ends.' in text
    assert 'Learning rate at first.' in text


@pytest.mark.parametrize('kind', [Config, *KINDS.values()])
def test_every_key_is_explained(kind):
    text = ''.join(base.__doc__ for base in kind.__mro__[:-1])
    assert [one.name for one in fields(kind) if f'        {one.name}: ' not in text] == []


def test_unknown_key_in_a_file_names_file_and_choices(tmp_path):
    file = tmp_path / 'mine.yaml'
    file.write_text('round_step: 3\n')
    with pytest.raises(ValueError, match=r"unknown key 'round_step'; did you mean round_steps") as caught:
        parse(['--config', str(file)])
    assert 'mine.yaml' in str(caught.value)


def test_a_config_file_cannot_run_anything(tmp_path):
    file, mark = tmp_path / 'mine.yaml', tmp_path / 'mark'
    file.write_text(
        f'output: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ["{mark}"]]\n'
    )
    with pytest.raises(ValueError, match='python/object'):
        parse(['--config', str(file)])
    assert not Path(mark).exists()


@pytest.mark.parametrize('key', ['model_args', 'task_args', 'output', 'model', 'targets', 'tracker'])
def test_a_config_file_cannot_import_anything(tmp_path, key):
    """A class that jsonargparse would make, were it asked for one, stays a dict, or is refused."""
    file, mark = tmp_path / 'mine.yaml', tmp_path / 'mark'
    file.write_text(f'{key}: {{class_path: pathlib.Path.touch, init_args: {{self: {mark}}}, call: os.mkdir}}\n')
    with suppress(ValueError):
        config = parse(['--config', str(file)])
        assert type(getattr(config, key)) is dict
    assert not mark.exists()
