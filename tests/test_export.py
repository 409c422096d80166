import copy
import json
import zipfile

import numpy as np
import pytest
import timm
import torch

from timm_supertickets import Mask, Ticket, export, prunable
from timm_supertickets.export import export_ticket
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import magnitude

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

ARCH = {
    'space': 'mbv2',
    'shape': {'stem': 8, 'stages': [[8, 1, 1], [8, 2, 2]], 'head': 16},
    'blocks': [{'3': 6, '7': 2}, {'3': 4, '5': 4}, {}],
}


def draw(name='superticket_mbv2', input_size=(3, 32, 32), **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after training: folding it scales the weights
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return Ticket.draw(model, prune(magnitude(model), 0.5), data_config={'input_size': input_size})


@pytest.fixture(scope='module')
def ticket():
    return draw(arch=ARCH)


@pytest.fixture(scope='module')
def transformer():
    return draw('test_vit', (3, 160, 160))


@pytest.fixture(scope='module')
def onnx_file(ticket, tmp_path_factory):
    file = tmp_path_factory.mktemp('onnx') / 'x.onnx'
    return file, export_ticket(ticket, file)


@pytest.fixture(scope='module')
def pt2_file(ticket, tmp_path_factory):
    file = tmp_path_factory.mktemp('pt2') / 'x.pt2'
    return file, export_ticket(ticket, file)


def dead(ticket):
    return ticket.mask.total - ticket.mask.alive


def close(found, expected):
    return (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize('batch', [1, 4])
def test_onnx_runs_without_this_package(ticket, onnx_file, batch):
    file, done = onnx_file
    onnx.checker.check_model(str(file), full_check=True)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    images = torch.randn(batch, 3, 32, 32)
    (found,) = session.run(['scores'], {'images': images.numpy()})
    assert close(torch.from_numpy(found), ticket.build()(images))
    assert (done.file, done.size, done.batch, done.input_size) == (file, file.stat().st_size, None, (3, 32, 32))
    assert done.error <= 1e-5


def test_onnx_has_the_zeros_where_they_were(ticket, onnx_file):
    file, done = onnx_file
    weights = {entry.name: onnx.numpy_helper.to_array(entry) for entry in onnx.load(file).graph.initializer}
    zeros = {name: weights[name] == 0 for name in ticket.mask}
    for name, alive in ticket.mask.items():
        np.testing.assert_array_equal(zeros[name], ~alive.numpy())
    assert done.dead == dead(ticket) == sum(int(zero.sum()) for zero in zeros.values()) > 0
    assert any(not np.array_equal(weights[name], ticket.weights[name]) for name in ticket.mask), 'nothing was folded'


@torch.no_grad()
@pytest.mark.parametrize('batch', [1, 4])
def test_pt2_is_the_same_function(ticket, pt2_file, batch):
    file, done = pt2_file
    images = torch.randn(batch, 3, 32, 32)
    program = torch.export.load(file)
    assert torch.equal(program.module()(images), ticket.build()(images))
    assert program.state_dict.keys() >= ticket.mask.keys()
    for name, alive in ticket.mask.items():
        assert torch.equal(program.state_dict[name] == 0, ~alive)
    assert (done.dead, done.error, done.size) == (dead(ticket), 0.0, file.stat().st_size)
    assert done.weights == ticket.mask.total


def test_pt2_holds_no_images(pt2_file):
    file, _ = pt2_file
    sizes = [entry.file_size for entry in zipfile.ZipFile(file).infolist() if 'sample_inputs' in entry.filename]
    assert sum(sizes) < 3 * 32 * 32 * 4


def test_no_path_of_this_machine_is_inside(onnx_file, pt2_file):
    archive = zipfile.ZipFile(pt2_file[0])
    for data in (onnx_file[0].read_bytes(), *map(archive.read, archive.namelist())):
        assert b'mbv2.py' not in data
        assert b'site-packages' not in data


def test_the_config_travels_inside(ticket, onnx_file, pt2_file):
    (entry,) = (prop for prop in onnx.load(onnx_file[0]).metadata_props if prop.key == 'config')
    extra = {'config.json': ''}
    torch.export.load(pt2_file[0], extra_files=extra)
    for text in (entry.value, extra['config.json']):
        assert json.loads(text) == json.loads(json.dumps(ticket.config()))


@torch.no_grad()
def test_linear_layers_that_onnx_renames_and_transposes_are_found(transformer, tmp_path):
    done = export_ticket(transformer, tmp_path / 'x.onnx', batch=2)
    names = {entry.name for entry in onnx.load(tmp_path / 'x.onnx').graph.initializer}
    assert not names >= transformer.mask.keys()
    assert done.dead == dead(transformer) > 0
    session = onnxruntime.InferenceSession(tmp_path / 'x.onnx', providers=['CPUExecutionProvider'])
    assert session.get_inputs()[0].shape == [2, 3, 160, 160]


@torch.no_grad()
@pytest.mark.parametrize('suffix', ['onnx', 'pt2'])
def test_another_image_size_and_a_fixed_batch(ticket, tmp_path, suffix):
    file = tmp_path / f'x.{suffix}'
    done = export_ticket(ticket, file, img_size=48, batch=3)
    assert (done.batch, done.input_size) == (3, (3, 48, 48))
    images = torch.randn(3, 3, 48, 48)
    if suffix == 'onnx':
        session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
        assert session.get_inputs()[0].shape == [3, 3, 48, 48]
        found = torch.from_numpy(session.run(None, {'images': images.numpy()})[0])
        config = json.loads(onnx.load(file).metadata_props[0].value)
        assert config['pretrained_cfg']['input_size'] == [3, 48, 48]
    else:
        found = torch.export.load(file).module()(images)
    assert close(found, ticket.build()(images))


def test_a_model_of_fixed_size_is_built_for_the_size_asked_for(transformer, tmp_path):
    assert transformer.pretrained_cfg['fixed_input_size']
    assert export_ticket(transformer, tmp_path / 'x.pt2', img_size=96).input_size == (3, 96, 96)


def spoil(monkeypatch, suffix, change):
    """What is exported differs from the ticket."""
    write = getattr(export, f'to_{suffix}')

    def spoiled(model, *args):
        twin = timm.create_model('superticket_mbv2', arch=ARCH, num_classes=5).eval()
        twin.load_state_dict(model.state_dict())
        change(twin.state_dict())
        return write(twin, *args)

    monkeypatch.setattr(export, f'to_{suffix}', spoiled)


@pytest.fixture(scope='module')
def cut_ticket():
    """Two hidden channels of the first block are read by nothing."""
    ticket = draw(arch={**ARCH, 'blocks': [{'3': 8, '7': 2}, {'3': 4, '5': 4}, {}]})
    name = 'blocks.0.0.conv_pwl.weight'
    ticket.mask[name][:, :2] = False
    ticket.weights[name][:, :2] = 0
    return ticket


@torch.no_grad()
@pytest.mark.parametrize('suffix', ['onnx', 'pt2'])
def test_a_baked_ticket_is_smaller_and_scores_the_same(cut_ticket, tmp_path, suffix):
    plain, done = (
        export_ticket(cut_ticket, tmp_path / f'{name}.{suffix}', bake=name == 'baked') for name in ('plain', 'baked')
    )
    file = tmp_path / f'baked.{suffix}'
    images = torch.randn(3, 3, 32, 32)
    if suffix == 'onnx':
        session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
        found = torch.from_numpy(session.run(None, {'images': images.numpy()})[0])
        read = {entry.name: onnx.numpy_helper.to_array(entry) for entry in onnx.load(file).graph.initializer}
        config = json.loads(onnx.load(file).metadata_props[0].value)
    else:
        extra = {'config.json': ''}
        program = torch.export.load(file, extra_files=extra)
        found, read = program.module()(images), dict(program.state_dict)
        config = json.loads(extra['config.json'])
    assert close(found, cut_ticket.build()(images))
    assert config == json.loads(json.dumps(cut_ticket.config()))
    inside = [name for name, value in read.items() if value.ndim == 4 and name.startswith(('blocks', 'conv_head'))]
    assert done.weights == sum(np.asarray(read[name]).size for name in inside) < plain.weights
    assert done.dead == sum(int((np.asarray(read[name]) == 0).sum()) for name in inside) < plain.dead
    assert done.weights - done.dead <= plain.weights - plain.dead
    assert not [name for name in read if 'running' in name]
    assert plain.weights - done.weights >= 2 * (8 + 8)
    assert (done.size, done.batch) == (file.stat().st_size, None)
    assert done.error <= 1e-5


@pytest.mark.parametrize('suffix', ['onnx', 'pt2'])
def test_a_baked_file_is_checked_as_any_other(ticket, tmp_path, monkeypatch, suffix):
    write = getattr(export, f'to_{suffix}')

    def other_score(model):
        model.classifier.bias[0] += 1e-2

    def living(model):
        weight = model.blocks[0][0].branches.k3.conv_pw.weight
        weight[tuple((weight == 0).nonzero()[0].tolist())] = 1e-30

    def spoil_baked(change):
        def spoiled(model, *args):
            twin = copy.deepcopy(model)
            change(twin)
            return write(twin, *args)

        monkeypatch.setattr(export, f'to_{suffix}', spoiled)

    spoil_baked(other_score)
    with pytest.raises(ValueError, match='its scores differ from the ticket by'):
        export_ticket(ticket, tmp_path / f'x.{suffix}', bake=True)
    spoil_baked(living)
    with pytest.raises(ValueError, match=r"lost the zeros of 'blocks\.0\.0\.branches\.k3\.conv_pw\.weight'"):
        export_ticket(ticket, tmp_path / f'x.{suffix}', bake=True)
    assert not list(tmp_path.iterdir())


def test_a_stock_ticket_is_not_baked(transformer, tmp_path):
    with pytest.raises(ValueError, match='only members of the spaces hr and mbv2 can be baked, got VisionTransformer'):
        export_ticket(transformer, tmp_path / 'x.pt2', bake=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('suffix', ['onnx', 'pt2'])
def test_a_dead_weight_that_lives_is_refused(ticket, tmp_path, monkeypatch, suffix):
    name = 'blocks.0.0.conv_pw.weight'
    place = tuple((~ticket.mask[name]).nonzero()[0].tolist())
    spoil(monkeypatch, suffix, lambda tensors: tensors[name].__setitem__(place, 1e-30))
    with pytest.raises(ValueError, match=rf"lost the zeros of '{name}'"):
        export_ticket(ticket, tmp_path / f'x.{suffix}')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('suffix', 'value'), [('onnx', 1e-2), ('pt2', 1e-2), ('pt2', float('nan'))])
def test_other_scores_are_refused(ticket, tmp_path, monkeypatch, suffix, value):
    spoil(monkeypatch, suffix, lambda tensors: tensors['classifier.bias'].add_(value))
    with pytest.raises(ValueError, match='its scores differ from the ticket by'):
        export_ticket(ticket, tmp_path / f'x.{suffix}')
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_by_force_and_only_whole(ticket, tmp_path, monkeypatch):
    file = tmp_path / 'x.pt2'
    file.write_text('mine')
    with pytest.raises(ValueError, match=r'x\.pt2 exists; force replaces it'):
        export_ticket(ticket, file)
    with monkeypatch.context() as patch:
        spoil(patch, 'pt2', lambda tensors: tensors['classifier.bias'].add_(1))
        with pytest.raises(ValueError, match='scores differ'):
            export_ticket(ticket, file, force=True)
    assert file.read_text() == 'mine'
    assert export_ticket(ticket, file, force=True).size == file.stat().st_size > 1000
    assert [path.name for path in tmp_path.iterdir()] == ['x.pt2']


@pytest.mark.parametrize(
    ('name', 'options', 'expected'),
    [
        ('x.tflite', {}, r'x\.tflite: the suffix names the format, choose from \.onnx, \.pt2'),
        ('gone/x.onnx', {}, r'gone/x\.onnx: the folder .*gone does not exist'),
        ('x.pt2', {'batch': 0}, 'batch must be at least 1, got 0'),
        ('x.pt2', {'img_size': -1}, 'img_size must be at least 1, got -1'),
        ('folder.pt2', {'force': True}, r'folder\.pt2 exists; it is not a file'),
    ],
)
def test_what_is_asked_for_is_checked_before_anything_is_built(ticket, tmp_path, monkeypatch, name, options, expected):
    monkeypatch.setattr(Ticket, 'build', None)
    (tmp_path / 'folder.pt2').mkdir()
    with pytest.raises(ValueError, match=expected):
        export_ticket(ticket, tmp_path / name, **options)


def test_a_missing_extra_is_named(ticket, tmp_path, monkeypatch):
    find = export.find_spec
    monkeypatch.setattr(export, 'find_spec', lambda name: None if name == 'onnxscript' else find(name))
    expected = r"writing ONNX needs onnxscript, not installed: pip install 'timm_supertickets\[export\]'"
    with pytest.raises(ValueError, match=expected):
        export_ticket(ticket, tmp_path / 'x.onnx')
    assert export_ticket(ticket, tmp_path / 'x.pt2').size  # needs nothing more


def test_a_ticket_with_everything_alive(tmp_path):
    model = timm.create_model('superticket_mbv2', arch=ARCH, num_classes=5)
    ticket = Ticket.draw(model, Mask.dense(prunable(model)), data_config={'input_size': (3, 32, 32)})
    assert export_ticket(ticket, tmp_path / 'x.pt2').dead == 0
