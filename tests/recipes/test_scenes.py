import contextlib
import hashlib
import io
import json
from functools import partial

import numpy as np
import pytest
from accelerate import Accelerator
from parts import scenes
from parts.classification import FASHION_MNIST_LABELS, Pictures
from parts.coco import coco_paths, read_coco
from parts.config import Config
from parts.pixels import read_pixels
from parts.scenes import compose, dataset_folder, run_lengths, seventeen_points, write_scenes
from PIL import Image
from pycocotools import mask as pymask
from pycocotools.coco import COCO
from test_classification import fake_fashion

SMALL = {'train': 4, 'val': 2, 'size': (48, 64)}


def digest(folder):
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def quiet_coco(path):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('scenes') / 'coco', 'coco', train=30, val=5)


@pytest.mark.parametrize('layout', scenes.WRITERS)
def test_a_seed_gives_the_same_bytes(tmp_path, layout):
    first, again, other, more = (
        digest(write_scenes(tmp_path / str(i), layout, **{**SMALL, **changes}))
        for i, changes in enumerate([{}, {}, {'seed': 1}, {'train': 5}])
    )
    assert first == again
    pictures = [name for name in first if name.endswith(('.png', '.jpg'))]
    assert len(pictures) == 6 * (1 if layout == 'coco' else 2)
    assert all(first[name] != other[name] for name in pictures if 'gtFine' not in name and 'annotations' not in name)
    assert all(first[name] == more[name] for name in pictures)  # a scene does not depend on how many there are


def test_layouts_do_not_show_the_same_scenes(tmp_path):
    shown = []
    for layout in ('cityscapes', 'ade20k'):
        data = read_pixels(layout, write_scenes(tmp_path / layout, layout, **SMALL), 'train')
        shown.append(data[0][1].shape)
        shown.append([data[i][1].ne(data[i][1][0, 0]).float().mean().item() for i in range(4)])
    assert shown[0] == shown[2] == (48, 64)
    assert all(a != b for a, b in zip(shown[1], shown[3], strict=True))


def test_the_test_split_shows_held_out_scans_only(tmp_path, monkeypatch):
    whole = np.full((6, 8, 8), 255, np.uint8)
    splits = [Pictures(whole, np.array([0, 1, 2] * 2), 'L'), Pictures(whole, np.array([7, 8, 9] * 2), 'L')]
    monkeypatch.setattr(scenes, 'digits', lambda mode: (*splits, list('0123456789')))
    folder = write_scenes(tmp_path / 'x', 'ade20k', train=20, val=20)
    for split, labels in (('train', {0, 1, 2}), ('val', {7, 8, 9})):
        data = read_pixels('ade20k', folder, split)
        assert set(np.concatenate([np.unique(data[i][1]) for i in range(20)])) == {*labels, 10}  # and background


def test_cityscapes_as_torchvision_reads_it(tmp_path):
    from torchvision.datasets import Cityscapes

    folder = write_scenes(tmp_path / 'x', 'cityscapes', **SMALL)
    train_id = {c.id: c.train_id for c in Cityscapes.classes}
    for split, count in (('train', 4), ('val', 2)):
        theirs, ours = Cityscapes(folder, split, 'fine', 'semantic'), read_pixels('cityscapes', folder, split)
        assert len(theirs) == len(ours) == count
        names = [item['image'].name for item in ours.items]
        for path, target in zip(theirs.images, theirs.targets, strict=True):
            values, mask = np.asarray(Image.open(target[0])), ours[names.index(path.rsplit('/', 1)[1])][1]
            assert values.shape == (48, 64)
            assert set(np.unique(values)) <= {7, 19, 20, 24, 25, 26, 27, 28, 31, 32, 33}
            assert (mask.numpy() == np.vectorize(train_id.get)(values)).all()


def test_recipes_know_scenes_of_both_kinds_of_scans(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scenes, 'FASHION_MNIST', tmp_path)
    monkeypatch.setattr(scenes, 'write_scenes', partial(write_scenes, **SMALL))  # fewer
    config = Config(task='detect', dataset='fashion_scenes', batch_size=1)
    with pytest.raises(ValueError, match='; `apt install dataset-fashion-mnist` puts it'):
        dataset_folder(config, Accelerator(cpu=True), 'coco', ['coco'])
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]
    fake_fashion(tmp_path)
    folders = [
        dataset_folder(Config(task='detect', dataset=name, batch_size=1), Accelerator(cpu=True), 'coco', ['coco'])
        for name in ('scenes', 'fashion_scenes')
    ]
    assert folders == ['output/scenes/coco', 'output/fashion_scenes/coco']
    digits, fashion = (read_coco(*coco_paths(folder, 'val')).labels for folder in folders)
    assert digits == list('0123456789')
    assert fashion == list(FASHION_MNIST_LABELS)


def test_ade20k_names_what_is_there(tmp_path):
    folder = write_scenes(tmp_path / 'x', 'ade20k', **SMALL)
    lines = (folder / 'ADEChallengeData2016' / 'objectInfo150.txt').read_text().splitlines()
    assert lines[0].split('\t') == ['Idx', 'Ratio', 'Train', 'Val', 'Name']
    rows = [line.split('\t') for line in lines[1:]]
    assert [row[-1] for row in rows] == [*'0123456789', 'background']
    shown = []
    for column, split, count in ((2, 'train', 4), (3, 'val', 2)):
        data = read_pixels('ade20k', folder, split)
        assert data.labels == [*'0123456789', 'background']
        masks = [data[i][1] for i in range(count)]
        assert [int(row[column]) for row in rows] == [sum(bool((m == i).any()) for m in masks) for i in range(11)]
        shown += masks
    shares = [np.mean([(m == i).float().mean() for m in shown]) for i in range(11)]
    assert [float(row[1]) for row in rows] == pytest.approx(shares, abs=6e-5)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_coco_as_pycocotools_reads_it(coco, split):
    boxes, people = (quiet_coco(coco_paths(coco, split, kind)[1]) for kind in ('instances', 'person_keypoints'))
    assert sorted(boxes.anns) == sorted(people.anns)
    assert boxes.getCatIds() == list(range(1, 11))
    assert [c['name'] for c in people.loadCats(people.getCatIds())] == ['person']
    for image_id in boxes.imgs:
        shown = 0
        for one in boxes.loadAnns(boxes.getAnnIds(image_id)):
            mask = boxes.annToMask(one)
            assert mask.sum() == one['area'] > 0
            assert pymask.toBbox(boxes.annToRLE(one)).tolist() == one['bbox']
            shown = shown + mask
            person = people.anns[one['id']]
            assert all(person[key] == one[key] for key in ('bbox', 'area', 'segmentation', 'image_id', 'iscrowd'))
            x, y, v = np.array(person['keypoints']).reshape(17, 3).T
            assert person['num_keypoints'] == (v > 0).sum() >= 9
            assert (x[v == 0] == 0).all()
            left, top, width, height = one['bbox']
            seen = v == 2
            assert ((x >= left) & (x <= left + width - 1) & (y >= top) & (y <= top + height - 1))[seen].all()
        assert np.max(shown) == 1  # a pixel belongs to one thing


def test_coco_has_hidden_points_and_cut_ones(coco):
    found = [a['keypoints'][2::3] for a in quiet_coco(coco_paths(coco, 'train', 'person_keypoints')[1]).anns.values()]
    share = np.bincount(np.ravel(found), minlength=3) / np.size(found)
    assert 0 < share[0] < 0.2
    assert 0 < share[1] < 0.1
    ids = [set(quiet_coco(coco_paths(coco, split)[1]).anns) for split in ('train', 'val')]
    assert not ids[0] & ids[1]
    assert read_coco(*coco_paths(coco, 'val')).images[0]['file_name'] == '000000500001.jpg'


def test_images_show_the_ink_where_the_masks_say(coco):
    data = quiet_coco(coco_paths(coco, 'train')[1])
    for image in data.imgs.values():
        light = np.asarray(Image.open(coco / 'train2017' / image['file_name']).convert('L'), float)
        ink = sum(data.annToMask(one) for one in data.loadAnns(data.getAnnIds(image['id']))) > 0
        assert light[ink].mean() > 2 * light[~ink].mean()


def test_seventeen_points_by_hand():
    ink = np.zeros((20, 30), bool)
    ink[2:18, 10:20] = True  # eight bands of two rows
    ink[4:6, 10:20] = False  # the second has none
    ink[2, 12:15] = ink[3, 10:12] = False  # the first's rows begin at 10 and 12
    points = seventeen_points(ink)
    rows = np.concatenate([np.full(n, y) for y, n in zip(range(2, 18), ink.sum(1)[2:18], strict=True)])
    assert points[0] == pytest.approx([np.nonzero(ink)[1].mean(), rows.mean()])
    assert points[1].tolist() == [19, 2.5]  # left eye: on the right
    assert points[2].tolist() == [11, 2.5]  # right eye: (10 + 12) / 2
    assert np.isnan(points[3:5]).all()
    assert points[5:7].tolist() == [[19, 6.5], [10, 6.5]]
    assert points[15:].tolist() == [[19, 16.5], [10, 16.5]]


def test_a_mirror_exchanges_left_and_right(coco):
    people = quiet_coco(coco_paths(coco, 'train', 'person_keypoints')[1])
    order = [0, *(i + 1 if i % 2 else i - 1 for i in range(1, 17))]
    for one in list(people.anns.values())[:10]:
        ink = people.annToMask(one).astype(bool)
        points, mirrored = seventeen_points(ink), seventeen_points(ink[:, ::-1])
        points[:, 0] = ink.shape[1] - 1 - points[:, 0]
        np.testing.assert_allclose(points[order], mirrored)


def test_points_are_hidden_by_others_and_end_at_the_edge():
    owner = np.full((10, 10), -1)
    owner[:, 5] = 1
    points = np.full((17, 2), 3.0)
    points[1], points[2], points[3], points[4], points[5] = (5, 2), (4.6, 2), (9.01, 2), (2, -0.01), (np.nan, 1)
    found = scenes._seen(points, owner, 0)
    assert found[:6].tolist() == [[3, 3, 2], [5, 2, 1], [4.6, 2, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert scenes._seen(points, owner, 1)[1].tolist() == [5, 2, 2]


def test_things_keep_most_of_their_ink():
    scans, labels = np.full((30, 8, 8), 255, np.uint8), np.arange(30) % 10
    for seed in range(2):
        scene = compose(np.random.default_rng(seed), scans, labels, (64, 64))
        sides = [max(thing.box[2:]) for thing in scene.things]
        assert 2 <= len(scene.things) < 30  # there is no room for all
        assert min(thing.ink.sum() for thing in scene.things) >= 0.8 * (8 / 10 * 0.35 * 64) ** 2
        assert max(sides) <= 0.55 * 64 * 1.25  # a square turned by 15 degrees


@pytest.mark.parametrize('first', [0, 1])
def test_run_lengths_as_pycocotools_has_them(first):
    mask = np.random.default_rng(0).random((7, 5)) < 0.5
    mask[0, 0] = first
    counts = run_lengths(mask)
    assert (counts[0] == 0) == bool(first)
    theirs = pymask.decode(pymask.frPyObjects({'counts': counts, 'size': [7, 5]}, 7, 5))
    assert (theirs == mask).all()


def test_scenes_of_fashion_mnist(tmp_path):
    fake_fashion(tmp_path)
    folder = write_scenes(tmp_path / 'x', 'coco', scans='fashion_mnist', data_dir=tmp_path, **SMALL)
    assert read_coco(*coco_paths(folder, 'val')).labels[:2] == ['T-shirt/top', 'Trouser']


def test_scenes_are_written_once(tmp_path):
    (tmp_path / 'deep' / 'x').mkdir(parents=True)  # an empty folder is as good as none
    folder = write_scenes(tmp_path / 'deep' / 'x', 'coco', **SMALL)
    (folder / 'train2017' / '000000000001.jpg').unlink()
    assert write_scenes(folder, 'coco', **SMALL) == folder
    assert not (folder / 'train2017' / '000000000001.jpg').exists()
    with pytest.raises(ValueError, match=r'already holds other scenes \(train is 4 there, 5 here\); choose another'):
        write_scenes(folder, 'coco', **{**SMALL, 'train': 5})
    with pytest.raises(ValueError, match=r'deep holds something that is not scenes \(scenes.json is missing\)'):
        write_scenes(folder.parent, 'coco', **SMALL)


def test_a_broken_run_leaves_nothing(tmp_path, monkeypatch):
    def breaks(folder, found, names):
        next(found['train'])
        (folder / 'half').write_text('')
        raise OSError('disk full')

    monkeypatch.setitem(scenes.WRITERS, 'coco', breaks)
    with pytest.raises(OSError, match='disk full'):
        write_scenes(tmp_path / 'x', 'coco', **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('same', [True, False])
def test_another_process_may_be_faster(tmp_path, monkeypatch, same):
    folder = tmp_path / 'x'

    def slow(temporary, found, names):
        folder.mkdir()
        about = json.loads((about_of / scenes.ABOUT).read_text())
        (folder / scenes.ABOUT).write_text(json.dumps(about if same else {**about, 'seed': 9}))

    about_of = write_scenes(tmp_path / 'y', 'coco', **SMALL)
    monkeypatch.setitem(scenes.WRITERS, 'coco', slow)
    with contextlib.nullcontext() if same else pytest.raises(ValueError, match='seed is 9 there, 0 here'):
        assert write_scenes(folder, 'coco', **SMALL) == folder
    assert sorted(p.name for p in tmp_path.iterdir()) == ['x', 'y']


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        ({'layout': 'voc'}, "layout must be one of cityscapes, ade20k, coco, got 'voc'"),
        ({'scans': 'mnist'}, "scans must be digits or fashion_mnist, got 'mnist'"),
        ({'size': (16, 64)}, r'at least 32x32.*size=\(16, 64\)'),
        ({'val': 0}, 'at least 1; got .*val=0'),
        ({'scans': 'fashion_mnist', 'data_dir': 'nowhere'}, 'Fashion-MNIST is not in nowhere; `apt install'),
    ],
)
def test_bad_arguments_are_one_clear_line(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says) as caught:
        write_scenes(tmp_path / 'x', **{'layout': 'coco', **SMALL, **changes})
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'x').exists()
