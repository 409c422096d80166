import contextlib
import copy
import csv
import io
import json
from dataclasses import fields
from functools import partial
from math import exp
from types import SimpleNamespace

import keypoints
import pytest
import timm
import torch
import train
from accelerate import Accelerator
from parts import pose
from parts.ap import average_precision
from parts.coco import coco_paths
from parts.config import Config
from parts.heatmaps import decode, render
from parts.joints import Joints, to_image
from parts.pixelnet import PixelNet
from parts.pose import Keypoints, collate_joints, results
from parts.scenes import write_scenes
from pycocotools.cocoeval import COCOeval
from test_boxes import quiet_coco
from test_joints import ORDER, a_coco, a_person
from torch import nn

from timm_supertickets import Ticket, load_ticket, prunable
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import magnitude

CROP = [96, 72]
FEW = ['rounds=2', 'round_steps=1', 'cooldown_steps=1', 'warmup_steps=0', 'recalibrate=1', 'threads=1']  # four steps
TINY = {'model': 'supernet_hr_tiny', 'model_args': {'width': 0.5}}


@pytest.fixture(scope='module')
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('scenes') / 'coco', 'coco', train=6, val=4, size=(64, 64))


@pytest.fixture(scope='module')
def val(scenes):
    """The persons to score on, one after the other."""
    return Joints(*coco_paths(scenes, 'val', 'person_keypoints'), tuple(CROP))


def a_task(scenes, **settings):
    config = Config(task='keypoints', dataset='coco', data_dir=str(scenes), batch_size=2, **TINY)
    return Keypoints(config, **{'crop': CROP, **settings})


def channels(arch):
    return sum(hidden for block in arch.blocks for _, hidden in block)


def evaluated(truth, results, folder, kind='keypoints'):
    """What COCO's evaluator makes of a json file of results."""
    (folder / 'results.json').write_text(json.dumps(results))
    truth = quiet_coco(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(truth, truth.loadRes(str(folder / 'results.json')), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats[0]


def watched(monkeypatch):
    """The masks of all that is trained, after a look at the weights right after the last step."""
    masks = {}
    trained = train.train

    def looked_at(run, state, text, *args):
        loss = trained(run, state, text, *args)
        weights = dict(state.net.named_parameters())
        assert all((weights[name][~alive] == 0).all() for name, alive in state.mask.items())
        masks[text] = state.mask
        return loss

    monkeypatch.setattr(train, 'train', looked_at)
    return masks


class Knowing(nn.Module):
    """Knows the heat maps of every crop, and of its mirror image."""

    def __init__(self, persons, stride=4):
        super().__init__()
        self.maps = {}
        for i in range(len(persons)):
            item = persons[i]
            size = tuple(side // stride for side in CROP)
            points, weights = item['points'][None], item['weights'][None]
            maps = 0.5 * render(points, weights, size, stride)[0][0]
            self.maps[item['image'].numpy().tobytes()] = maps
            self.maps[item['image'].flip(-1).numpy().tobytes()] = maps[ORDER].flip(-1)

    def forward(self, images):
        return torch.stack([self.maps[image.contiguous().numpy().tobytes()] for image in images])


def test_the_loss_by_hand():
    task = Keypoints(Config(), crop=[8, 8], sigma=1.0)
    targets = {'points': torch.tensor([[[2.0, 2], [6, 6]]]), 'weights': torch.tensor([[1.0, 0]])}
    found = torch.zeros(1, 2, 2, 2)
    found[0, 1] = 7  # of a point without a label
    bell = 1 + 2 * exp(-1 / 2) ** 2 + exp(-1) ** 2  # the squares of four cells
    assert task.loss(lambda images: found, torch.zeros(1, 3, 8, 8), targets).item() == pytest.approx(bell / 8 / 2)
    wanted, _ = render(targets['points'], targets['weights'], (2, 2), sigma=1.0)
    assert task.loss(lambda images: wanted, torch.zeros(1, 3, 8, 8), targets).item() == 0


def test_the_flip_test_by_hand():
    maps = torch.rand(2, 17, 4, 3)
    calls = []

    def net(images):
        calls.append(images)
        return maps[len(calls) - 1][None]

    images = torch.rand(1, 3, 16, 12)
    found = Keypoints(Config(), crop=[16, 12]).predicted(net, images, ORDER)
    assert (calls[1] == calls[0].flip(-1)).all()
    left_eye, right_eye = 1, 2
    assert found[0, left_eye, 3, 0].item() == pytest.approx((maps[0, left_eye, 3, 0] + maps[1, right_eye, 3, 2]) / 2)
    calls.clear()
    assert (Keypoints(Config(), crop=[16, 12], flip=False).predicted(net, images, ORDER)[0] == maps[0]).all()
    assert len(calls) == 1


def test_a_score_is_the_mean_height_of_visible_points():
    heights = torch.tensor([[0.1, 0.4, 0.8], [0.1, 0.2, 0.1]])
    points = torch.arange(12.0).view(2, 3, 2)
    both = results(points, heights, {'image_id': torch.tensor([5, 6]), 'id': torch.tensor([1, 2])}, 1)
    assert [one['score'] for one in both] == pytest.approx([0.6, 0])
    assert both[1]['image_id'] == 6
    assert both[1]['keypoints'] == pytest.approx([6, 7, 0.1, 8, 9, 0.2, 10, 11, 0.1])


def test_true_points_are_perfect(tmp_path):
    points = {i: (i % 5, i % 7, 2) for i in range(17)}
    others = {i: (9 - i % 5, i % 7, 2) for i in range(17)}
    people = [a_person(1, points, area=40), a_person(2, others, image_id=3, area=40)]
    _, path = a_coco(tmp_path, [{**person, 'id': i} for i, person in enumerate(people, 1)], 'person_keypoints')
    found = [
        {'image_id': person['image_id'], 'category_id': 1, 'keypoints': person['keypoints'], 'score': 0.5}
        for person in people
    ]
    assert average_precision(path, [dict(one) for one in found], 'keypoints') == 1
    assert average_precision(path, [dict(found[0])], 'keypoints') == pytest.approx(0.5, abs=0.01)  # 51 of 101 recalls
    assert average_precision(path, [], 'keypoints') == 0
    _, path = a_coco(tmp_path, [], 'person_keypoints')
    assert average_precision(path, found, 'keypoints') == 0  # where COCO's evaluator says -1


@pytest.mark.parametrize('flip', [False, True])
def test_a_net_that_knows_the_heat_maps_scores_as_cocos_evaluator_says(tmp_path, scenes, val, accelerator, flip):
    task = a_task(scenes, flip=flip)
    data = task.create_data(accelerator)
    persons = data.val.dataset.dataset
    assert len(persons) == data.val_count == len(val)
    expected = []
    for i in range(len(persons)):
        item = persons[i]
        wanted, _ = render(item['points'][None], item['weights'][None], (24, 18))
        points = to_image(decode(wanted)[0], item['matrix'][None])[0]
        rows = torch.cat([points, torch.ones(17, 1)], 1).flatten().tolist()
        heights = [0.5 * height for height in wanted[0].amax((1, 2)).tolist() if 0.5 * height > 0.2]
        score = sum(heights) / len(heights)
        expected.append({'image_id': int(item['image_id']), 'category_id': 1, 'keypoints': rows, 'score': score})
    net = Knowing(persons).train()
    found = task.score(net, data, accelerator)
    assert found == pytest.approx(evaluated(persons.coco.path, expected, tmp_path))
    assert found > 0.5
    assert net.training


def test_every_person_counts_once_on_any_processes(scenes, accelerator, monkeypatch):
    task = a_task(scenes)
    data = task.create_data(accelerator)
    net = Knowing(data.val.dataset.dataset)
    whole = task.score(net, data, accelerator)
    parts = []
    monkeypatch.setattr(pose, 'gather_object', lambda found: parts.append(copy.deepcopy(found)) or found)
    for i in range(2):
        one = SimpleNamespace(num_processes=2, process_index=i, device='cpu')
        task.score(net, task.create_data(one), one)
    numbers = [[person['id'] for person in part] for part in parts]
    assert all(numbers)
    assert sorted([*numbers[0], *numbers[1]]) == sorted(one['id'].item() for one in data.val.dataset)
    monkeypatch.setattr(pose, 'gather_object', lambda found: parts[1] + parts[0])
    assert task.score(net, data, accelerator) == whole


def test_coarser_maps_are_read_at_the_stride_of_the_targets(scenes, accelerator):
    task = a_task(scenes, flip=False)
    data = task.create_data(accelerator)
    net = Knowing(data.val.dataset.dataset, stride=8)
    images, targets = next(iter(data.val))
    assert task.predicted(net, images, ORDER).shape == (2, 17, 24, 18)
    assert task.loss(net, images, targets) < task.loss(lambda images: torch.zeros(2, 17, 24, 18), images, targets)


def test_every_model_of_timm_has_a_map_for_every_point(scenes, accelerator):
    import timm

    task = a_task(scenes)
    data = task.create_data(accelerator)
    assert data.input_size == (3, 96, 72)
    x = torch.zeros(1, 3, 96, 72)
    for name, args in (('supernet_hr_tiny', {}), ('supernet_hr_tiny', {'head': 'dense'}), ('supernet_mbv2_tiny', {})):
        net = task.create_net(partial(timm.create_model, name, width=0.5, **args), data).eval()
        assert net(x).shape == (1, 17, 24, 18)
        assert isinstance(net, PixelNet) == ('mbv2' in name)
        assert net(x).abs().max() < 2  # a start that targets of height 1 are in reach of


def test_scenes_are_written_once(tmp_path, accelerator, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('parts.scenes.write_scenes', partial(write_scenes, train=4, val=2, size=(32, 32)))
    task = Keypoints(Config(task='keypoints', dataset='scenes', batch_size=2), crop=[32, 24])
    for _ in range(2):
        images, targets = next(iter(task.create_data(accelerator).train))
        assert images.shape == (2, 3, 32, 24)
        assert targets['points'].shape == (2, 17, 2)
    assert (tmp_path / 'output/scenes/coco/annotations/person_keypoints_val2017.json').exists()


@pytest.mark.parametrize(
    ('settings', 'says'),
    [
        ({'crop': [64]}, r'crop must be a height and a width, multiples of 4, got \[64\]'),
        ({'crop': [64, 50]}, r'crop .* got \[64, 50\]'),
        ({'scale': 1.0}, r'scale must be in \[0, 1\), got 1.0'),
        ({'rotation': -1.0}, 'rotation must be at least 0, got -1.0'),
        ({'sigma': 0.0}, 'sigma must be above 0, got 0.0'),
    ],
)
def test_bad_settings_are_one_clear_line(settings, says):
    with pytest.raises(ValueError, match=says):
        Keypoints(Config(), **settings)


def test_bad_data_is_one_clear_line(tmp_path, accelerator):
    def read(**changes):
        config = Config(task='keypoints', **{'dataset': 'coco', 'data_dir': str(tmp_path), 'batch_size': 1, **changes})
        return Keypoints(config).create_data(accelerator)

    with pytest.raises(ValueError, match="'ade20k' has no place in task 'keypoints'; choose from scenes, "):
        read(dataset='ade20k')
    with pytest.raises(ValueError, match="dataset 'coco' needs data_dir=FOLDER, and None is none"):
        read(data_dir=None)
    with pytest.raises(ValueError, match="in_chans must be 3 for task 'keypoints', got 1"):
        read(in_chans=1)
    with pytest.raises(ValueError, match='is not laid out like COCO: no train2017/ in it'):
        read()
    categories = [{'id': 1, 'name': 'person', 'keypoints': ['nose']}]
    person = {**a_person(1, {}), 'keypoints': [1, 1, 2]}
    a_coco(tmp_path, [person], 'person_keypoints', categories=categories)
    (tmp_path / 'train2017').rename(tmp_path / 'val2017')
    annotations = tmp_path / 'annotations'
    (annotations / 'person_keypoints_train2017.json').rename(annotations / 'person_keypoints_val2017.json')
    a_coco(tmp_path, [person], 'person_keypoints', categories=categories)
    with pytest.raises(ValueError, match=r'train2017\.json names 1 keypoints; COCO scores 17'):
        read()


def test_collate(val):
    images, targets = collate_joints([val[0], val[1]])
    assert images.shape == (2, 3, *CROP)
    assert sorted(targets) == ['id', 'image_id', 'matrix', 'points', 'weights']


def test_a_run_draws_a_ticket(scenes, tmp_path, monkeypatch):
    masks = watched(monkeypatch)
    output = tmp_path / 'run'
    where = ['task=keypoints', 'dataset=coco', f'data_dir={scenes}', f'output={output}', 'batch_size=2']
    what = ['model=supernet_hr_tiny', 'model_args={width: 0.5}', 'task_args={crop: [48, 36]}', 'targets=[0.5,0.8]']
    train.main([*FEW, *where, *what])
    rows = list(csv.DictReader((output / 'summary.csv').read_text().splitlines()))
    assert [row['name'] for row in rows] == ['superticket_hr_s50', 'trunk', 'superticket_hr_s80', 'trunk']
    for row in rows:
        assert 0 <= float(row['keypoint_ap']) <= 1
    for name, sparsity in (('superticket_hr_s50', 0.5), ('superticket_hr_s80', 0.8)):
        ticket = load_ticket(output / name)
        net = ticket.build()
        assert net(torch.zeros(1, 3, 48, 36)).shape == (1, 17, 12, 9)
        assert ticket.arch['task'] == 'dense'
        assert channels(ticket.arch) < channels(net.supernet_arch())
        assert {key: alive.tolist() for key, alive in ticket.mask.items()} == {
            key: alive.tolist() for key, alive in masks[name].items()
        }
        assert ticket.mask.total - ticket.mask.alive == round(sparsity * ticket.mask.total)
        assert ticket.mask.total == sum(weight.numel() for weight in prunable(net).values())
        assert ticket.facts['keypoint_ap'] == pytest.approx(
            next(float(row['keypoint_ap']) for row in rows if row['name'] == name)
        )


def test_a_ticket_is_put_to_work_with_its_mask_kept(scenes, tmp_path):
    torch.manual_seed(0)
    net = timm.create_model('supernet_mbv2_tiny', width=0.5)
    drawn = Ticket.draw(net, prune(magnitude(net), 0.7))
    drawn.save(tmp_path / 'drawn')
    few = [arg for arg in FEW if arg.split('=')[0] in {field.name for field in fields(keypoints.Config)}]
    where = ['dataset=coco', f'data_dir={scenes}', 'batch_size=2', f'output={tmp_path / "run"}']
    keypoints.main([*few, *where, 'task_args={crop: [48, 36]}', f'ticket={tmp_path / "drawn"}'])
    ticket = load_ticket(tmp_path / 'run/superticket_mbv2_s70')
    assert {name: alive.tolist() for name, alive in ticket.mask.items()} == {
        name: alive.tolist() for name, alive in drawn.mask.items()
    }
    assert not torch.equal(ticket.weights['blocks.0.0.conv_pw.weight'], drawn.weights['blocks.0.0.conv_pw.weight'])
    assert (tmp_path / 'run/predictions.png').read_bytes()[:4] == b'\x89PNG'
