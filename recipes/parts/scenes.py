"""Scenes: real scans on a canvas, with known masks, boxes and points, in the folders of Cityscapes, ADE20K and COCO.

They are the embedded default of the dense tasks. Scenes of the test split show scans that are held out from the
training split, so that what is scored was never seen.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from parts.classification import FASHION_MNIST, FASHION_MNIST_LABELS, digits, idx_split
from parts.config import Setup
from PIL import Image

Layout = Literal['cityscapes', 'ade20k', 'coco']
Scans = Literal['digits', 'fashion_mnist']
EMBEDDED: dict[str, Scans] = {'scenes': 'digits', 'fashion_scenes': 'fashion_mnist'}  # datasets of the recipes

SPLITS = ('train', 'val')
ABOUT = 'scenes.json'  # beside a layout's own files: what the scenes were made from
VERSION = 1  # of what a seed means

# Cityscapes' label ids: a road, and on it the ten classes that stand or move there
ROAD = 7
ROAD_USERS = (19, 20, 24, 25, 26, 27, 28, 31, 32, 33)

PERSON = (
    'nose', 'left_eye', 'right_eye', 'left_ear', 'right_ear', 'left_shoulder', 'right_shoulder', 'left_elbow',
    'right_elbow', 'left_wrist', 'right_wrist', 'left_hip', 'right_hip', 'left_knee', 'right_knee', 'left_ankle',
    'right_ankle',
)  # fmt: skip
SKELETON = (
    (16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9), (8, 10), (9, 11),
    (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7),
)  # fmt: skip

INK = 0.35  # opacity from which a pixel belongs to a thing
SEEN = 0.8  # share of its ink that every thing keeps: the rest may be hidden, or beyond the edge
SIDE = (0.35, 0.55)  # of a scan, as shares of the scene's shorter side
TURN = 15.0  # degrees, either way
TRIES = 20  # places that are tried for a thing before the scene goes without it


@dataclass
class Thing:
    """A scan in a scene.

    Args:
        label: Its class.
        ink: Its pixels that are seen, bool `(H, W)`.
        points: COCO's `(17, 3)`: x and y of a pixel, and 2 if it is seen, 1 if hidden; three zeros if there is none.
    """

    label: int
    ink: NDArray[np.bool_]
    points: NDArray[np.float64]

    @property
    def box(self) -> list[int]:
        """COCO's `[x, y, width, height]` around the ink."""
        rows, columns = np.flatnonzero(self.ink.any(1)), np.flatnonzero(self.ink.any(0))
        x, y = int(columns[0]), int(rows[0])
        return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


@dataclass
class Scene:
    """An image, uint8 `(H, W, 3)`, and what is in it."""

    pixels: NDArray[np.uint8]
    things: list[Thing]

    def label_map(self, values: tuple[int, ...], background: int) -> NDArray[np.uint8]:
        """Per pixel, the value of the class that is seen there, `(H, W)`."""
        found = np.full(self.pixels.shape[:2], background, np.uint8)
        for thing in self.things:
            found[thing.ink] = values[thing.label]
        return found


def write_scenes(
    folder: str | Path,
    layout: Layout,
    *,
    scans: Scans = 'digits',
    data_dir: str | Path | None = None,
    train: int = 600,
    val: int = 200,
    size: tuple[int, int] = (96, 96),
    most: int = 4,
    seed: int = 0,
) -> Path:
    """Write scenes in the layout of a well-known dataset, whole or not at all; the same arguments give the same bytes.

    * `cityscapes`: every scan is one of ten classes that stand or move on a road, the rest is road.
    * `ade20k`: scans are classes 1 to 10, the rest is an eleventh; objectInfo150.txt names these eleven.
    * `coco`: ten categories of boxes in instances_*.json; in person_keypoints_*.json every scan is a person.

    Args:
        folder: Where to; if it holds the same scenes already, nothing is written.
        layout: Whose folders and formats.
        scans: What the scenes are composed from.
        data_dir: Where Fashion-MNIST's idx files lie, if not where Debian's package puts them.
        train: Scenes to train on.
        val: Scenes to score on, made from scans that are held out.
        size: Their height and width.
        most: Most scans in a scene; there is at least one.
        seed: Of everything.

    Returns:
        The folder.

    Raises:
        ValueError: An argument does not fit, or the folder holds something else.
    """
    folder = Path(folder)
    if layout not in WRITERS:
        raise ValueError(f'layout must be one of {", ".join(WRITERS)}, got {layout!r}')
    if min(size) < 32 or min(train, val, most) < 1:
        raise ValueError(
            f'scenes are at least 32x32, and train, val and most at least 1; got size={tuple(size)}, train={train}, '
            f'val={val}, most={most}'
        )
    about = {
        'version': VERSION, 'layout': layout, 'scans': scans, 'train': train, 'val': val, 'size': list(size),
        'most': most, 'seed': seed,
    }  # fmt: skip
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        return _same(folder, about)
    sources, names = _sources(scans, data_dir)
    temporary = folder.with_name(f'.{folder.name}.{uuid.uuid4().hex}')
    temporary.mkdir(parents=True)
    try:
        scenes = {
            split: _scenes([seed, list(WRITERS).index(layout), number], *sources[split], about, about[split])
            for number, split in enumerate(SPLITS)
        }
        WRITERS[layout](temporary, scenes, names)
        (temporary / ABOUT).write_text(json.dumps(about), encoding='utf-8')
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():
                raise
            _same(folder, about)  # another process was faster
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def dataset_folder(config: Setup, accelerator: Accelerator, layout: Layout, others: Iterable[str]) -> str:
    """Where a run's images and annotations lie; scenes are written there first, once.

    Args:
        config: The run's.
        accelerator: Its processes, of which one writes.
        layout: That of scenes.
        others: What the dataset may be other than scenes.

    Raises:
        ValueError: The dataset is none of these, its folder is missing, or Fashion-MNIST is.
    """
    name, folder, known = config.dataset, config.data_dir, (*EMBEDDED, *others)
    if name not in known:
        raise ValueError(f'dataset {name!r} has no place in task {config.task!r}; choose from {", ".join(known)}')
    if config.in_chans != 3:
        raise ValueError(f'in_chans must be 3 for task {config.task!r}, got {config.in_chans}')
    if name in EMBEDDED:
        folder = folder or f'output/{name}/{layout}'
        with accelerator.main_process_first():
            write_scenes(folder, layout, scans=EMBEDDED[name])
    if not folder or not (name == 'scene_parse_150' or Path(folder).is_dir()):  # that one may be a name on the Hub
        raise ValueError(f'dataset {name!r} needs data_dir=FOLDER, and {folder} is none')
    return folder


def _same(folder: Path, about: dict[str, Any]) -> Path:
    try:
        there = json.loads((folder / ABOUT).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        raise ValueError(f'{folder} holds something that is not scenes ({ABOUT} is missing); choose another') from None
    differ = ', '.join(
        f'{key} is {there.get(key)!r} there, {about[key]!r} here' for key in about if there.get(key) != about[key]
    )
    if differ:
        raise ValueError(f'{folder} already holds other scenes ({differ}); choose another')
    return folder


def _sources(scans: str, data_dir: str | Path | None) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    """Scans and their labels by split, and the names of the classes."""
    if scans == 'digits':
        *splits, names = digits('L')
        return {name: (split.images, split.labels) for name, split in zip(SPLITS, splits, strict=True)}, names
    if scans == 'fashion_mnist':
        folder = Path(data_dir or FASHION_MNIST)
        if not any(folder.glob('train-images-idx3-ubyte*')):
            puts = f'`apt install dataset-fashion-mnist` puts it into {FASHION_MNIST}'
            raise ValueError(f'Fashion-MNIST is not in {folder}; {puts}')
        found = {name: idx_split(folder, split) for name, split in zip(SPLITS, ('train', 't10k'), strict=True)}
        return found, list(FASHION_MNIST_LABELS)
    raise ValueError(f'scans must be digits or fashion_mnist, got {scans!r}')


def _scenes(seed: list[int], scans: Any, labels: Any, about: dict[str, Any], count: int) -> Iterator[Scene]:
    for index in range(count):
        rng = np.random.default_rng([*seed, index])  # a scene does not depend on how many there are
        chosen = rng.integers(len(scans), size=rng.integers(1, about['most'], endpoint=True))
        yield compose(rng, scans[chosen], labels[chosen], about['size'])


def compose(rng: np.random.Generator, scans: NDArray[np.uint8], labels: Any, size: tuple[int, int]) -> Scene:
    """Put scans on a canvas, each in a colour, a size, a slight turn and a place of its own.

    Args:
        rng: Where chance comes from.
        scans: uint8 `(n, h, w)`, bright ink on black.
        labels: Their classes, `(n,)`.
        size: Height and width of the scene.
    """
    margin = min(size) // 2  # things may reach beyond the edge: they are placed on a larger canvas, which is then cut
    shape = (size[0] + 2 * margin, size[1] + 2 * margin)
    inside = (slice(margin, -margin), slice(margin, -margin))
    coarse = Image.fromarray(rng.integers(0, 90, (3, 3, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC), np.float64)
    owner = np.full(shape, -1)  # which thing is on top
    inks: list[NDArray[np.bool_]] = []
    kept: list[int] = []
    for scan, label in zip(scans, labels, strict=True):
        for _ in range(TRIES):
            opacity = _placed(rng, scan, size, margin)
            ink = opacity >= INK
            trial = np.where(ink, len(inks), owner)
            if all((trial[inside] == i).sum() >= SEEN * whole.sum() for i, whole in enumerate([*inks, ink])):
                colour = rng.uniform(160, 255, 3)
                pixels += (colour - pixels) * opacity[..., None]
                owner = trial
                inks.append(ink)
                kept.append(int(label))
                break
    things = [
        Thing(label, owner[inside] == i, _seen(seventeen_points(ink) - margin, owner[inside], i))
        for i, (label, ink) in enumerate(zip(kept, inks, strict=True))
    ]
    return Scene(pixels[inside].round().clip(0, 255).astype(np.uint8), things)


def _placed(rng: np.random.Generator, scan: NDArray[np.uint8], size: tuple[int, int], margin: int) -> NDArray[Any]:
    """Opacity of a scan somewhere on the larger canvas."""
    scan = np.pad(scan, 1)  # its edge fades out
    zoom = rng.uniform(*SIDE) * min(size) / len(scan)
    angle = np.deg2rad(rng.uniform(-TURN, TURN))
    x, y = rng.uniform(0, size[1]) + margin, rng.uniform(0, size[0]) + margin
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    back = (  # from a place on the canvas to the place in the scan that is shown there
        cos, sin, scan.shape[1] / 2 - cos * x - sin * y,
        -sin, cos, scan.shape[0] / 2 + sin * x - cos * y,
    )  # fmt: skip
    shape = (size[1] + 2 * margin, size[0] + 2 * margin)
    placed = Image.fromarray(scan).transform(shape, Image.Transform.AFFINE, back, Image.Resampling.BICUBIC)
    return np.asarray(placed, np.float64) / 255


def seventeen_points(ink: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Seventeen points of a shape that an image alone tells, in COCO's order, `(17, 2)` of x and y; nan: there is none.

    The nose is the middle of all ink. The shape's height is cut into eight equal bands, one for each pair from the eyes
    down to the ankles: the left one of a pair is where the ink ends on the right (as of a person who looks at us), the
    right one where it ends on the left, both on average over the band's rows. An average moves smoothly with the
    ink, where an extreme would jump, and nothing depends on how the scan was turned, which no net could know. A
    mirrored shape has mirrored points with left and right exchanged, which is what flipping in training takes for
    granted. A band without ink (the gap in a garment) has no points.
    """
    points = np.full((17, 2), np.nan)
    y, x = np.nonzero(ink)
    points[0] = x.mean(), y.mean()
    rows = np.unique(y)
    band = (rows - rows[0]) * 8 // (rows[-1] + 1 - rows[0])
    first, last = ink[rows].argmax(1), ink.shape[1] - 1 - ink[rows, ::-1].argmax(1)
    for pair in range(8):
        here = band == pair
        if here.any():
            height = rows[here].mean()
            points[1 + 2 * pair] = last[here].mean(), height
            points[2 + 2 * pair] = first[here].mean(), height
    return points


def _seen(points: NDArray[np.float64], owner: NDArray[Any], thing: int) -> NDArray[np.float64]:
    """COCO's triples: points with whether they are seen; one beyond the edge is as good as none."""
    found = np.zeros((17, 3))
    for number, (x, y) in enumerate(points):
        if 0 <= x <= owner.shape[1] - 1 and 0 <= y <= owner.shape[0] - 1:
            hidden = owner[round(y), round(x)] not in (-1, thing)
            found[number] = round(x, 2), round(y, 2), 1 if hidden else 2
    return found


def _write_cityscapes(folder: Path, scenes: dict[str, Iterator[Scene]], names: list[str]) -> None:
    for split, found in scenes.items():
        images, masks = (folder / kind / split / 'scans' for kind in ('leftImg8bit', 'gtFine'))
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for index, scene in enumerate(found):
            stem = f'scans_{index:06d}_000019'  # city, sequence, frame
            Image.fromarray(scene.pixels).save(images / f'{stem}_leftImg8bit.png')
            Image.fromarray(scene.label_map(ROAD_USERS, ROAD)).save(masks / f'{stem}_gtFine_labelIds.png')


def _write_ade20k(folder: Path, scenes: dict[str, Iterator[Scene]], names: list[str]) -> None:
    folder = folder / 'ADEChallengeData2016'
    names = [*names, 'background']
    pixels, holding = np.zeros(len(names)), {split: np.zeros(len(names), int) for split in SPLITS}
    for (split, found), long in zip(scenes.items(), ('training', 'validation'), strict=True):
        images, masks = (folder / kind / long for kind in ('images', 'annotations'))
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for index, scene in enumerate(found, 1):
            labels = scene.label_map(tuple(range(1, len(names))), len(names))
            counts = np.bincount(labels.ravel(), minlength=len(names) + 1)[1:]
            pixels += counts
            holding[split] += counts > 0
            stem = f'ADE_{split}_{index:08d}'
            _save_jpeg(scene, images / f'{stem}.jpg')
            Image.fromarray(labels).save(masks / f'{stem}.png')
    rows = zip(pixels / pixels.sum(), *holding.values(), names, strict=True)
    lines = [f'{i}\t{share:.4f}\t{train}\t{val}\t{name}\n' for i, (share, train, val, name) in enumerate(rows, 1)]
    (folder / 'objectInfo150.txt').write_text(''.join(['Idx\tRatio\tTrain\tVal\tName\n', *lines]), encoding='utf-8')


def _write_coco(folder: Path, scenes: dict[str, Iterator[Scene]], names: list[str]) -> None:
    (folder / 'annotations').mkdir()
    categories = {
        'instances': [{'supercategory': 'scan', 'id': i, 'name': name} for i, name in enumerate(names, 1)],
        'person_keypoints': [
            {'supercategory': 'person', 'id': 1, 'name': 'person', 'keypoints': PERSON, 'skeleton': SKELETON}
        ],
    }
    for (split, found), first in zip(scenes.items(), (1, 500_001), strict=True):  # ids are unique over both splits
        (folder / f'{split}2017').mkdir()
        images: list[dict[str, Any]] = []
        annotations: dict[str, list[dict[str, Any]]] = {kind: [] for kind in categories}
        for image_id, scene in enumerate(found, first):
            name = f'{image_id:012d}.jpg'
            _save_jpeg(scene, folder / f'{split}2017' / name)
            height, width = scene.pixels.shape[:2]
            images.append({'license': 1, 'file_name': name, 'height': height, 'width': width, 'id': image_id})
            for thing in scene.things:
                one = {
                    'segmentation': {'counts': run_lengths(thing.ink), 'size': [height, width]},
                    'area': int(thing.ink.sum()),
                    'iscrowd': 0,
                    'image_id': image_id,
                    'bbox': thing.box,
                    'id': first + len(annotations['instances']),
                }
                annotations['instances'].append({**one, 'category_id': thing.label + 1})
                annotations['person_keypoints'].append({
                    **one,
                    'category_id': 1,
                    'num_keypoints': int((thing.points[:, 2] > 0).sum()),
                    'keypoints': [value for x, y, v in thing.points.tolist() for value in (x, y, int(v))],
                })  # fmt: skip
        for kind, rows in annotations.items():
            content = {
                'info': {'description': 'Scenes of scans', 'version': str(VERSION), 'year': 2017},
                'licenses': [{'id': 1, 'name': 'CC BY 4.0', 'url': 'https://creativecommons.org/licenses/by/4.0/'}],
                'images': images,
                'annotations': rows,
                'categories': categories[kind],
            }
            (folder / 'annotations' / f'{kind}_{split}2017.json').write_text(json.dumps(content), encoding='utf-8')


WRITERS = {'cityscapes': _write_cityscapes, 'ade20k': _write_ade20k, 'coco': _write_coco}


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's run lengths: down the columns, of zeros and ones by turns, zeros first."""
    flat = mask.ravel(order='F')
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    return np.diff([0, *changes, flat.size]).tolist()


def _save_jpeg(scene: Scene, path: Path) -> None:
    Image.fromarray(scene.pixels).save(path, quality=95)
