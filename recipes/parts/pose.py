"""Pose: the key points of persons, as heat maps of crops; average precision by the points' similarity."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from parts.ap import average_precision
from parts.coco import coco_paths
from parts.config import Setup
from parts.data import Data, check_splits, normalization, on_device, share
from parts.heatmaps import SIGMA, STRIDE, decode, flip_mean, render
from parts.joints import Joints, to_image
from parts.pixelnet import create_pixel_net, upsampled
from parts.scenes import dataset_folder
from torch import Tensor, nn
from torch.utils.data import default_collate

POINTS = 17  # COCO's evaluator knows how far off each of these may be
VISIBLE = 0.2  # height from which a point counts for the score of its person


@dataclass
class Keypoints:
    """The task of finding the key points of persons whose boxes are known.

    Args:
        config: The run's; its dataset is one of scenes.EMBEDDED or `coco`.
        crop: Height and width of crops.
        scale: Training crops show this share more or less, as a normal number's standard deviation.
        rotation: Degrees that training crops are turned by, likewise.
        sigma: Of the targets, in cells of four pixels.
        flip: Average with the mirrored test crops' heat maps.
        width: Channels of the head, for models that have none of their own.
        check: Look at every image's size before training starts.
    """

    config: Setup
    crop: list[int] = field(default_factory=lambda: [256, 192])
    scale: float = 0.35
    rotation: float = 45.0
    sigma: float = SIGMA
    flip: bool = True
    width: int = 64
    check: bool = True
    metric: ClassVar[str] = 'keypoint_ap'

    def __post_init__(self) -> None:
        if len(self.crop) != 2 or min(self.crop) < STRIDE or any(side % STRIDE for side in self.crop):
            raise ValueError(f'crop must be a height and a width, multiples of {STRIDE}, got {self.crop}')
        if not 0 <= self.scale < 1:
            raise ValueError(f'scale must be in [0, 1), got {self.scale}')
        if self.rotation < 0:
            raise ValueError(f'rotation must be at least 0, got {self.rotation}')
        if not self.sigma > 0:
            raise ValueError(f'sigma must be above 0, got {self.sigma}')

    def create_data(self, accelerator: Accelerator, known: Mapping[str, Any] | None = None) -> Data:
        """Loaders of crops and their points."""
        config, (height, width) = self.config, self.crop
        folder = dataset_folder(config, accelerator, 'coco', ['coco'])
        mean, std = normalization(config.in_chans, known or {})
        chance = {'scale': self.scale, 'rotation': self.rotation, 'hflip': config.hflip}
        train, val = (
            Joints(
                *coco_paths(folder, split, 'person_keypoints'),
                (height, width),
                mean=mean,
                std=std,
                check=self.check,
                **more,
            )
            for split, more in (('train', chance), ('val', {}))
        )
        for persons in (train, val):
            if len(persons.labels) != POINTS:
                raise ValueError(f'{persons.coco.path} names {len(persons.labels)} keypoints; COCO scores {POINTS}')
        check_splits(config, accelerator, train, val)
        loaders = share(train, val, config, accelerator, collate_joints)
        about = {'input_size': (config.in_chans, height, width), 'mean': mean, 'std': std, 'interpolation': 'bilinear'}
        return Data(*loaders, len(val), train.labels, POINTS, {**about, 'label_names': train.labels})

    def create_net(self, make: Callable[..., nn.Module], data: Data) -> nn.Module:
        """A net with a heat map for every point."""
        return create_pixel_net(make, data.num_classes, self.width)

    def loss(self, model: nn.Module, images: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """Half of the mean squared error of the heat maps; those of points that are not labelled count as right."""
        maps = heatmaps(model, images)
        wanted, weights = render(targets['points'], targets['weights'], tuple(maps.shape[-2:]), sigma=self.sigma)
        return (weights[..., None, None] * (maps - wanted) ** 2).mean() / 2

    @torch.inference_mode()
    def score(self, net: nn.Module, data: Data, accelerator: Accelerator) -> float:
        """Average precision over all persons of the test images, found in their annotated boxes."""
        was_training = net.training
        net.eval()
        persons: Joints = data.val.dataset.dataset
        found = []
        for images, targets in on_device(data.val, accelerator.device):
            points, heights = decode(self.predicted(net, images, persons.order))
            found += results(to_image(points, targets['matrix']), heights, targets, persons.category_id)
        net.train(was_training)
        found = sorted(gather_object(found), key=lambda person: person['id'])  # in the same order for any processes
        return average_precision(persons.coco.path, found, 'keypoints')

    def predicted(self, net: nn.Module, images: Tensor, order: Sequence[int]) -> Tensor:
        """Heat maps `(N, K, H / 4, W / 4)`, averaged with those of the mirror images."""
        maps = heatmaps(net, images)
        return flip_mean(maps, heatmaps(net, images.flip(-1)), order) if self.flip else maps


def heatmaps(net: nn.Module, images: Tensor) -> Tensor:
    """A net's maps at the stride of the targets."""
    height, width = images.shape[-2:]
    return upsampled(net(images), (height // STRIDE, width // STRIDE)).float()


def results(points: Tensor, heights: Tensor, targets: Mapping[str, Tensor], category_id: int) -> list[dict[str, Any]]:
    """Persons as COCO's evaluator takes them; the score of one is the mean height of its visible points.

    Args:
        points: `(N, K, 2)`, x and y in the image.
        heights: `(N, K)`, of the heat maps.
        targets: With `image_id` and `id`, `(N,)`.
        category_id: That of persons.
    """
    seen = heights > VISIBLE
    scores = (heights * seen).sum(1) / seen.sum(1).clamp(min=1)
    rows = torch.cat([points, heights[..., None]], -1).flatten(1).tolist()
    return [
        {'image_id': image_id, 'id': number, 'category_id': category_id, 'keypoints': row, 'score': score}
        for image_id, number, row, score in zip(
            targets['image_id'].tolist(), targets['id'].tolist(), rows, scores.tolist(), strict=True
        )
    ]


def collate_joints(batch: Sequence[dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Crops, and all else that their items hold."""
    items: dict[str, Tensor] = default_collate(list(batch))
    return items.pop('image'), items
