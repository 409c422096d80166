"""Coco: images and annotations of COCO's json files, detection's and those of person keypoints alike."""

import json
import reprlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from parts.faults import refuse
from parts.pixels import UNREADABLE
from PIL import Image

FIELDS = {
    'images': {'id': 'an integer', 'file_name': 'text', 'width': 'a number', 'height': 'a number'},
    'annotations': {
        'id': 'an integer', 'image_id': 'an integer', 'category_id': 'an integer', 'bbox': 'four numbers',
        'area': 'a number', 'iscrowd': 'an integer',
    },
    'categories': {'id': 'an integer', 'name': 'text'},
}  # fmt: skip
POINT_FIELDS = {'keypoints': 'a list of numbers', 'num_keypoints': 'an integer'}  # COCO's evaluator reads both
KINDS: dict[str, Callable[[Any], bool]] = {
    'an integer': lambda value: isinstance(value, int),
    'a number': lambda value: isinstance(value, int | float) and isfinite(value),
    'text': lambda value: isinstance(value, str),
    'a list of numbers': lambda value: isinstance(value, list) and all(map(KINDS['a number'], value)),
    'four numbers': lambda value: KINDS['a list of numbers'](value) and len(value) == 4,
}
THINNEST = 2**-20  # of an image's longer side: float32 tells such a box's edges apart, wherever it is moved to
VISIBILITIES = (0, 1, 2)  # of a key point: none, hidden, seen


@dataclass
class Coco:
    """What a json file says.

    Args:
        folder: Where the images lie.
        path: The json file; a COCO evaluator reads it as well.
        images: Its `images`, in its order.
        annotations: Its `annotations` by image id.
        categories: Its `categories`, by rising id.
    """

    folder: Path
    path: Path
    images: list[dict[str, Any]]
    annotations: dict[int, list[dict[str, Any]]]
    categories: list[dict[str, Any]]

    @property
    def labels(self) -> list[str]:
        """Names of the categories."""
        return [category['name'] for category in self.categories]

    def open(self, image: dict[str, Any]) -> Image.Image:
        """An image, decoded.

        Raises:
            ValueError: It cannot be read.
        """
        file = self.folder / image['file_name']
        try:
            return Image.open(file).convert('RGB')
        except UNREADABLE as error:
            raise ValueError(f'{file} cannot be read: {" ".join(str(error).split())}') from None


def coco_paths(
    data_dir: str | Path, split: str, kind: Literal['instances', 'person_keypoints'] = 'instances'
) -> tuple[Path, Path]:
    """Where COCO 2017 keeps the images and the json file of a split, `train` or `val`.

    Raises:
        ValueError: They are not there.
    """
    if split not in ('train', 'val'):
        raise ValueError(f'split must be train or val, got {split!r}')
    images, path = Path(data_dir, f'{split}2017'), Path(data_dir, 'annotations', f'{kind}_{split}2017.json')
    if not images.is_dir() or not path.is_file():
        missing = f'{path.parent.name}/{path.name}' if images.is_dir() else f'{images.name}/'
        raise ValueError(
            f'{data_dir} is not laid out like COCO: no {missing} in it; expected {images.name}/*.jpg and '
            f'annotations/{path.name} there'
        )
    return images, path


def read_coco(folder: str | Path, path: str | Path, *, points: bool = False, check: bool = True) -> Coco:
    """Read a json file in COCO's format, and check that training on it can work.

    Annotations with empty boxes are left out; COCO's train2017 has two.

    Args:
        folder: Where its images lie.
        path: The json file.
        points: Every annotation must also have the fields of key points.
        check: Also look at every image's size.

    Raises:
        ValueError: It has another format, or a check fails: the line has the count and the first few offenders.
    """
    folder, path = Path(folder), Path(path)
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f'{path} is not readable as JSON: {error}') from None
    refuse(path, _malformed(content, points))
    images, annotations, categories = (content[part] for part in FIELDS)
    refuse(path, _faults(folder, images, annotations, categories, check))
    grouped: dict[int, list[dict[str, Any]]] = {image['id']: [] for image in images}
    sizes = {image['id']: (image['width'], image['height']) for image in images}
    for one in annotations:
        if not is_empty(one['bbox'], *sizes[one['image_id']]):
            grouped[one['image_id']].append(one)
    return Coco(folder, path, images, grouped, sorted(categories, key=lambda category: category['id']))


def is_empty(box: list[float], width: int, height: int) -> bool:
    """Whether nothing of COCO's `[x, y, width, height]`, or a line at most, lies inside an image of this size."""
    x, y, w, h = box
    sides = min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0)
    return min(sides) <= THINNEST * max(width, height)


def _malformed(content: Any, points: bool) -> dict[str, list[str]]:
    """Parts of COCO's format that are not there, or are something else."""
    faults = defaultdict(list)
    for part, fields in FIELDS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            faults["lists of COCO's format missing"].append(part)
            continue
        kinds = fields | POINT_FIELDS if points and part == 'annotations' else fields
        for number, entry in enumerate(entries):
            has = entry if isinstance(entry, dict) else {}
            if lacking := [field for field in kinds if field not in has]:
                faults['entries that lack fields'].append(f'{part}[{number}]: {" and ".join(lacking)}')
            for field, kind in kinds.items():
                if field in has and not KINDS[kind](has[field]):
                    said = f'{part}[{number}]: {field} {reprlib.repr(has[field])} is not {kind}'
                    faults["values of another kind than COCO's"].append(said)
    return faults


def _faults(
    folder: Path, images: list[Any], annotations: list[Any], categories: list[Any], check: bool
) -> dict[str, list[str]]:
    faults = defaultdict(list)
    for image in images:
        file = folder / image['file_name']
        if not file.is_file():
            faults['images that are missing'].append(str(file))
        elif check:
            try:
                with Image.open(file) as opened:
                    size = opened.size
            except UNREADABLE as error:
                faults['images that cannot be read'].append(f'{file}: {" ".join(str(error).split())}')
                continue
            if size != (image['width'], image['height']):
                said = f'{image["width"]}x{image["height"]}'
                faults['images of another size than it says'].append(f'{file}: {size[0]}x{size[1]}, not {said}')
    listed = {image['id'] for image in images}
    points = {category['id']: 3 * len(category.get('keypoints') or ()) for category in categories}
    for one in annotations:
        name = f'annotation {one["id"]}'
        if one['category_id'] not in points:
            faults[f'labels outside of the {len(points)} categories'].append(f'{name}: {one["category_id"]}')
        elif 'keypoints' in one and not _are_points(one['keypoints'], points[one['category_id']]):
            faults['keypoints that are not x, y, 0 to 2 for each of the names'].append(name)
        if one['image_id'] not in listed:
            faults['annotations of an image that is not listed'].append(f'{name}: {one["image_id"]}')
    return faults


def _are_points(values: Any, count: int) -> bool:
    return KINDS['a list of numbers'](values) and len(values) == count and all(v in VISIBILITIES for v in values[2::3])
