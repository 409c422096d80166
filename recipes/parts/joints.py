"""Joints: crops of persons with their key points, from a COCO json, for the top-down protocol.

Joints(*coco_paths(data_dir, 'train', 'person_keypoints'), scale=0.35, rotation=45, hflip=0.5)
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from parts.coco import read_coco
from PIL import Image
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

MARGIN = 1.25  # of a crop around its box
TURNED = 0.6  # share of training crops that are rotated


class Joints(Dataset[dict[str, Tensor]]):
    """One crop per person that has a box and a labelled point and is no crowd.

    A box is widened to the crop's shape around its middle, enlarged by `MARGIN`, and warped to the crop's size. An item
    has `image` (float `(3, H, W)`, normalised), `points` (float `(K, 2)`, x and y in pixels of the crop, the first
    pixel's middle at 0.5), `weights` (float `(K,)`, 1 for labelled points, hidden or seen), `matrix` (float `(2, 3)`,
    from the crop back to the image, for `to_image`), `image_id` and `id` of the annotation (long).

    Args:
        images: Folder of the images.
        annotations: The json file.
        size: Height and width of a crop.
        scale: A random factor is 1 + this times a normal number, cut at 1 either way.
        rotation: Degrees that a random turn is in, as a normal number's standard deviation, cut at 2 either way.
        hflip: Probability that a crop is mirrored, with left and right points exchanged.
        mean: Per channel.
        std: Per channel.
        check: Also look at every image's size.

    Raises:
        ValueError: A check fails, or there are no persons with points.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        size: tuple[int, int] = (256, 192),
        *,
        scale: float = 0.0,
        rotation: float = 0.0,
        hflip: float = 0.0,
        mean: Sequence[float] = IMAGENET_INCEPTION_MEAN,
        std: Sequence[float] = IMAGENET_INCEPTION_STD,
        check: bool = True,
    ) -> None:
        self.coco = read_coco(images, annotations, points=True, check=check)
        named = [category for category in self.coco.categories if category.get('keypoints')]
        if len(named) != 1:
            raise ValueError(f'{annotations} has {len(named)} categories that name keypoints; expected one, of persons')
        self.labels: list[str] = list(named[0]['keypoints'])
        self.category_id: int = named[0]['id']
        self.order = flip_order(self.labels)
        self.size, self.scale, self.rotation, self.hflip = size, scale, rotation, hflip
        self.mean, self.std = list(mean), list(std)
        self._items = [
            (image, one)
            for image in self.coco.images
            for one in self.coco.annotations[image['id']]
            if not one['iscrowd'] and any(one['keypoints'][2::3])
        ]
        if not self._items:
            raise ValueError(f'{annotations} has no persons with keypoints')

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A crop and its points.

        Raises:
            ValueError: The image cannot be read.
        """
        image, one = self._items[index]
        matrix = crop_matrix(one['bbox'], self.size, *self._chance())
        height, width = self.size
        back = tuple(matrix.ravel())
        crop = self.coco.open(image).transform((width, height), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)
        labelled = np.array(one['keypoints'], np.float64).reshape(-1, 3)
        points = torch.from_numpy(_through(_inverse(matrix), labelled[:, :2] + 0.5))  # COCO names a pixel
        weights = torch.from_numpy(labelled[:, 2] > 0)
        if torch.rand(()) < self.hflip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            matrix = matrix @ np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1]])
            points = torch.stack([width - points[:, 0], points[:, 1]], 1)[self.order]
            weights = weights[self.order]
        pixels = F.to_dtype(F.pil_to_tensor(crop), torch.float32, scale=True)
        return {
            'image': F.normalize(pixels, self.mean, self.std),
            'points': points.float(),
            'weights': weights.float(),
            'matrix': torch.from_numpy(matrix).float(),
            'image_id': torch.tensor(image['id']),
            'id': torch.tensor(one['id']),
        }

    def _chance(self) -> tuple[float, float]:
        """A random factor and a random turn."""
        size, turn = torch.randn(2).tolist()
        turned = torch.rand(()).item() < TURNED
        return 1 + self.scale * max(-1, min(1, size)), self.rotation * max(-2, min(2, turn)) * turned


def crop_matrix(
    box: Sequence[float], size: tuple[int, int], scale: float = 1.0, rotation: float = 0.0
) -> NDArray[np.float64]:
    """Where in the image a crop's places come from, as a `(2, 3)` matrix.

    Args:
        box: COCO's `[x, y, width, height]`.
        size: Height and width of the crop.
        scale: Factor on what the crop shows.
        rotation: Degrees that the crop is turned by, clockwise as we see it.
    """
    x, y, w, h = box
    height, width = size
    step = MARGIN * scale * max(w / width, h / height)  # pixels of the image per pixel of the crop
    angle = np.deg2rad(rotation)
    cos, sin = step * np.cos(angle), step * np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    shift = np.array([x + w / 2, y + h / 2]) - turn @ np.array([width / 2, height / 2])
    return np.column_stack([turn, shift])


def to_image(points: Tensor, matrix: Tensor) -> Tensor:
    """Points of crops as COCO has them in the image, where the first pixel is 0.

    Args:
        points: `(N, K, 2)`, x and y in pixels of the crop, the first pixel's middle at 0.5.
        matrix: `(N, 2, 3)`, as the crops came with.
    """
    return points @ matrix[:, :, :2].mT + matrix[:, None, :, 2] - 0.5


def flip_order(names: Sequence[str]) -> list[int]:
    """Number of the point that each point becomes in a mirror: left_ and right_ change places."""
    swapped = [
        name.replace('left_', 'right_', 1) if name.startswith('left_') else name.replace('right_', 'left_', 1)
        for name in names
    ]
    return [names.index(other) if other in names else i for i, other in enumerate(swapped)]


def _inverse(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    turn = np.linalg.inv(matrix[:, :2])
    return np.column_stack([turn, -turn @ matrix[:, 2]])


def _through(matrix: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    return points @ matrix[:, :2].T + matrix[:, 2]
