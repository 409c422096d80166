import json

import numpy as np
import pytest
import torch
from parts.coco import coco_paths
from parts.joints import Joints, crop_matrix, flip_order, to_image
from parts.scenes import PERSON, write_scenes
from PIL import Image
from test_boxes import a_box, a_coco, quiet_coco

ORDER = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]


def a_person(number, points, **more):
    full = np.zeros((17, 3))
    for i, point in points.items():
        full[i] = point
    return a_box(number, category=1, keypoints=full.ravel().tolist(), num_keypoints=len(points), **more)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('scenes') / 'coco', 'coco', train=12, val=3)


def test_left_and_right_change_places():
    assert flip_order(PERSON) == ORDER
    assert flip_order(['tail', 'left_ear', 'right_ear', 'left_horn']) == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ('box', 'size', 'corners'),
    [
        ((10, 20, 30, 40), (256, 192), (25 - 18.75, 40 - 25, 25 + 18.75, 40 + 25)),  # 3:4 already; enlarged by 1.25
        ((10, 20, 3, 40), (64, 48), (11.5 - 18.75, 40 - 25, 11.5 + 18.75, 40 + 25)),  # too narrow
        ((10, 20, 60, 40), (64, 48), (40 - 37.5, 40 - 50, 40 + 37.5, 40 + 50)),  # too wide
    ],
)
def test_crops_by_hand(box, size, corners):
    matrix = crop_matrix(box, size)
    assert (matrix @ [0, 0, 1]).tolist() == pytest.approx(corners[:2])
    assert (matrix @ [size[1], size[0], 1]).tolist() == pytest.approx(corners[2:])


def test_a_turn_by_hand():
    matrix = crop_matrix((0, 0, 30, 40), (40, 30), scale=2 / 1.25, rotation=90)
    assert (matrix @ [15, 20, 1]).tolist() == pytest.approx([15, 20])  # the middle stays
    assert (matrix @ [30, 20, 1]).tolist() == pytest.approx([15, -10])  # what was above is on the right, half as large


def test_joints_by_hand(tmp_path):
    people = [
        a_person(1, {0: (3, 2, 2), 1: (5, 4, 1), 2: (2, 4, 2)}, box=(2, 1, 6, 6)),
        a_person(2, {}),
        a_person(3, {0: (1, 1, 2)}, crowd=1),
    ]
    data = Joints(*a_coco(tmp_path, people, 'person_keypoints'), size=(40, 30), mean=[0] * 3, std=[1] * 3)
    assert (len(data), data.labels, data.order, data.category_id) == (1, list(PERSON), ORDER, 1)
    item = data[0]
    # 6 wide becomes 7.5 by 10 pixels around (5, 4): four pixels of the crop for each
    assert item['points'][:3].tolist() == [[4 * (3.5 - 1.25), 4 * (2.5 + 1)], [4 * (5.5 - 1.25), 22], [5, 22]]
    assert item['weights'].tolist() == [1, 1, 1] + [0] * 14
    assert (item['image_id'].item(), item['id'].item()) == (7, 1)
    assert item['image'].shape == (3, 40, 30)
    assert item['image'][0, 20, [2, 12, 18, 28]].tolist() == pytest.approx([200 / 255, 200 / 255, 0, 0], abs=0.03)
    assert item['image'][0, 2].max() == 0  # above the image


def test_what_cocos_evaluator_reads_must_be_there(tmp_path):
    people = [*(a_person(i, {0: (3, 2, 2)}) for i in range(3)), a_box(3, box=(1, 1, 0, 1), category=1)]
    del people[0]['keypoints'], people[1]['num_keypoints']
    says = r'3 entries .* \(.*\[0\]: keypoints, .*\[1\]: num_keypoints, .*\[3\]: keypoints and num_keypoints\)'
    with pytest.raises(ValueError, match=says) as caught:
        Joints(*a_coco(tmp_path, people, 'person_keypoints'))
    assert '\n' not in str(caught.value)
    people = [{**a_person(1, {0: (3, 2, 2)}), 'num_keypoints': None}]
    with pytest.raises(ValueError, match=r'1 values .* \(annotations\[0\]: num_keypoints None is not an integer\)'):
        Joints(*a_coco(tmp_path, people, 'person_keypoints'))


def test_a_flipped_crop_by_hand(tmp_path):
    people = [a_person(1, {0: (3, 2, 2), 1: (5, 4, 1)}, box=(2, 1, 6, 6))]
    paths = a_coco(tmp_path, people, 'person_keypoints')
    plain, flipped = (Joints(*paths, size=(40, 30), hflip=p)[0] for p in (0.0, 1.0))
    assert torch.equal(flipped['image'], plain['image'].flip(-1))
    assert flipped['points'][0].tolist() == [30 - plain['points'][0, 0].item(), plain['points'][0, 1].item()]
    assert flipped['points'][2].tolist() == [30 - plain['points'][1, 0].item(), plain['points'][1, 1].item()]
    assert flipped['weights'][:3].tolist() == [1, 0, 1]


def test_points_come_back_to_where_they_were(scenes):
    paths = coco_paths(scenes, 'train', 'person_keypoints')
    data = Joints(*paths, size=(64, 48), scale=0.35, rotation=45, hflip=0.5)
    theirs = quiet_coco(paths[1])
    torch.manual_seed(0)
    items = [data[i] for i in range(len(data))]
    assert len(items) == len(theirs.anns)
    assert len({tuple(item['matrix'][0, :2].tolist()) for item in items}) == len(items)  # each its own chance
    back = to_image(torch.stack([i['points'] for i in items]), torch.stack([i['matrix'] for i in items]))
    mirrored = 0
    for item, points in zip(items, back, strict=True):
        expected = torch.tensor(theirs.anns[item['id'].item()]['keypoints']).reshape(17, 3)
        if torch.det(item['matrix'][:, :2]) < 0:
            expected = expected[ORDER]
            mirrored += 1
        assert (item['weights'] == (expected[:, 2] > 0)).all()
        torch.testing.assert_close(points, expected[:, :2], atol=1e-3, rtol=0)
    assert 0.3 < mirrored / len(items) < 0.7


def test_a_crop_shows_the_point_where_it_says(tmp_path):
    """A bright pixel is found again in every crop, whatever its scale, turn and flip."""
    paths = a_coco(tmp_path, [a_person(1, {0: (6, 3, 2)}, box=(1, 0, 8, 8))], 'person_keypoints')
    pixels = np.zeros((8, 10, 3), np.uint8)
    pixels[3, 6] = 255
    Image.fromarray(pixels).save(paths[0] / '000000000007.png')
    content = json.loads(paths[1].read_text())
    content['images'][0]['file_name'] = '000000000007.png'
    paths[1].write_text(json.dumps(content))
    data = Joints(*paths, size=(64, 48), scale=0.3, rotation=40, hflip=0.5, mean=[0] * 3, std=[1] * 3)
    for seed in range(10):
        torch.manual_seed(seed)
        item = data[0]
        light = item['image'][0].double()
        middles = [torch.arange(n, dtype=torch.float64) + 0.5 for n in light.shape]
        found = [(light.sum(0) * middles[1]).sum() / light.sum(), (light.sum(1) * middles[0]).sum() / light.sum()]
        assert item['points'][0].tolist() == pytest.approx([v.item() for v in found], abs=0.2)


def test_scale_and_rotation_cover_their_range(scenes):
    paths = coco_paths(scenes, 'train', 'person_keypoints')
    plain, data = Joints(*paths, size=(64, 48)), Joints(*paths, size=(64, 48), scale=0.3, rotation=20)
    step = plain[0]['matrix'][0, 0]
    assert plain[0]['matrix'][0, 1] == 0
    torch.manual_seed(0)
    cos, sin = torch.stack([data[0]['matrix'][0, :2] for _ in range(200)]).T
    factors, turns = torch.hypot(cos, sin) / step, torch.rad2deg(torch.atan2(sin, cos))
    assert [factors.min().item(), factors.max().item()] == pytest.approx([0.7, 1.3])
    assert [turns.min().item(), turns.max().item()] == pytest.approx([-40, 40])  # cut at 2 standard deviations
    assert 0.5 < (turns != 0).float().mean() < 0.7


def test_chance_depends_on_the_seed_alone(scenes):
    paths = coco_paths(scenes, 'train', 'person_keypoints')
    data = Joints(*paths, size=(64, 48), scale=0.35, rotation=45, hflip=0.5)
    shown = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        shown.append(data[0]['matrix'])
    assert torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[0], shown[2])
