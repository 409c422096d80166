import copy
import csv
import json
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import detect
import pytest
import timm
import torch
import train
from accelerate import Accelerator
from parts import detection
from parts.ap import average_precision
from parts.backbone import searched_macs, ticket_part
from parts.config import Config
from parts.data import batches
from parts.detection import DETECTORS, BoxNet, Detection, results
from parts.scenes import write_scenes
from test_boxes import a_box, a_coco
from test_pose import FEW, channels, evaluated, watched
from torch import nn

from timm_supertickets import Mask, Ticket, load_ticket, prunable
from timm_supertickets.cost import model_cost
from timm_supertickets.search.shrink import gate_, shrink
from timm_supertickets.sparsity.prune import prune
from timm_supertickets.sparsity.scores import magnitude

PREFIX = 'backbone.'


@pytest.fixture(scope='module')
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('scenes') / 'coco', 'coco', train=6, val=4, size=(64, 64))


def a_task(scenes, img_size=64, **settings):
    config = Config(task='detect', dataset='coco', data_dir=str(scenes), batch_size=2, img_size=img_size)
    return Detection(config, **{'width': 16, **settings})


def a_net(task, data, name='supernet_hr_tiny', **args):
    torch.manual_seed(0)
    return task.create_net(partial(timm.create_model, name, width=0.5, **args), data)


class Knowing(nn.Module):
    """Knows the boxes of every image, which are moved by a little, and one that is wrong."""

    def __init__(self, boxes, moved):
        super().__init__()
        self.found = {}
        for i in range(len(boxes)):
            image, target = boxes[i]
            wrong = torch.tensor([[0.0, 0, 5, 5]])
            self.found[image.numpy().tobytes()] = {
                'boxes': torch.cat([target['boxes'] + moved, wrong]),
                'labels': torch.cat([target['labels'], torch.zeros(1, dtype=torch.int64)]),
                'scores': 1 / (2.0 + torch.arange(1 + len(target['boxes']))),
            }

    def forward(self, images):
        return [self.found[image.numpy().tobytes()] for image in images]


def test_results_by_hand():
    found = {
        'boxes': torch.tensor([[1.0, 2, 5, 8], [0, 0, 1, 1], [3, 3, 4, 5]]),
        'labels': torch.tensor([2, 0, 1]),
        'scores': torch.tensor([0.5, 0.9, 0.25]),
    }
    assert results(found, 7, [18, 90]) == [
        {'image_id': 7, 'category_id': 90, 'bbox': [1, 2, 4, 6], 'score': 0.5},
        {'image_id': 7, 'category_id': 18, 'bbox': [3, 3, 1, 2], 'score': 0.25},
    ]
    assert found['boxes'][0].tolist() == [1, 2, 5, 8]


def test_true_boxes_are_perfect(tmp_path):
    _, path = a_coco(tmp_path, [a_box(1), a_box(2, category=18), a_box(3, image_id=3)])

    def found(*kept):
        ones = json.loads(path.read_text())['annotations']
        keys = ('image_id', 'category_id', 'bbox')
        return [{**{key: ones[i][key] for key in keys}, 'score': 0.5} for i in kept]

    assert average_precision(path, found(0, 1, 2), 'bbox') == 1
    assert average_precision(path, found(0, 2), 'bbox') == pytest.approx(0.5)  # one of two categories
    assert average_precision(path, [], 'bbox') == 0
    _, path = a_coco(tmp_path, [])
    box = {'image_id': 3, 'category_id': 18, 'bbox': [1, 2, 3, 4], 'score': 1}
    assert average_precision(path, [box], 'bbox') == 0  # where COCO's evaluator says -1


@pytest.mark.parametrize('moved', [0.0, 2.0])
def test_a_net_that_knows_the_boxes_scores_as_cocos_evaluator_says(tmp_path, scenes, accelerator, moved):
    task = a_task(scenes)
    data = task.create_data(accelerator)
    boxes = data.val.dataset.dataset
    truth = json.loads(boxes.coco.path.read_text())
    expected = []
    for image in truth['images']:
        ones = [one for one in truth['annotations'] if one['image_id'] == image['id']]
        for i, one in enumerate(ones):
            x, y, w, h = one['bbox']
            expected.append({**one, 'bbox': [x + moved, y + moved, w, h], 'score': 1 / (2 + i)})
    net = Knowing(boxes, moved).train()
    found = task.score(net, data, accelerator)
    assert found == pytest.approx(evaluated(boxes.coco.path, expected, tmp_path, 'bbox'))
    assert found == pytest.approx(1) if moved == 0 else 0.2 < found < 0.99
    assert net.training


def test_every_image_counts_once_on_any_processes(scenes, accelerator, monkeypatch):
    task = a_task(scenes)
    data = task.create_data(accelerator)
    net = Knowing(data.val.dataset.dataset, 2.0)
    whole = task.score(net, data, accelerator)
    parts = []
    monkeypatch.setattr(detection, 'gather_object', lambda found: parts.append(copy.deepcopy(found)) or found)
    for i in range(2):
        one = SimpleNamespace(num_processes=2, process_index=i, device='cpu')
        task.score(net, task.create_data(one), one)
    numbers = [{box['image_id'] for box in part} for part in parts]
    assert [len(part) for part in numbers] == [2, 2]
    assert not numbers[0] & numbers[1]
    monkeypatch.setattr(detection, 'gather_object', lambda found: parts[1] + parts[0])
    assert task.score(net, data, accelerator) == whole


@pytest.mark.parametrize('detector', DETECTORS)
def test_every_detector_learns_and_finds(scenes, accelerator, detector):
    task = a_task(scenes, detector=detector)
    data = task.create_data(accelerator)
    net = a_net(task, data).train()
    images, targets = next(iter(data.train))
    loss = task.loss(net, images, targets)
    assert loss.item() > 0
    loss.backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)  # or processes would wait for it
    assert 0 <= task.score(net, data, accelerator) <= 1
    net.eval()
    assert [sorted(found) for found in net(images)] == [['boxes', 'labels', 'scores']] * 2


def test_the_loss_is_the_sum_of_the_detectors(scenes):
    losses = {'a': torch.tensor(1.5), 'b': torch.tensor(2.0)}
    assert a_task(scenes).loss(lambda images, targets: losses, [], []).item() == 3.5


def test_images_are_normalized_and_resized_as_the_weights_know_them(scenes, accelerator):
    known = {'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6)}
    task = a_task(scenes, img_size=96)
    data = task.create_data(accelerator, known)
    assert (data.config['mean'], data.input_size) == ((0.1, 0.2, 0.3), (3, 96, 96))
    transform = a_net(task, data).detector.transform
    assert (transform.image_mean, transform.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert transform([torch.zeros(3, 64, 80)])[0].image_sizes == [(96, 120)]
    assert transform([torch.zeros(3, 64, 640)])[0].image_sizes == [(16, 160)]


@pytest.mark.parametrize(('detector', 'sizes'), [('retinanet', 32), ('fcos', 8), ('faster_rcnn', 32)])
def test_anchors_by_hand(scenes, accelerator, detector, sizes):
    task = a_task(scenes, detector=detector)
    data = task.create_data(accelerator)
    net = a_net(task, data)
    made = net.detector.rpn.anchor_generator if detector == 'faster_rcnn' else net.detector.anchor_generator
    assert [size[0] for size in made.sizes] == [sizes, 2 * sizes, 4 * sizes, 8 * sizes]  # strides 8 to 64
    net.eval()
    levels = net.pyramid_levels(torch.zeros(1, 3, 64, 64))
    assert [level.shape[-1] for level in levels.values()] == [8, 4, 2, 1]


def test_the_backbone_alone_is_searched_and_pruned(scenes, accelerator):
    task = a_task(scenes)
    data = task.create_data(accelerator)
    net = a_net(task, data)
    inner = {PREFIX + name for name in prunable(net.backbone)}
    assert set(prunable(net)) == inner
    groups = net.channel_groups()
    assert len(groups) == len(net.backbone.channel_groups())
    names = set(dict(net.named_parameters()))
    assert all(group.gate in names and group.gate.startswith(PREFIX) for group in groups)
    assert len(names) == len(list(net.parameters()))  # no weight has two names
    part, mask = ticket_part(net, Mask.dense(prunable(net)))
    assert part is net.backbone
    assert set(mask) == set(prunable(part))
    cost = model_cost(net, data.input_size)
    assert 0 < searched_macs(net, cost) < cost.macs
    plain = timm.create_model('supernet_hr_tiny', width=0.5)
    assert searched_macs(plain, model_cost(plain, (3, 64, 64))) == model_cost(plain, (3, 64, 64)).macs


def test_a_shrunk_net_finds_what_the_gated_one_does(scenes, accelerator):
    task = a_task(scenes)
    data = task.create_data(accelerator)
    net = a_net(task, data).double()
    keep = {group.gate: torch.arange(group.channels) % 2 == 0 for group in net.channel_groups()}
    gated = copy.deepcopy(net)
    small = shrink(net, keep)
    assert small.detector.backbone.net is small
    assert gated.detector.backbone.net is gated
    gate_(gated, keep)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    for one, other, wide in zip(
        *(model.eval().pyramid_levels(x).values() for model in (small, gated, net)), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-10)
        assert not torch.allclose(one, wide, atol=1e-10)


def test_batch_norm_is_measured_on_all_images_of_a_batch(scenes, accelerator, monkeypatch):
    task = a_task(scenes)
    data = task.create_data(accelerator)
    net = a_net(task, data)
    run = train.Run(Config(recalibrate=1), task, accelerator, data, None, '', {})
    seen = []
    forward = BoxNet.pyramid_levels
    monkeypatch.setattr(BoxNet, 'pyramid_levels', lambda self, x: seen.append(x) or forward(self, x))
    train.recalibrate(run, net)
    (images, _), *_ = batches(data.train, 1, 0)
    assert [x.shape for x in seen] == [(2, 3, 64, 64)]
    expected = net.backbone.conv_stem(torch.stack([(image - 0.5) / 0.5 for image in images])).mean((0, 2, 3))
    assert torch.allclose(net.backbone.bn1.running_mean, expected, atol=1e-5)


@pytest.mark.parametrize(
    ('settings', 'says'),
    [
        ({'detector': 'yolo'}, "detector 'yolo' is unknown; choose from fcos, retinanet, faster_rcnn"),
        ({'anchor': 0.0}, 'anchor must be above 0, got 0.0'),
        ({'finest': 0}, 'finest must be at least 1, got 0'),
        ({'width': 20}, 'width must be a multiple of 8, got 20'),
    ],
)
def test_bad_settings_are_one_clear_line(settings, says):
    with pytest.raises(ValueError, match=says):
        Detection(Config(), **settings)


def test_bad_data_is_one_clear_line(tmp_path, accelerator):
    a_coco(tmp_path, [a_box(1, category=18)], categories=[{'id': 18, 'name': 'cat'}])
    (tmp_path / 'train2017').rename(tmp_path / 'val2017')
    annotations = tmp_path / 'annotations'
    (annotations / 'instances_train2017.json').rename(annotations / 'instances_val2017.json')
    a_coco(tmp_path, [a_box(1)])
    with pytest.raises(ValueError, match=r'train2017.json and .*val2017.json have other categories than each other'):
        a_task(tmp_path).create_data(accelerator)


def test_a_backbone_without_coarse_maps_is_one_clear_line(scenes, accelerator):
    task = a_task(scenes, finest=64)
    with pytest.raises(
        ValueError, match=r'MixedHRNet has maps at 1/4, 1/8, 1/16, 1/32 of the input, .* 1/64 or coarse'
    ):
        a_net(task, task.create_data(accelerator))


def test_a_run_draws_a_ticket(scenes, tmp_path, monkeypatch):
    masks = watched(monkeypatch)
    output = tmp_path / 'run'
    where = ['task=detect', 'dataset=coco', f'data_dir={scenes}', f'output={output}', 'batch_size=2', 'img_size=64']
    what = ['model=supernet_mbv2_tiny', 'model_args={width: 0.5}', 'task_args={width: 16}', 'lr=0.01']
    train.main([*FEW, *where, *what, 'targets=[0.5,0.8]'])
    rows = list(csv.DictReader((output / 'summary.csv').read_text().splitlines()))
    assert [row['name'] for row in rows] == ['superticket_mbv2_s50', 'trunk', 'superticket_mbv2_s80', 'trunk']
    for row in rows:
        assert 0 <= float(row['box_ap']) <= 1
    for name, sparsity in (('superticket_mbv2_s50', 0.5), ('superticket_mbv2_s80', 0.8)):
        ticket = load_ticket(output / name)
        net = ticket.build()
        assert net.num_classes == 0
        assert channels(ticket.arch) < channels(net.supernet_arch())
        assert {PREFIX + key: alive.tolist() for key, alive in ticket.mask.items()} == {
            key: alive.tolist() for key, alive in masks[name].items()
        }
        assert ticket.mask.total - ticket.mask.alive == round(sparsity * ticket.mask.total)
        assert ticket.mask.total == sum(weight.numel() for weight in prunable(net).values())
        assert ticket.facts['box_ap'] == pytest.approx(
            next(float(row['box_ap']) for row in rows if row['name'] == name)
        )


def test_a_ticket_is_put_to_work_with_its_mask_kept(scenes, tmp_path):
    torch.manual_seed(0)
    net = timm.create_model('supernet_mbv2_tiny', width=0.5)
    drawn = Ticket.draw(net, prune(magnitude(net), 0.7))
    drawn.save(tmp_path / 'drawn')
    few = [arg for arg in FEW if arg.split('=')[0] in {field.name for field in fields(detect.Config)}]
    where = ['dataset=coco', f'data_dir={scenes}', 'batch_size=2', f'output={tmp_path / "run"}']
    detect.main([*few, *where, 'task_args={width: 16}', 'img_size=64', f'ticket={tmp_path / "drawn"}'])
    ticket = load_ticket(tmp_path / 'run/superticket_mbv2_s70')
    assert {name: alive.tolist() for name, alive in ticket.mask.items()} == {
        name: alive.tolist() for name, alive in drawn.mask.items()
    }
    assert not torch.equal(ticket.weights['blocks.0.0.conv_pw.weight'], drawn.weights['blocks.0.0.conv_pw.weight'])
    assert (tmp_path / 'run/predictions.png').read_bytes()[:4] == b'\x89PNG'
