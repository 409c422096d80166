"""Pixels: images and masks, from Cityscapes' folders, ADE20K's, `datasets`, or any folder of images and masks."""

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from parts.faults import refuse
from PIL import Image
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

IGNORE = 255  # the label of pixels that do not count
OUTSIDE = 256  # what a table has for values that are no label

# Cityscapes' label ids 0 to 33: these are trained on, in this order; the others do not count
CITYSCAPES = {
    7: 'road', 8: 'sidewalk', 11: 'building', 12: 'wall', 13: 'fence', 17: 'pole', 19: 'traffic light',
    20: 'traffic sign', 21: 'vegetation', 22: 'terrain', 23: 'sky', 24: 'person', 25: 'rider', 26: 'car', 27: 'truck',
    28: 'bus', 31: 'train', 32: 'motorcycle', 33: 'bicycle',
}  # fmt: skip
CITYSCAPES_IDS = 34
ADE20K_CLASSES = 150
SUFFIXES = ('.png', '.jpg', '.jpeg')
UNREADABLE = (OSError, ValueError, SyntaxError)  # what PIL makes of broken files
MASK_MODES = ('L', 'P', '1')  # one byte per pixel, which is the label


class Pixels(Dataset[tuple[Any, Any]]):
    """Images with a label for every pixel.

    Args:
        where: What to call it when something is wrong.
        items: For each image, where `image` and `annotation` come from: a path, or bytes as `datasets` keeps them.
        labels: Names of the classes.
        table: For each of 256 values of a mask, the label, `IGNORE` or `OUTSIDE`.
        transform: Of torchvision's v2, for an image and its mask together; by default `scoring()`.
        check: Look at all images' sizes and all masks' values now; takes its time on large data.

    Raises:
        ValueError: There is nothing, or a check fails: the line has the count and the first few offenders.
    """

    def __init__(
        self,
        where: str,
        items: Sequence[Mapping[str, Any]],
        labels: list[str],
        table: NDArray[np.int16],
        transform: Any = None,
        check: bool = True,
    ) -> None:
        self.where, self.items, self.labels, self.table = where, items, labels, table
        self.transform = transform or scoring()
        if not len(items):
            raise ValueError(f'{where} holds no images')
        if check:
            check_pixels(self)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image and its mask, after the transform: float `(3, H, W)` and long `(H, W)`, by default.

        Raises:
            ValueError: A file cannot be read, or a mask has labels outside of the classes.
        """
        item = self.items[index]
        image = tv_tensors.Image(F.pil_to_tensor(_decoded(item['image'], index).convert('RGB')))
        values = _values(_decoded(item['annotation'], index))
        labels = self.table[values]
        if (outside := labels == OUTSIDE).any():
            name, value = _name(item['annotation'], index), values[outside][0]
            raise ValueError(f'{name} has a label outside of the {len(self.labels)} classes: {value}')
        image, mask = self.transform(image, tv_tensors.Mask(torch.from_numpy(labels)))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor).long()


def read_pixels(dataset: str, data_dir: str | Path, split: str, transform: Any = None, *, check: bool = True) -> Pixels:
    """Images and masks of a dataset by name.

    Args:
        dataset: One of `READERS`.
        data_dir: Its folder; for `scene_parse_150`, a folder of parquet files or of `save_to_disk`, or a name on the
            Hub.
        split: `train` or `val`.
        transform: Of torchvision's v2, for an image and its mask together; by default `scoring()`.
        check: Look at all images' sizes and all masks' values now.

    Raises:
        ValueError: The dataset has another layout, or a check fails.
    """
    if dataset not in READERS:
        raise ValueError(f'dataset must be one of {", ".join(READERS)}, got {dataset!r}')
    if split not in ('train', 'val'):
        raise ValueError(f'split must be train or val, got {split!r}')
    return READERS[dataset](data_dir, split, transform, check)


def cityscapes(data_dir: str | Path, split: str, transform: Any = None, check: bool = True) -> Pixels:
    """Cityscapes' fine annotations: 34 label ids, of which 19 are classes and the rest does not count."""
    image, mask = '_leftImg8bit.png', '_gtFine_labelIds.png'
    folder = Path(data_dir)
    layout = f'leftImg8bit/{split}/CITY/*{image} and gtFine/{split}/CITY/*{mask}'
    images, masks = _named(folder / 'leftImg8bit' / split, image), _named(folder / 'gtFine' / split, mask)
    items = _paired(folder, 'Cityscapes', layout, images, masks)
    table = _table(dict.fromkeys(range(CITYSCAPES_IDS), IGNORE) | {v: i for i, v in enumerate(CITYSCAPES)})
    return Pixels(str(folder), items, list(CITYSCAPES.values()), table, transform, check)


def ade20k(data_dir: str | Path, split: str, transform: Any = None, check: bool = True) -> Pixels:
    """ADE20K's scene parsing challenge: 0 does not count, class i is i + 1; objectInfo150.txt names the classes."""
    folder = Path(data_dir)
    if (folder / 'ADEChallengeData2016').is_dir():
        folder = folder / 'ADEChallengeData2016'
    long = {'train': 'training', 'val': 'validation'}[split]
    layout = f'images/{long}/*.jpg and annotations/{long}/*.png'
    images, masks = _named(folder / 'images' / long, '.jpg'), _named(folder / 'annotations' / long, '.png')
    items = _paired(folder, 'ADE20K', layout, images, masks)
    labels = _ade20k_labels(folder / 'objectInfo150.txt')
    return Pixels(str(folder), items, labels, _ade20k_table(labels), transform, check)


def scene_parse_150(data_dir: str | Path, split: str, transform: Any = None, check: bool = True) -> Pixels:
    """ADE20K as `datasets` has it: columns `image` and `annotation`, values as in ADE20K's own files."""
    import datasets

    long = {'train': 'train', 'val': 'validation'}[split]
    folder = Path(data_dir)
    try:
        if (folder / 'dataset_dict.json').exists():
            rows = datasets.load_from_disk(str(folder))[long]
        else:
            rows = datasets.load_dataset(str(data_dir), split=long)
        rows = rows.select_columns(['image', 'annotation'])
        for column in rows.column_names:
            rows = rows.cast_column(column, datasets.Image(decode=False))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{data_dir} cannot be read like scene_parse_150, with split {long!r} of columns image and annotation: '
            f'{" ".join(str(error).split())}'
        ) from None
    labels = _ade20k_labels(folder / 'objectInfo150.txt')
    return Pixels(str(data_dir), rows, labels, _ade20k_table(labels), transform, check)


def mask_folder(data_dir: str | Path, split: str, transform: Any = None, check: bool = True) -> Pixels:
    """Any folder of images and masks: values are classes from 0 on, and 255 does not count.

    Lines of classes.txt name the classes; without it there are as many as the training masks show.
    """
    folder = Path(data_dir)
    layout = f'images/{split}/*.png or *.jpg and masks/{split}/*.png'
    images, masks = _named(folder / 'images' / split, *SUFFIXES), _named(folder / 'masks' / split, '.png')
    items = _paired(folder, 'a folder of images and masks', layout, images, masks)
    names = folder / 'classes.txt'
    if names.exists():
        labels = [line.strip() for line in names.read_text(encoding='utf-8').splitlines() if line.strip()]
    else:
        labels = _shown_labels(_named(folder / 'masks' / 'train', '.png').values())
    if not 1 <= len(labels) <= IGNORE:
        raise ValueError(f'{folder} has {len(labels)} classes; masks of one byte per pixel name 1 to {IGNORE}')
    return Pixels(str(folder), items, labels, _table({i: i for i in (*range(len(labels)), IGNORE)}), transform, check)


READERS = {'cityscapes': cityscapes, 'ade20k': ade20k, 'scene_parse_150': scene_parse_150, 'masks': mask_folder}


def check_pixels(pixels: Pixels) -> None:
    """Look at every image's size, and at every value of every mask.

    Raises:
        ValueError: A file cannot be read, or a mask has another size than its image, colours, or labels outside of the
            classes.
    """
    faults = defaultdict(list)
    for index, item in enumerate(pixels.items):
        name = _name(item['annotation'], index)
        try:
            with _open(item['image']) as image:
                size = image.size
            mask = _open(item['annotation'])
            if mask.mode not in MASK_MODES:
                faults['masks that are not one byte per pixel'].append(f'{name}: mode {mask.mode}')
                continue
            if mask.size != size:
                faults['masks of another size than the image'].append(f'{name}: {_by(mask.size)} on {_by(size)}')
            values = np.unique(_values(mask))
        except UNREADABLE as error:
            faults['files that cannot be read'].append(f'{name}: {" ".join(str(error).split())}')
            continue
        outside = values[pixels.table[values] == OUTSIDE]
        if len(outside):
            faults[f'masks with labels outside of the {len(pixels.labels)} classes'].append(f'{name}: {outside[0]}')
    refuse(pixels.where, faults)


def training(
    size: tuple[int, int],
    scale: tuple[float, float] = (0.5, 2.0),
    hflip: float = 0.5,
    mean: Sequence[float] = IMAGENET_INCEPTION_MEAN,
    std: Sequence[float] = IMAGENET_INCEPTION_STD,
) -> v2.Compose:
    """Random scale, flip and crop of an image and its mask; beyond the image its mean is seen, and nothing counts.

    Args:
        size: Height and width of the crop.
        scale: Smallest and largest factor.
        hflip: Probability of a horizontal flip.
        mean: Per channel.
        std: Per channel.
    """
    grey = [round(255 * m) for m in mean]
    return v2.Compose([
        RandomScale(*scale),
        v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: grey, tv_tensors.Mask: IGNORE}),
        v2.RandomHorizontalFlip(hflip),
        scoring(mean, std),
    ])  # fmt: skip


def scoring(
    mean: Sequence[float] = IMAGENET_INCEPTION_MEAN, std: Sequence[float] = IMAGENET_INCEPTION_STD
) -> v2.Compose:
    """Nothing but numbers as a net takes them: images float and normalised."""
    dtypes = {tv_tensors.Image: torch.float32, 'others': None}
    return v2.Compose([v2.ToDtype(dtypes, scale=True), v2.Normalize(list(mean), list(std))])


class RandomScale(v2.Transform):
    """Resize by a random factor.

    Args:
        low: The smallest.
        high: The largest.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The size of these inputs after it."""
        height, width = v2.query_size(flat_inputs)
        factor = torch.empty(()).uniform_(self.low, self.high).item()
        return {'size': [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """One input, resized; masks by their nearest pixel."""
        return self._call_kernel(F.resize, inpt, params['size'], antialias=True)


def collate_pixels(batch: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Images `(N, 3, H, W)` and masks `(N, H, W)`; smaller ones are padded with what does not count."""
    height, width = (max(mask.shape[side] for _, mask in batch) for side in (0, 1))
    images, masks = [], []
    for image, mask in batch:
        beyond = (0, width - mask.shape[1], 0, height - mask.shape[0])
        images.append(pad(image, beyond))
        masks.append(pad(mask, beyond, value=IGNORE))
    return torch.stack(images), torch.stack(masks)


def _named(folder: Path, *endings: str) -> dict[str, Path]:
    """Files below a folder by their path in it, without the ending; nothing if there is no folder."""
    found = {}
    for path in sorted(folder.rglob('*')):
        ending = next((e for e in endings if path.name.lower().endswith(e.lower())), None)
        if ending:
            found[str(path.relative_to(folder))[: -len(ending)]] = path
    return found


def _paired(
    folder: Path, dataset: str, layout: str, images: Mapping[str, Path], masks: Mapping[str, Path]
) -> list[dict[str, Path]]:
    if not images or not masks:
        missing = 'images' if not images else 'masks'
        raise ValueError(f'{folder} is not laid out like {dataset}: no {missing} in it; expected {layout} there')
    alone = {
        'images without a mask': [str(path) for name, path in images.items() if name not in masks],
        'masks without an image': [str(path) for name, path in masks.items() if name not in images],
    }
    refuse(folder, alone)
    return [{'image': path, 'annotation': masks[name]} for name, path in images.items()]


def _table(known: Mapping[int, int]) -> NDArray[np.int16]:
    table = np.full(256, OUTSIDE, np.int16)
    table[list(known)] = list(known.values())
    return table


def _ade20k_table(labels: list[str]) -> NDArray[np.int16]:
    return _table({0: IGNORE} | {i + 1: i for i in range(len(labels))})


def _ade20k_labels(path: Path) -> list[str]:
    """Names of the classes: the last column of objectInfo150.txt; numbers where that file is not."""
    if not path.exists():
        return [str(i) for i in range(1, ADE20K_CLASSES + 1)]
    rows = [line.split('\t') for line in path.read_text(encoding='utf-8').splitlines() if line.strip()][1:]
    if not rows or [row[0].strip() for row in rows] != [str(i) for i in range(1, len(rows) + 1)]:
        raise ValueError(f'{path} is not a table of classes 1, 2, ... with tabs between Idx, ..., Name')
    return [row[-1].strip() for row in rows]


def _shown_labels(masks: Iterable[Path]) -> list[str]:
    """Numbers from 0 to the largest label in masks; those that cannot be read are for `check_pixels` to name."""
    shown = {IGNORE}
    for path in masks:
        with suppress(*UNREADABLE):
            shown.update(np.unique(_values(_open(path))).tolist())
    return [str(i) for i in range(1 + max(shown - {IGNORE}, default=-1))]


def _open(source: Any) -> Image.Image:
    """An image that is not decoded yet: of a path, or as `datasets` keeps it, of bytes or a path."""
    if isinstance(source, Mapping):
        source = io.BytesIO(source['bytes']) if source['bytes'] is not None else source['path']
    return Image.open(source)


def _decoded(source: Any, index: int) -> Image.Image:
    try:
        image = _open(source)
        image.load()
    except UNREADABLE as error:
        raise ValueError(f'{_name(source, index)} cannot be read: {" ".join(str(error).split())}') from None
    return image


def _name(source: Any, index: int) -> str:
    return str((source['path'] or f'row {index}') if isinstance(source, Mapping) else source)


def _values(mask: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(mask, np.uint8)


def _by(size: tuple[int, int]) -> str:
    return f'{size[0]}x{size[1]}'
