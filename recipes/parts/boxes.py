"""Boxes: images with the boxes of a COCO json, as torchvision's detectors take them.

Boxes(*coco_paths(data_dir, 'train'), transform=training())
Boxes(*coco_paths(data_dir, 'val'), crowds=True)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parts.coco import read_coco
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

Target = dict[str, Tensor]


class Boxes(Dataset[tuple[Tensor, Target]]):
    """Images and their boxes.

    A target has `boxes` (float `(n, 4)`, x1 y1 x2 y2, cut at the image's edge), `labels` (long `(n,)`, from 1 on, since
    torchvision's detectors take 0 for the background), `image_id` (long, a scalar), `area` (float `(n,)`, as annotated)
    and `iscrowd` (long `(n,)`). Empty boxes are left out.

    Args:
        images: Folder of the images.
        annotations: The json file.
        crowds: Keep crowds: scoring needs them, training does not.
        skip_empty: Leave images without boxes out.
        transform: Of torchvision's v2, for an image and its target together; by default `scoring()`.
        check: Also look at every image's size.

    Raises:
        ValueError: A check fails, or there are no images left.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        *,
        crowds: bool = False,
        skip_empty: bool = False,
        transform: Any = None,
        check: bool = True,
    ) -> None:
        self.coco = read_coco(images, annotations, check=check)
        self.labels = self.coco.labels
        self.category_ids = [category['id'] for category in self.coco.categories]  # of label 1, 2, ...
        self.transform = transform or scoring()
        self._label = {number: label for label, number in enumerate(self.category_ids, 1)}
        self._items = []
        for image in self.coco.images:
            found = self.coco.annotations[image['id']]
            kept = [one for one in found if crowds or not one['iscrowd']]
            if kept or not skip_empty:
                self._items.append((image, kept))
        if not self._items:
            raise ValueError(f'{annotations} has no images with boxes')

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """An image, float `(3, H, W)` in [0, 1] by default, and its target.

        Raises:
            ValueError: The image cannot be read.
        """
        image, found = self._items[index]
        size = (image['height'], image['width'])
        boxes = torch.tensor([one['bbox'] for one in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {
            'boxes': F.clamp_bounding_boxes(tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=size)),
            'labels': torch.tensor([self._label[one['category_id']] for one in found], dtype=torch.int64),
            'image_id': torch.tensor(image['id']),
            'area': torch.tensor([one['area'] for one in found], dtype=torch.float32),
            'iscrowd': torch.tensor([one['iscrowd'] for one in found], dtype=torch.int64),
        }
        pixels, target = self.transform(tv_tensors.Image(F.pil_to_tensor(self.coco.open(image))), target)
        return pixels.as_subclass(Tensor), {**target, 'boxes': target['boxes'].as_subclass(Tensor)}


def training(hflip: float = 0.5) -> v2.Compose:
    """A random horizontal flip; torchvision's detectors normalise and resize by themselves."""
    return v2.Compose([v2.RandomHorizontalFlip(hflip), scoring()])


def scoring() -> v2.Compose:
    """Nothing but numbers as a detector takes them: images float in [0, 1]."""
    return v2.Compose([v2.ToDtype({tv_tensors.Image: torch.float32, 'others': None}, scale=True)])


def collate_boxes(batch: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Lists, since images have sizes of their own."""
    return [image for image, _ in batch], [target for _, target in batch]
