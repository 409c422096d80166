import contextlib
import io
import json

import numpy as np
import pytest
import torch
from parts.boxes import Boxes, collate_boxes, training
from parts.coco import coco_paths, read_coco
from parts.joints import Joints
from parts.scenes import PERSON, write_scenes
from PIL import Image
from pycocotools.coco import COCO


def a_box(number, image_id=7, box=(1, 2, 4, 3), category=90, crowd=0, **more):
    area = box[2] * box[3] / 2 if len(box) == 4 else 0
    return {
        'id': number, 'image_id': image_id, 'category_id': category, 'bbox': list(box), 'area': area, 'iscrowd': crowd,
        'segmentation': [], **more,
    }  # fmt: skip


def a_coco(folder, annotations, kind='instances', **changes):
    """Two images of 10x8, 7 and 3 by number, and categories 90 and 18 as COCO's: not in a row."""
    (folder / 'train2017').mkdir(parents=True, exist_ok=True)
    (folder / 'annotations').mkdir(exist_ok=True)
    images = [{'id': i, 'file_name': f'{i:012d}.jpg', 'width': 10, 'height': 8} for i in (7, 3)]
    for image in images:
        pixels = np.zeros((8, 10, 3), np.uint8)
        pixels[:, :5] = 200
        Image.fromarray(pixels).save(folder / 'train2017' / image['file_name'], quality=95)
    categories = [{'id': 90, 'name': 'toothbrush'}, {'id': 18, 'name': 'dog'}]
    if kind == 'person_keypoints':
        categories = [{'id': 1, 'name': 'person', 'keypoints': PERSON, 'skeleton': []}]
    content = {'images': images, 'annotations': annotations, 'categories': categories, **changes}
    (folder / 'annotations' / f'{kind}_train2017.json').write_text(json.dumps(content))
    return coco_paths(folder, 'train', kind)


def quiet_coco(path):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('scenes') / 'coco', 'coco', train=12, val=3)


def test_targets_by_hand(tmp_path):
    paths = a_coco(tmp_path, [a_box(1), a_box(2, box=(8, -1, 4, 5), category=18), a_box(3, crowd=1)])
    data = Boxes(*paths)
    assert (data.labels, data.category_ids) == (['dog', 'toothbrush'], [18, 90])
    image, target = data[0]
    assert image.shape == (3, 8, 10)
    assert image[:, 4, 2].tolist() == pytest.approx([200 / 255] * 3, abs=0.02)
    assert target['boxes'].tolist() == [[1, 2, 5, 5], [8, 0, 10, 4]]
    assert target['labels'].tolist() == [2, 1]
    assert target['area'].tolist() == [6, 10]
    assert target['iscrowd'].tolist() == [0, 0]
    assert target['image_id'].item() == 7
    assert all(type(value) is torch.Tensor for value in target.values())
    assert Boxes(*paths, crowds=True)[0][1]['iscrowd'].tolist() == [0, 0, 1]


def test_images_without_boxes(tmp_path):
    paths = a_coco(tmp_path, [a_box(1), a_box(2, image_id=3, crowd=1)])
    data = Boxes(*paths)
    assert [data[i][1]['image_id'].item() for i in range(len(data))] == [7, 3]
    assert data[1][1]['boxes'].shape == (0, 4)
    assert data[1][1]['labels'].dtype == torch.int64
    assert [len(Boxes(*paths, skip_empty=True)), len(Boxes(*paths, skip_empty=True, crowds=True))] == [1, 2]
    with pytest.raises(ValueError, match='has no images with boxes'):
        Boxes(*a_coco(tmp_path, []), skip_empty=True)


def test_a_flip_of_an_image_and_its_boxes(tmp_path):
    image, target = Boxes(*a_coco(tmp_path, [a_box(1)]), transform=training(1.0))[0]
    assert target['boxes'].tolist() == [[5, 2, 9, 5]]
    assert image[0, 4, 2] < 0.1 < image[0, 4, 7]
    images, targets = collate_boxes([(image, target)] * 2)
    assert (len(images), len(targets)) == (2, 2)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_boxes_as_pycocotools_reads_them(scenes, split):
    data, theirs = Boxes(*coco_paths(scenes, split)), quiet_coco(coco_paths(scenes, split)[1])
    assert len(data) == len(theirs.imgs)
    for i in range(len(data)):
        image, target = data[i]
        found = theirs.loadAnns(theirs.getAnnIds(target['image_id'].item()))
        x, y, w, h = np.array([one['bbox'] for one in found]).T
        assert target['boxes'].tolist() == np.stack([x, y, x + w, y + h], 1).tolist()
        assert target['area'].tolist() == [theirs.annToMask(one).sum() for one in found]
        assert [data.category_ids[label - 1] for label in target['labels']] == [one['category_id'] for one in found]
        assert image.shape[1:] == theirs.annToMask(found[0]).shape


def test_a_detector_of_torchvision_takes_them(scenes):
    from torchvision.models.detection import fcos_resnet50_fpn

    data = Boxes(*coco_paths(scenes, 'train'))
    net = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=1 + len(data.labels), min_size=64)
    losses = net(*collate_boxes([data[0], data[1]]))
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize(
    ('annotations', 'changes', 'says'),
    [
        (
            [
                {**a_box(i), 'bbox': box}
                for i, box in enumerate([None, [1, 2, 3], [1, 2, 3, '4'], [1, 2, 3, float('inf')]])
            ],
            {},
            r"2017.json has 4 values of another kind than COCO's \(annotations\[0\]: bbox None is not four numbers,"
            r' annotations\[1\]: bbox \[1, 2, 3\] is not four numbers, annotations\[2\]: .*, \.\.\.\)$',
        ),
        (
            [a_box(1, image_id='x')],
            {'images': [{'id': 'x', 'file_name': '000000000007.jpg', 'width': 10, 'height': 8}]},
            r"2 values .* \(images\[0\]: id 'x' is not an integer, annotations\[0\]: image_id 'x' is not an integer\)",
        ),
        (
            [],
            {'images': [{'id': 1, 'file_name': None, 'width': '10', 'height': 8}, 5]},
            r"has 2 values .* file_name None is not text, .* width '10' is not a number\); 1 .* lack .*\[1\]: id and",
        ),
        (
            [a_box(1, category=1), a_box(2, image_id=5)],
            {},
            r'1 labels outside of the 2 categories \(annotation 1: 1\); 1 annotations of an image that is not listed '
            r'\(annotation 2: 5\)',
        ),
        (
            [],
            {'images': [{'id': 1, 'file_name': 'no.jpg', 'width': 1, 'height': 1}]},
            r'1 images that are missing \(.*train2017/no.jpg\)',
        ),
        (
            [],
            {'images': [{'id': 1, 'file_name': '000000000007.jpg', 'width': 8, 'height': 10}]},
            r'1 images of another size than it says \(.*07.jpg: 10x8, not 8x10\)',
        ),
        ([{'id': 1, 'bbox': []}], {}, r'1 entries that lack fields \(annotations\[0\]: image_id and category_id and'),
        ([], {'images': None, 'categories': {}}, r"2 lists of COCO's format missing \(images, categories\)"),
        (
            [a_box(1, category=18, keypoints=[1, 1, 2])],
            {'categories': [{'id': 18, 'name': 'x', 'keypoints': ['a', 'b']}]},
            r'1 keypoints that are not x, y, 0 to 2 for each of the names \(annotation 1\)',
        ),
        (
            [a_box(1, category=18, keypoints=[1, 1, 3])],
            {'categories': [{'id': 18, 'name': 'x', 'keypoints': ['a']}]},
            r'1 keypoints that are not',
        ),
        (
            [a_box(1, category=18, keypoints=None)],
            {'categories': [{'id': 18, 'name': 'x', 'keypoints': None}]},
            r'1 keypoints that are not',
        ),
    ],
)
def test_bad_annotations_are_one_clear_line(tmp_path, annotations, changes, says):
    with pytest.raises(ValueError, match=says) as caught:
        read_coco(*a_coco(tmp_path, annotations, **changes))
    assert '\n' not in str(caught.value)


def test_broken_files(tmp_path):
    images, path = a_coco(tmp_path, [])
    (images / '000000000003.jpg').write_bytes(b'no')
    with pytest.raises(ValueError, match=r'1 images that cannot be read \(.*03.jpg: cannot identify'):
        read_coco(images, path)
    assert len(read_coco(images, path, check=False).images) == 2
    path.write_text('{')
    with pytest.raises(ValueError, match=r'train2017.json is not readable as JSON'):
        read_coco(images, path)
    path.write_text('[]')
    with pytest.raises(ValueError, match=r"has 3 lists of COCO's format missing \(images, annotations, categories\)"):
        read_coco(images, path)


def test_an_image_that_ends_early_is_named(tmp_path):
    images, path = a_coco(tmp_path, [a_box(1)])
    file = images / '000000000007.jpg'
    file.write_bytes(file.read_bytes()[:-20])
    data = Boxes(images, path)  # which reads no more than its head
    with pytest.raises(ValueError, match=r'train2017/000000000007.jpg cannot be read: image file is truncated'):
        data[0]


@pytest.mark.parametrize(
    'box',
    [(1, 1, 0, 3), (10, 1, 2, 2), (1, -3, 2, 3), (2, 2, -1, 3), (5, 2, 1e-7, 3), (0, 2, 1e-7, 3), (0, -1, 3, 1 + 1e-7)],
)
def test_empty_boxes_are_left_out(tmp_path, box):
    """Torchvision's detectors refuse boxes whose edges are one in float32, also after a flip."""
    paths = a_coco(tmp_path, [a_box(1, box=box), a_box(2), a_box(3, box=(9.99, 0, 1, 0.01))])
    _, target = Boxes(*paths, transform=training(1.0))[0]
    assert len(target['boxes']) == 2
    assert (target['boxes'][:, 2:] > target['boxes'][:, :2]).all()


def test_wrong_layouts_say_what_was_expected_where(tmp_path):
    with pytest.raises(ValueError, match=r'like COCO: no val2017/ in it; expected val2017/\*.jpg and annotations/inst'):
        coco_paths(tmp_path, 'val')
    a_coco(tmp_path, [])
    with pytest.raises(ValueError, match=r'no annotations/person_keypoints_train2017.json in it; expected train2017/'):
        coco_paths(tmp_path, 'train', 'person_keypoints')
    with pytest.raises(ValueError, match="split must be train or val, got 'test'"):
        coco_paths(tmp_path, 'test')
    with pytest.raises(ValueError, match='has 0 categories that name keypoints; expected one'):
        Joints(*coco_paths(tmp_path, 'train'))
