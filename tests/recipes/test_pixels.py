import io

import datasets
import numpy as np
import pytest
import torch
from parts.pixels import IGNORE, RandomScale, collate_pixels, read_pixels, scoring, training
from parts.scenes import write_scenes
from PIL import Image
from torchvision import tv_tensors

MASK = np.array([[0, 1, 2], [2, 1, 255]], np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)


def picture(height, width, value=0):
    return np.full((height, width, 3), value, np.uint8)


def a_cityscapes(folder, mask, split='train', name='ulm_000000_000019'):
    mask = np.asarray(mask)
    save(folder / 'leftImg8bit' / split / 'ulm' / f'{name}_leftImg8bit.png', picture(*mask.shape))
    save(folder / 'gtFine' / split / 'ulm' / f'{name}_gtFine_labelIds.png', mask)
    save(folder / 'gtFine' / split / 'ulm' / f'{name}_gtFine_instanceIds.png', mask)  # there is more beside it
    return folder


def an_ade20k(folder, mask, split='training', name='ADE_train_00000001'):
    mask = np.asarray(mask)
    folder = folder / 'ADEChallengeData2016'
    save(folder / 'images' / split / f'{name}.jpg', picture(*mask.shape))
    save(folder / 'annotations' / split / f'{name}.png', mask)
    return folder


def a_folder(folder, mask=MASK, image=None, split='train', name='a', suffix='.png'):
    save(folder / 'images' / split / f'{name}{suffix}', picture(*np.shape(mask)) if image is None else image)
    save(folder / 'masks' / split / f'{name}.png', mask)
    return folder


def test_cityscapes_label_ids(tmp_path):
    """Published: road 7, sidewalk 8, fence 13, pole 17, sky 23, person 24, bus 28, train 31, bicycle 33."""
    folder = a_cityscapes(tmp_path, [[7, 8, 13, 17, 23], [24, 28, 31, 33, 0], [4, 14, 29, 30, 16]])
    data = read_pixels('cityscapes', folder, 'train')
    assert data[0][1].tolist() == [[0, 1, 4, 5, 10], [11, 15, 16, 18, 255], [255] * 5]
    assert (len(data.labels), data.labels[11]) == (19, 'person')


def test_cityscapes_ids_as_torchvision_knows_them(tmp_path):
    from torchvision.datasets import Cityscapes

    classes = [c for c in Cityscapes.classes if c.id >= 0]
    data = read_pixels('cityscapes', a_cityscapes(tmp_path, [[c.id for c in classes]]), 'train')
    assert data[0][1].tolist() == [[c.train_id for c in classes]]
    assert data.labels == [c.name for c in classes if c.train_id != 255]


@pytest.mark.parametrize('where', ['above', 'inside', 'renamed'])
def test_ade20k_without_a_label_does_not_count(tmp_path, where):
    folder = an_ade20k(tmp_path, [[0, 1, 150]])
    if where == 'renamed':
        folder = folder.rename(tmp_path / 'ade')
    data = read_pixels('ade20k', tmp_path if where == 'above' else folder, 'train')
    assert data[0][1].tolist() == [[255, 0, 149]]
    assert (len(data.labels), data.labels[-1]) == (150, '150')


@pytest.mark.parametrize('columns', ['Idx\tRatio\tTrain\tVal\tName', 'Idx\tRatio\tTrain\tVal\tStuff\tName'])
def test_ade20k_names_its_classes(tmp_path, columns):
    folder = an_ade20k(tmp_path, [[2, 1, 0]])
    stuff = '1\t' if 'Stuff' in columns else ''
    rows = [f'1\t0.1\t5\t5\t{stuff}wall', f'2 \t0.1\t5\t5\t{stuff}building, edifice ']  # blanks as in the real one
    (folder / 'objectInfo150.txt').write_text('\n'.join([columns, *rows, '']))
    data = read_pixels('ade20k', tmp_path, 'train')
    assert data.labels == ['wall', 'building, edifice']
    assert data[0][1].tolist() == [[1, 0, 255]]
    save(folder / 'annotations' / 'training' / 'ADE_train_00000001.png', [[3, 1, 0]])
    with pytest.raises(ValueError, match=r'1 masks with labels outside of the 2 classes \(.*00000001.png: 3\)'):
        read_pixels('ade20k', tmp_path, 'train')


@pytest.mark.parametrize('form', ['parquet', 'disk'])
def test_scene_parse_150_reads_what_ade20k_has(tmp_path, monkeypatch, form):
    folder = write_scenes(tmp_path / 'x', 'ade20k', train=3, val=2, size=(32, 40)) / 'ADEChallengeData2016'
    features = datasets.Features({
        'image': datasets.Image(), 'annotation': datasets.Image(), 'scene_category': datasets.ClassLabel(names=['a']),
    })  # fmt: skip
    splits = {}
    for split, long in (('train', 'training'), ('validation', 'validation')):
        images, masks = (sorted(map(str, (folder / kind / long).iterdir())) for kind in ('images', 'annotations'))
        rows = {'image': images, 'annotation': masks, 'scene_category': [0] * len(images)}
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
    where = tmp_path / form
    if form == 'disk':
        datasets.DatasetDict(splits).save_to_disk(where)
    else:
        where.mkdir()
        monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
        for split, rows in splits.items():
            rows.to_parquet(where / f'{split}-00000-of-00001.parquet')
    for split in ('train', 'val'):
        ours, theirs = read_pixels('ade20k', folder, split), read_pixels('scene_parse_150', where, split)
        assert len(theirs.labels) == 150
        assert len(ours) == len(theirs) > 0
        for i in range(len(ours)):
            assert all(torch.equal(a, b) for a, b in zip(ours[i], theirs[i], strict=True))


def test_scene_parse_150_with_a_wrong_label(tmp_path):
    features = datasets.Features({'image': datasets.Image(), 'annotation': datasets.Image()})
    masks = [Image.fromarray(np.full((2, 2), value, np.uint8)) for value in (150, 151)]
    rows = datasets.Dataset.from_dict({'image': masks, 'annotation': masks}, features=features)
    datasets.DatasetDict({'train': rows}).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r'1 masks with labels outside of the 150 classes \(row 1: 151\)'):
        read_pixels('scene_parse_150', tmp_path, 'train')
    with pytest.raises(ValueError, match=r"cannot be read like scene_parse_150, with split 'validation'"):
        read_pixels('scene_parse_150', tmp_path, 'val')


def test_scene_parse_150_of_something_else(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read like scene_parse_150, with split 'train' of columns image"):
        read_pixels('scene_parse_150', tmp_path / 'nowhere', 'train')


@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.JPEG'])
def test_any_folder(tmp_path, suffix):
    a_folder(tmp_path, suffix=suffix)
    a_folder(tmp_path, MASK[:, :2], split='val', suffix=suffix)
    for split in ('train', 'val'):
        assert read_pixels('masks', tmp_path, split).labels == ['0', '1', '2']  # the training masks tell
    (tmp_path / 'classes.txt').write_text('road\ncar\nsky\nsea\n')
    data = read_pixels('masks', tmp_path, 'train')
    assert data.labels == ['road', 'car', 'sky', 'sea']
    assert data[0][1].tolist() == MASK.tolist()


@pytest.mark.parametrize('mode', ['P', '1'])
def test_masks_with_a_palette_or_of_bits(tmp_path, mode):
    a_folder(tmp_path, [[0, 1], [1, 0]])
    mask = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
    if mode == 'P':
        mask.putpalette([9, 9, 9, 200, 0, 0])
    else:
        mask = mask.point([0] + [255] * 255).convert('1')
    assert mask.mode == mode
    mask.save(tmp_path / 'masks' / 'train' / 'a.png')
    assert read_pixels('masks', tmp_path, 'train')[0][1].tolist() == [[0, 1], [1, 0]]


def test_an_image_is_normalised(tmp_path):
    image = picture(2, 3)
    image[0, 1] = 255, 51, 102
    a_folder(tmp_path, image=image)
    pixels, mask = read_pixels('masks', tmp_path, 'train', scoring((0.5, 0.2, 0), (0.5, 1, 2)))[0]
    assert type(pixels) is type(mask) is torch.Tensor
    assert (pixels.dtype, mask.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(pixels[:, 0, 1], torch.tensor([1.0, 0.0, 0.2]))
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([-1.0, -0.2, 0.0]))


@pytest.mark.parametrize('size', [(16, 24), (80, 72)])
def test_training_moves_an_image_with_its_mask(tmp_path, size):
    """The image shows its own labels: they stay together, and beyond it its mean and 255 are."""
    labels = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 4, (4, 4)), 12, 0), 12, 1)
    a_folder(tmp_path, labels, image=np.stack([labels * 60] * 3, -1))
    data = read_pixels('masks', tmp_path, 'train', training(size, mean=[0.5] * 3, std=[0.5] * 3))
    shown = set()
    for seed in range(20):
        torch.manual_seed(seed)
        image, mask = data[0]
        assert image.shape == (3, *size)
        assert mask.shape == size
        beyond = mask == IGNORE
        value = image[0] * 0.5 + 0.5
        assert ((value[beyond] - 0.5).abs() < 0.01).all()
        off = (value * 255 / 60 - mask).abs()[~beyond]
        assert (off < 0.3).float().mean() > 0.75  # all but the seams, which are blurred
        shown.add(mask.float().mean().item())
    assert len(shown) > 5
    torch.manual_seed(3)
    again = data[0]
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(again, data[0], strict=True))


def test_a_flip_of_both(tmp_path):
    image = np.stack([np.where(MASK < 3, MASK, 5) * 50] * 3, -1)
    a_folder(tmp_path, image=image)
    turned = training((2, 3), scale=(1, 1), hflip=1.0, mean=[0] * 3, std=[1] * 3)
    pixels, mask = read_pixels('masks', tmp_path, 'train', turned)[0]
    assert mask.tolist() == MASK[:, ::-1].tolist()
    torch.testing.assert_close(pixels[1] * 255, torch.from_numpy(image[:, ::-1, 0].copy()).float())


def test_random_scales_cover_their_range():
    torch.manual_seed(0)
    image, mask = tv_tensors.Image(torch.zeros(3, 40, 20, dtype=torch.uint8)), tv_tensors.Mask(torch.zeros(40, 20))
    sizes = [tuple(RandomScale(0.5, 2.0)(image, mask)[1].shape) for _ in range(100)]
    assert min(sizes) < (24, 12)
    assert max(sizes) > (76, 38)
    assert all(20 <= h <= 80 and abs(h - 2 * w) <= 1 for h, w in sizes)


def test_a_batch_of_two_sizes():
    images = [torch.ones(3, 2, 4), torch.ones(3, 3, 1)]
    pixels, masks = collate_pixels([(image, image[0].long()) for image in images])
    assert pixels.shape == (2, 3, 3, 4)
    assert masks[0].tolist() == [[1] * 4, [1] * 4, [255] * 4]
    assert masks[1].tolist() == [[1, 255, 255, 255]] * 3
    assert pixels.sum() == 3 * (8 + 3)


def many_faults(folder):
    for name in 'abcde':
        a_folder(folder, [[0, 1], [0, 9 if name in 'abcd' else 0]], name=name)
    (folder / 'classes.txt').write_text('x\ny\n')
    save(folder / 'images' / 'train' / 'e.png', picture(2, 3))
    return (
        r'has 4 masks with labels outside of the 2 classes \(.*a.png: 9, .*b.png: 9, .*c.png: 9, \.\.\.\); 1 masks of '
    )


@pytest.mark.parametrize(
    ('faulty', 'says'),
    [
        (many_faults, None),
        (lambda f: a_folder(f, image=picture(3, 3)), r'1 masks of another size than the image \(.*a.png: 3x2 on 3x3\)'),
        (lambda f: a_folder(f, picture(2, 2), picture(2, 2)), r'1 masks that are not one byte.*a.png: mode RGB'),
        (lambda f: (a_folder(f) / 'masks/train/b.png').write_bytes(b''), r'1 masks without an image \(.*b.png\)'),
        (lambda f: save(a_folder(f) / 'images/train/b.png', MASK), r'1 images without a mask \(.*b.png\)'),
        (
            lambda f: (a_folder(f) / 'images/train/a.png').write_bytes(b'no'),
            r'1 files that cannot be read \(.*a.png: cannot identify image file',
        ),
        (
            lambda f: a_folder(f, split='val'),
            r'not laid out like a folder of .*: no images in it; expected images/train',
        ),
        (lambda f: a_folder(f, [[255]]), r'has 0 classes; masks of one byte per pixel name 1 to 255'),
    ],
)
def test_bad_folders_are_one_clear_line(tmp_path, faulty, says):
    said = faulty(tmp_path)
    with pytest.raises(ValueError, match=says or said) as caught:
        read_pixels('masks', tmp_path, 'train')
    assert '\n' not in str(caught.value)


def test_labels_need_not_be_checked(tmp_path):
    a_folder(tmp_path, image=picture(3, 3))
    read_pixels('masks', tmp_path, 'train', check=False)
    (tmp_path / 'masks' / 'train' / 'a.png').unlink()
    with pytest.raises(ValueError, match='no masks in it; expected'):
        read_pixels('masks', tmp_path, 'train', check=False)


@pytest.mark.parametrize(('kind', 'suffix'), [('images', '.png'), ('images', '.jpg'), ('masks', '.png')])
def test_a_file_that_ends_early_is_named(tmp_path, kind, suffix):
    noise = np.random.default_rng(0).integers(0, 2, (64, 64))
    a_folder(tmp_path, noise, image=np.stack([noise * 255] * 3, -1), suffix=suffix)
    (tmp_path / 'classes.txt').write_text('x\ny\n')
    file = tmp_path / kind / 'train' / f'a{suffix}'
    file.write_bytes(file.read_bytes()[:-100])
    data = read_pixels('masks', tmp_path, 'train', check=False)
    with pytest.raises(ValueError, match=rf'{kind}/train/{file.name} cannot be read: .*truncated') as caught:
        data[0]
    assert '\n' not in str(caught.value)


def test_bytes_that_end_early_are_named(tmp_path):
    features = datasets.Features({'image': datasets.Image(), 'annotation': datasets.Image()})
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 2, (32, 32)).astype(np.uint8))
    file = io.BytesIO()
    mask.save(file, 'PNG')
    broken = {'bytes': file.getvalue()[:-50], 'path': None}
    rows = datasets.Dataset.from_dict({'image': [mask, broken], 'annotation': [mask, mask]}, features=features)
    datasets.DatasetDict({'train': rows}).save_to_disk(tmp_path)
    data = read_pixels('scene_parse_150', tmp_path, 'train')
    assert data[0][1].shape == (32, 32)
    with pytest.raises(ValueError, match='row 1 cannot be read: '):
        data[1]


def test_labels_that_were_not_checked_are_one_clear_line(tmp_path):
    a_folder(tmp_path, [[0, 7], [1, 255]])
    (tmp_path / 'classes.txt').write_text('x\ny\n')
    data = read_pixels('masks', tmp_path, 'train', check=False)
    with pytest.raises(ValueError, match=r'masks/train/a.png has a label outside of the 2 classes: 7$'):
        data[0]


@pytest.mark.parametrize(
    ('dataset', 'split', 'says'),
    [
        (
            'cityscapes',
            'train',
            r'like Cityscapes: no images in it; expected leftImg8bit/train/CITY/\*_leftImg8bit.png',
        ),
        ('ade20k', 'val', r'like ADE20K: no images in it; expected images/validation/\*.jpg and annotations/valid'),
        ('voc', 'train', "dataset must be one of cityscapes, ade20k, scene_parse_150, masks, got 'voc'"),
        ('masks', 'test', "split must be train or val, got 'test'"),
    ],
)
def test_wrong_layouts_and_names(tmp_path, dataset, split, says):
    with pytest.raises(ValueError, match=says) as caught:
        read_pixels(dataset, tmp_path, split)
    assert '\n' not in str(caught.value)


def test_cityscapes_without_a_mask_and_with_a_wrong_label(tmp_path):
    a_cityscapes(tmp_path, [[34, 35, 7]])
    with pytest.raises(ValueError, match=r'1 masks with labels outside of the 19 classes \(.*labelIds.png: 34\)'):
        read_pixels('cityscapes', tmp_path, 'train')
    next(tmp_path.rglob('*labelIds.png')).rename(tmp_path / 'gtFine/train/ulm/other_gtFine_labelIds.png')
    with pytest.raises(ValueError, match=r'1 images without a mask \(.*\); 1 masks without an image'):
        read_pixels('cityscapes', tmp_path, 'train')
