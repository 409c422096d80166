import gzip

import numpy as np
import pytest
from accelerate import Accelerator
from parts.classification import create_data
from parts.config import Config
from parts.data import batches
from PIL import Image
from sklearn.datasets import load_digits


@pytest.fixture(scope='module')
def accelerator():
    return Accelerator(cpu=True)


def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + b''.join(int(size).to_bytes(4, 'big') for size in array.shape)
    data = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)


def fake_fashion(folder, suffix=''):
    rng = np.random.default_rng(0)
    for split, count in (('train', 20), ('t10k', 10)):
        write_idx(folder / f'{split}-images-idx3-ubyte{suffix}', rng.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f'{split}-labels-idx1-ubyte{suffix}', np.arange(count) % 10)


def fake_folder(folder, split, count):
    for label in ('ape', 'bee'):
        (folder / split / label).mkdir(parents=True)
        for index in range(count):
            pixels = np.full((16, 16, 3), 10 * index, np.uint8)
            Image.fromarray(pixels).save(folder / split / label / f'{index}.png')


def test_digits_hold_out_the_same_third_every_time(accelerator):
    data = create_data(Config(img_size=8), accelerator)
    again = create_data(Config(img_size=8, seed=5), accelerator)
    assert data.val_count == 599
    assert len(data.train.dataset) + data.val_count == len(load_digits().images)
    assert np.array_equal(data.val.dataset.images, again.val.dataset.images)
    held_out = {image.tobytes() for image in data.val.dataset.images}
    assert sum(image.tobytes() in held_out for image in data.train.dataset.images) < 5  # some scans are twins


def test_digits_in_part(accelerator):
    whole = create_data(Config(img_size=8), accelerator)
    part = create_data(Config(img_size=8, train_split='train[:100]+train[-10:]', val_split='test[:50%]'), accelerator)
    images, labels = whole.train.dataset.images, whole.train.dataset.labels
    assert np.array_equal(part.train.dataset.images, np.concatenate([images[:100], images[-10:]]))
    assert np.array_equal(part.train.dataset.labels, np.concatenate([labels[:100], labels[-10:]]))
    assert part.val_count == 300  # of 599, rounded
    assert np.array_equal(part.val.dataset.images, whole.val.dataset.images[:300])


@pytest.mark.parametrize('split', ['validation', 'train[:x]', 'train[:200%]'])
def test_digits_have_no_such_split(accelerator, split):
    with pytest.raises(ValueError, match=r"dataset 'digits' with train_split=.* cannot be read"):
        create_data(Config(train_split=split), accelerator)


@pytest.mark.parametrize('workers', [0, 1])
def test_batches_depend_on_the_seed_alone(accelerator, workers):
    data = create_data(Config(img_size=8, scale=0.5, batch_size=16, workers=workers), accelerator)
    first, again, other = ([x.clone() for x, _ in batches(data.train, 3, seed)] for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not all((a == b).all() for a, b in zip(first, other, strict=True))


def test_batches_go_on_over_epochs(accelerator):
    data = create_data(Config(img_size=8, batch_size=400), accelerator)
    assert len(data.train) == 2
    assert sum(1 for _ in batches(data.train, 5, 0)) == 5
    assert list(batches(data.train, 0, 0)) == []


@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_fashion_mnist_from_idx_files(tmp_path, accelerator, suffix):
    fake_fashion(tmp_path, suffix)
    data = create_data(Config(dataset='fashion_mnist', data_dir=str(tmp_path), batch_size=4), accelerator)
    assert (data.val_count, data.num_classes, data.labels[0]) == (10, 10, 'T-shirt/top')
    images, labels = next(iter(data.val))
    assert images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 1, 2, 3]


def test_fashion_mnist_from_parquet_reads_the_same_images(tmp_path, accelerator):
    import datasets

    fake_fashion(tmp_path)
    parquet = tmp_path / 'parquet'
    parquet.mkdir()
    config = Config(dataset='fashion_mnist', data_dir=str(tmp_path), batch_size=10)
    idx = create_data(config, accelerator)
    names = datasets.ClassLabel(names=idx.labels)
    for split, dataset in (('train', idx.train.dataset), ('test', idx.val.dataset)):
        rows = {'image': [Image.fromarray(i) for i in dataset.images], 'label': dataset.labels.tolist()}
        features = datasets.Features({'image': datasets.Image(), 'label': names})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(parquet / f'{split}-00000-of-00001.parquet')
    config.data_dir = str(parquet)
    data = create_data(config, accelerator)
    assert data.labels == idx.labels
    (images, labels), (expected, expected_labels) = next(iter(data.val)), next(iter(idx.val))
    assert (images == expected).all()
    assert (labels == expected_labels).all()


@pytest.mark.parametrize('name', ['hfds', 'hfids', 'folder'])
def test_other_datasets_through_timm(tmp_path, accelerator, name):
    import datasets

    fake_folder(tmp_path, 'train', 6)
    fake_folder(tmp_path, 'test', 3)
    where = {'dataset': 'folder', 'data_dir': str(tmp_path)}
    if name != 'folder':
        for split in ('train', 'test'):
            rows = datasets.load_dataset('imagefolder', data_dir=tmp_path, split=split, cache_dir=tmp_path / 'cache')
            (tmp_path / 'parquet').mkdir(exist_ok=True)
            rows.to_parquet(tmp_path / 'parquet' / f'{split}-00000-of-00001.parquet')
        where = {'dataset': f'{name}/{tmp_path}/parquet', 'data_dir': str(tmp_path / 'cache')}
    if name == 'hfids':
        with pytest.raises(ValueError, match=r'hfids.*pass train_samples='):
            create_data(Config(**where, batch_size=3, num_classes=2), accelerator)
        where |= {'train_samples': 12, 'val_samples': 6}
    data = create_data(Config(**where, batch_size=3, num_classes=2), accelerator)
    assert data.num_classes == 2
    images, labels = next(iter(batches(data.train, 1, 0)))
    assert images.shape == (3, 3, 32, 32)
    assert set(labels.tolist()) <= {0, 1}
    assert sorted(label for _, batch in data.val for label in batch.tolist()) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        (
            {'dataset': 'fashion_mnist', 'data_dir': 'empty'},
            r'Fashion-MNIST is not in .*empty.*apt install dataset-fash',
        ),
        ({'dataset': 'folder', 'data_dir': 'nowhere'}, r'data_dir=nowhere is none; it should hold train/CLASS/IMAGE'),
        ({'dataset': 'folder', 'data_dir': 'empty'}, r"dataset 'folder' with data_dir=.*empty cannot be read"),
        ({'dataset': 'imagenet'}, r"dataset 'imagenet' is a folder of images, and data_dir=None is none"),
        ({'num_classes': 12}, r"the model has 12 classes, dataset 'digits' only 10"),
        ({'num_classes': 9}, r"dataset 'digits' has 10 classes, the model only 9"),
        ({'batch_size': 2000}, r'has 1198 images, fewer than a batch of 2000'),
    ],
)
def test_bad_data_is_one_clear_line(tmp_path, accelerator, monkeypatch, changes, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match=says) as caught:
        create_data(Config(**changes), accelerator)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('damage', ['short', 'head', 'labels'])
def test_damaged_idx_files_are_named(tmp_path, accelerator, damage):
    fake_fashion(tmp_path)
    path = tmp_path / 't10k-images-idx3-ubyte'
    if damage == 'short':
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == 'head':
        path.write_bytes(b'\0\0\x0d' + path.read_bytes()[3:])
    else:
        write_idx(tmp_path / 't10k-labels-idx1-ubyte', np.zeros(9))
    with pytest.raises(ValueError, match='10 images but 9 labels' if damage == 'labels' else 't10k-images-idx3-ubyte'):
        create_data(Config(dataset='fashion_mnist', data_dir=str(tmp_path), batch_size=4), accelerator)


@pytest.mark.parametrize('split', ['test', 'val[:2]', 'valid'])
def test_a_folder_without_a_split_is_refused(tmp_path, accelerator, split):
    fake_folder(tmp_path, 'train', 6)
    fake_folder(tmp_path, 'val', 3)
    config = Config(dataset='folder', data_dir=str(tmp_path), batch_size=3, val_split=split)
    with pytest.raises(ValueError, match=r"there is no folder '.*' in it, but train, val; name two with train_split="):
        create_data(config, accelerator)
    config.val_split = 'val'
    assert create_data(config, accelerator).val_count == 6


def test_classes_of_a_folder_are_numbered_as_those_of_the_training_split(tmp_path, accelerator):
    fake_folder(tmp_path, 'train', 6)
    fake_folder(tmp_path, 'test', 3)
    for path in (tmp_path / 'test/ape').iterdir():
        path.unlink()
    (tmp_path / 'test/ape').rmdir()
    config = Config(dataset='folder', data_dir=str(tmp_path), batch_size=3)
    data = create_data(config, accelerator)
    assert [label for _, batch in data.val for label in batch.tolist()] == [1, 1, 1]
    (tmp_path / 'test/cow').mkdir()
    (tmp_path / 'test/bee/0.png').rename(tmp_path / 'test/cow/0.png')
    with pytest.raises(ValueError, match="split 'test' has classes that split 'train' has not: cow"):
        create_data(config, accelerator)


def test_torchvisions_datasets(tmp_path, accelerator):
    fake_folder(tmp_path, 'train', 6)
    fake_folder(tmp_path, 'test', 3)
    data = create_data(Config(dataset='torch/image_folder', data_dir=str(tmp_path), batch_size=3), accelerator)
    assert data.labels == ['ape', 'bee']
    assert sorted(label for _, batch in data.val for label in batch.tolist()) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize('names', [('img', 'fine'), ('image', 'labels')])
def test_columns_are_found_by_their_type(tmp_path, accelerator, names):
    import datasets

    rows = {names[0]: [Image.new('RGB', (8, 8))] * 6, names[1]: [0, 1, 2] * 2, 'more': list(range(6))}
    features = {names[0]: datasets.Image(), names[1]: datasets.ClassLabel(names=['a', 'b', 'c'])}
    features = datasets.Features({**features, 'more': datasets.Value('int64')})
    parquet = tmp_path / 'parquet'
    parquet.mkdir()
    for split in ('train', 'test'):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(parquet / f'{split}-00000-of-00001.parquet')
    config = Config(dataset=f'hfds/{parquet}', data_dir=str(tmp_path / 'cache'), batch_size=3)
    data = create_data(config, accelerator)
    assert data.labels == ['a', 'b', 'c']
    assert [label for _, batch in data.val for label in batch.tolist()] == [0, 1, 2] * 2


def test_columns_that_cannot_be_told_apart_are_named(tmp_path, accelerator):
    import datasets

    label = datasets.ClassLabel(names=['a'])
    features = datasets.Features({'image': datasets.Image(), 'coarse': label, 'fine': label})
    rows = {'image': [Image.new('RGB', (8, 8))], 'coarse': [0], 'fine': [0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / 'train-00000-of-00001.parquet')
    says = "none of its columns image, coarse, fine is called 'label', and 2 are of type ClassLabel"
    with pytest.raises(ValueError, match=says):
        create_data(Config(dataset=f'hfds/{tmp_path}', data_dir=str(tmp_path / 'cache')), accelerator)


def test_an_augmentation_that_timm_has_not_is_one_line(accelerator):
    with pytest.raises(ValueError, match='auto_augment=nonsense is no augmentation of timm'):
        create_data(Config(auto_augment='nonsense'), accelerator)
