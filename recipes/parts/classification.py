"""Classification: images with one label each, by name, in timm's loaders; cross entropy; top-1."""

import gzip
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from parts.config import Setup
from parts.data import CHANNELS_LAST, Data, check_splits, normalization
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, IterableDataset

FASHION_MNIST = Path('/usr/share/datasets/fashion-mnist')  # where Debian's package dataset-fashion-mnist puts it
FASHION_MNIST_LABELS = (
    'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot',
)  # fmt: skip


FOLDERS = ('', 'torch/image_folder', 'torch/folder')  # what timm calls a folder with a folder for every class


class Pictures(Dataset[tuple[Any, int]]):
    """Grey images in memory, as PIL images.

    Args:
        images: uint8 `(n, H, W)`.
        labels: `(n,)`.
        mode: PIL mode that images are converted to.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[Any], mode: str) -> None:
        self.images, self.labels, self.mode = images, labels, mode
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert(self.mode)
        return (self.transform(image) if self.transform else image), int(self.labels[index])


@dataclass
class Classification:
    """The task of giving each image one label.

    Args:
        config: The run's.
    """

    config: Setup
    metric: ClassVar[str] = 'top1'

    def create_data(self, accelerator: Accelerator, known: Mapping[str, Any] | None = None) -> Data:
        """Loaders of images and labels."""
        return create_data(self.config, accelerator, known)

    def create_net(self, make: Callable[..., nn.Module], data: Data) -> nn.Module:
        """The model with a classifier for these labels."""
        return make(num_classes=data.num_classes)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy."""
        return cross_entropy(model(images), labels, label_smoothing=self.config.smoothing)

    def score(self, net: nn.Module, data: Data, accelerator: Accelerator) -> float:
        """Top-1."""
        return top1(net, data, accelerator)


def create_data(config: Setup, accelerator: Accelerator, known: Mapping[str, Any] | None = None) -> Data:
    """Make the loaders of a run.

    Args:
        config: Names the dataset.
        accelerator: Shares it among the processes.
        known: The `pretrained_cfg` of weights that are used to a mean and a standard deviation; else both are 0.5.

    Raises:
        ValueError: The dataset is missing, empty, smaller than a batch, or has other classes than the model.
    """
    train, val, labels = _datasets(config)
    num_classes = config.num_classes or len(labels)
    if not num_classes:
        raise ValueError(f'dataset {config.dataset!r} does not name its classes; give num_classes=')
    if labels and num_classes > len(labels):
        raise ValueError(f'the model has {num_classes} classes, dataset {config.dataset!r} only {len(labels)}')
    if labels and num_classes < len(labels):
        raise ValueError(f'dataset {config.dataset!r} has {len(labels)} classes, the model only {num_classes}')
    check_splits(config, accelerator, train, val)
    mean, std = normalization(config.in_chans, known or {})
    shared = {
        'input_size': (config.in_chans, config.img_size, config.img_size),
        'batch_size': config.batch_size,
        'mean': mean,
        'std': std,
        'interpolation': 'bicubic',
        'num_workers': config.workers,
        'persistent_workers': False,  # they would go on with the random numbers that they had
        'distributed': accelerator.num_processes > 1,
        'device': accelerator.device,
        'pin_memory': accelerator.device.type == 'cuda',
    }
    try:
        training = create_loader(
            train,
            is_training=True,
            hflip=config.hflip,
            scale=(config.scale, 1.0),
            ratio=(1 / config.ratio, config.ratio),
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            re_prob=config.reprob,
            **shared,
        )
    except (AssertionError, ValueError) as error:
        if config.auto_augment is None:
            raise
        raise ValueError(f'auto_augment={config.auto_augment} is no augmentation of timm: {error}') from None
    return Data(
        train=training,
        val=create_loader(val, crop_pct=1.0, **shared),
        val_count=getattr(val.reader, 'num_samples', len(val)) if isinstance(val, IterableDataset) else len(val),
        labels=labels,
        num_classes=num_classes,
        config={
            'input_size': shared['input_size'],
            'mean': mean,
            'std': std,
            'interpolation': 'bicubic',
            'crop_pct': 1.0,
            'label_names': labels or None,
        },
    )


def _datasets(config: Setup) -> tuple[Any, Any, list[str]]:
    mode = 'L' if config.in_chans == 1 else 'RGB'
    if config.dataset == 'digits':
        return _chosen(config, *digits(mode))
    if config.dataset == 'fashion_mnist':
        folder = Path(config.data_dir) if config.data_dir else FASHION_MNIST
        if any(folder.glob('train-images-idx3-ubyte*')):
            splits = [Pictures(*idx_split(folder, name), mode) for name in ('train', 't10k')]
            return _chosen(config, splits[0], splits[1], list(FASHION_MNIST_LABELS))
        if not any(folder.rglob('*.parquet')):
            raise ValueError(
                f'Fashion-MNIST is not in {folder}. Ways to get it: `apt install dataset-fashion-mnist`, which is '
                'found by itself; or data_dir=FOLDER with its four idx files (.gz or not), or with the parquet files '
                'of the Hub dataset zalando-datasets/fashion_mnist'
            )
        name = f'hfds/{folder}'
    else:
        name = '' if config.dataset == 'folder' else config.dataset
        if not name.partition('/')[1] and not (config.data_dir and Path(config.data_dir).is_dir()):
            raise ValueError(
                f'dataset {config.dataset!r} is a folder of images, and data_dir={config.data_dir} is none; it '
                f'should hold {config.train_split}/CLASS/IMAGE and {config.val_split}/CLASS/IMAGE. Other datasets: '
                'digits, fashion_mnist, hfds/NAME, hfids/NAME (data_dir is then their cache), torch/NAME'
            )
    root = None if name.startswith('hfds/') and config.dataset == 'fashion_mnist' else config.data_dir

    def create(split: str, samples: int | None, **kwargs: Any) -> Any:
        if name in FOLDERS:
            _check_folder(Path(str(root)), split)
        return create_dataset(
            name,
            root=root,
            split=split,
            is_training=split == config.train_split,
            batch_size=config.batch_size,
            num_samples=samples,
            input_img_mode=mode,
            seed=config.seed,
            **kwargs,
        )

    try:
        columns = _columns(name.removeprefix('hfds/'), root, config.train_split) if name.startswith('hfds/') else {}
        train = create(config.train_split, config.train_samples, **columns)
        val = create(config.val_split, config.val_samples, **columns)
        classes, others = _classes(train), _classes(val)
        if name in FOLDERS and others != classes:  # which are numbered by the folders that are there
            if unknown := sorted(others.keys() - classes.keys()):
                split = f'{config.val_split!r} has classes that split {config.train_split!r} has not'
                raise ValueError(f'split {split}: {", ".join(unknown[:3])}')
            val = create_dataset('', root=root, split=config.val_split, class_map=classes, input_img_mode=mode)
    except (OSError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise ValueError(
            f'dataset {config.dataset!r} with data_dir={config.data_dir} cannot be read: {_in_our_words(error)}'
        ) from None
    return train, val, sorted(classes, key=lambda label: classes[label])


def _check_folder(root: Path, split: str) -> None:
    """Check that a split is a folder: timm takes the root for one that is not there, and all of one for a part of it.

    Raises:
        ValueError: It is none.
    """
    if root.is_dir() and not (root / split).is_dir():
        there = ', '.join(sorted(path.name for path in root.iterdir() if path.is_dir())) or 'no folder'
        raise ValueError(f'there is no folder {split!r} in it, but {there}; name two with train_split= and val_split=')


def _classes(dataset: Any) -> dict[str, int]:
    """The classes that a dataset of timm's or torchvision's names."""
    return getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None) or {}


def _columns(name: str, root: str | None, split: str) -> dict[str, str]:
    """The columns of a dataset of `datasets`, where they are not called `image` and `label`.

    Raises:
        ValueError: It is not plain which they are.
    """
    import datasets

    features = datasets.load_dataset(name, split=split, cache_dir=root).features
    found = {}
    wanted = (('input_key', 'image', datasets.Image), ('target_key', 'label', datasets.ClassLabel))
    for key, usual, kind in wanted:
        fitting = [column for column, feature in features.items() if isinstance(feature, kind)]
        if usual not in features:
            if len(fitting) != 1:
                what = f'none of its columns {", ".join(features)} is called {usual!r}'
                raise ValueError(f'{what}, and {len(fitting)} are of type {kind.__name__}')
            found[key] = fitting[0]
    return found


def _chosen(config: Setup, train: Pictures, test: Pictures, labels: list[str]) -> tuple[Pictures, Pictures, list[str]]:
    splits = {'train': train, 'test': test}
    try:
        return part(config.train_split, splits), part(config.val_split, splits), labels
    except ValueError as error:
        said = f'train_split={config.train_split}, val_split={config.val_split}'
        raise ValueError(f'dataset {config.dataset!r} with {said} cannot be read: {error}') from None


def part(split: str, splits: Mapping[str, Pictures]) -> Pictures:
    """The images that a split names in the words of `datasets`: `train`, `train[:5000]`, `test[50%:]`.

    Args:
        split: The name.
        splits: What there is, by name.

    Raises:
        ValueError: There is no such split.
    """
    if split in splits:
        return splits[split]
    from datasets import ReadInstruction

    counts = {name: len(pictures) for name, pictures in splits.items()}
    ranges = ReadInstruction.from_spec(split).to_absolute(counts)
    cuts = [(splits[one.splitname], slice(one.from_, one.to)) for one in ranges]
    return Pictures(
        np.concatenate([pictures.images[where] for pictures, where in cuts]),
        np.concatenate([pictures.labels[where] for pictures, where in cuts]),
        cuts[0][0].mode,
    )


def _in_our_words(error: Exception) -> str:
    return ' '.join(str(error).split()).replace('`num_samples`', 'train_samples= and val_samples=')


def digits(mode: str) -> tuple[Pictures, Pictures, list[str]]:
    """scikit-learn's digits: 1,797 real scans of 8x8; a third, 599, is held out for scoring, the same in every run."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    train, val = train_test_split(np.arange(len(images)), test_size=1 / 3, random_state=0, stratify=digits.target)
    return (
        Pictures(images[train], digits.target[train], mode),
        Pictures(images[val], digits.target[val], mode),
        [str(name) for name in digits.target_names],
    )


def idx_split(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images and labels of a split in the four files that Fashion-MNIST comes in."""
    images, labels = (_read_idx(folder, f'{split}-{kind}-ubyte') for kind in ('images-idx3', 'labels-idx1'))
    if len(images) != len(labels):
        raise ValueError(f'{folder} has {len(images)} images but {len(labels)} labels of split {split!r}')
    return images, labels


def _read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """Read an idx file, plain or gzipped: two zero bytes, type 8 (uint8), dimensions, their sizes, the bytes."""
    for path in (folder / name, folder / f'{name}.gz'):
        if path.exists():
            try:
                data = path.read_bytes()
                data = gzip.decompress(data) if path.suffix == '.gz' else data
                if data[:3] != b'\0\0\x08':
                    raise ValueError('it does not begin like an idx file of bytes')
                shape = np.frombuffer(data, '>i4', data[3], 4)
                return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
            except (OSError, EOFError, ValueError, zlib.error) as error:
                raise ValueError(f'{path} is not a whole idx file: {error}') from None
    raise ValueError(f'{folder / name} is missing, and so is {name}.gz')


@torch.inference_mode()
def top1(model: Any, data: Data, accelerator: Accelerator) -> float:
    """Share of the test images that the model gets right; every image counts once."""
    training = model.training
    model.eval()
    scored = torch.zeros(2, dtype=torch.int64, device=accelerator.device)
    first, stride = accelerator.process_index, accelerator.num_processes
    padded = isinstance(data.val.sampler, OrderedDistributedSampler)  # so that all processes have as many
    seen = 0
    for images, labels in data.val:
        places = first + stride * (seen + torch.arange(len(labels), device=labels.device))
        real = places < data.val_count if padded else torch.ones_like(places, dtype=torch.bool)
        hits = (model(images.to(memory_format=CHANNELS_LAST)).argmax(1) == labels) & real
        scored += torch.stack([hits.sum(), real.sum()])
        seen += len(labels)
    model.train(training)
    right, all_images = accelerator.reduce(scored, reduction='sum').tolist()
    return float(right / max(1, all_images))
