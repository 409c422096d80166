"""Segmentation: a class for every pixel; cross entropy; mean intersection over union."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from parts.config import Setup
from parts.data import Data, check_splits, normalization, on_device, share
from parts.pixelnet import create_pixel_net, upsampled
from parts.pixels import IGNORE, READERS, collate_pixels, read_pixels, scoring, training
from parts.scenes import EMBEDDED, dataset_folder
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassJaccardIndex

HARD_AT_LEAST = 1 / 16  # of the pixels count, however well they are known


@dataclass
class Segmentation:
    """The task of giving every pixel a class.

    Args:
        config: The run's; its dataset is one of scenes.EMBEDDED or of pixels.READERS.
        crop: Height and width of training crops; by default `img_size` both.
        scale: Smallest and largest factor of training images.
        ohem: Only pixels whose class is given a smaller probability than this count; 0 counts all.
        scales: Factors of the test images whose scores are averaged.
        flip: Average with the mirrored test images' scores too.
        width: Channels of the head, for models that have none of their own.
        check: Look at all masks before training starts.
    """

    config: Setup
    crop: list[int] = field(default_factory=list)
    scale: list[float] = field(default_factory=lambda: [0.75, 1.5])
    ohem: float = 0.0
    scales: list[float] = field(default_factory=lambda: [1.0])
    flip: bool = False
    width: int = 64
    check: bool = True
    metric: ClassVar[str] = 'miou'

    def __post_init__(self) -> None:
        if not 0 <= self.ohem < 1:
            raise ValueError(f'ohem must be in [0, 1), got {self.ohem}')
        if not (self.scales and min(self.scales) > 0):
            raise ValueError(f'scales must be factors above 0, got {self.scales}')
        if not (len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1]):
            raise ValueError(f'scale must be a smallest and a largest factor, got {self.scale}')
        self.crop = list(self.crop or (self.config.img_size, self.config.img_size))
        if len(self.crop) != 2 or min(self.crop) < 1:
            raise ValueError(f'crop must be a height and a width, got {self.crop}')

    def create_data(self, accelerator: Accelerator, known: Mapping[str, Any] | None = None) -> Data:
        """Loaders of images and masks."""
        config = self.config
        folder = dataset_folder(config, accelerator, 'cityscapes', READERS)
        name = 'cityscapes' if config.dataset in EMBEDDED else config.dataset
        mean, std = normalization(config.in_chans, known or {})
        height, width = self.crop
        augment = training((height, width), (self.scale[0], self.scale[1]), config.hflip, mean, std)
        train = read_pixels(name, folder, 'train', augment, check=self.check)
        val = read_pixels(name, folder, 'val', scoring(mean, std), check=self.check)
        check_splits(config, accelerator, train, val)
        loaders = share(train, val, config, accelerator, collate_pixels, val_batch=1)  # no net sees padding
        about = {'input_size': (config.in_chans, height, width), 'mean': mean, 'std': std, 'interpolation': 'bilinear'}
        return Data(*loaders, len(val), train.labels, len(train.labels), {**about, 'label_names': train.labels})

    def create_net(self, make: Callable[..., nn.Module], data: Data) -> nn.Module:
        """A net that scores pixels."""
        return create_pixel_net(make, data.num_classes, self.width)

    def loss(self, model: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
        """Cross entropy of the pixels that count, or of the harder ones among them."""
        scores = upsampled(model(images), masks.shape[-2:])
        losses = cross_entropy(scores, masks, ignore_index=IGNORE, reduction='none')[masks != IGNORE]
        if self.ohem and len(losses):
            kept = max(int((losses > -torch.log(losses.new_tensor(self.ohem))).sum()), int(HARD_AT_LEAST * len(losses)))
            losses = losses.topk(max(1, kept)).values
        return losses.sum() / max(1, len(losses))

    @torch.inference_mode()
    def score(self, net: nn.Module, data: Data, accelerator: Accelerator) -> float:
        """Mean over the classes of intersection over union, of all pixels of all test images together."""
        was_training = net.training
        net.eval()
        metric = MulticlassJaccardIndex(data.num_classes, ignore_index=IGNORE).to(accelerator.device)
        for images, masks in on_device(data.val, accelerator.device):
            metric.update(self.predicted(net, images, masks.shape[-2:]).argmax(1), masks)
        net.train(was_training)
        return float(metric.compute())

    def predicted(self, net: nn.Module, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Probabilities `(N, classes, *size)`, averaged over scales and mirror images."""
        total = torch.zeros((), device=images.device)
        for factor in self.scales:
            scaled = images if factor == 1 else upsampled(images, [round(side * factor) for side in images.shape[-2:]])
            total = total + upsampled(net(scaled), size).softmax(1)
            if self.flip:
                total = total + upsampled(net(scaled.flip(-1)).flip(-1), size).softmax(1)
        return total / (len(self.scales) * (1 + self.flip))
