"""Detection: boxes of things, by a detector of torchvision over any timm model; average precision."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from parts.ap import average_precision
from parts.backbone import OnBackbone
from parts.boxes import Boxes, Target, collate_boxes, training
from parts.coco import coco_paths
from parts.config import Setup
from parts.data import CHANNELS_LAST, Data, check_splits, normalization, on_device, share
from parts.scenes import dataset_folder
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

LONGEST = 1333 / 800  # of an image's shorter side, as COCO is used to
GROUP = 8  # channels that are normalised together
RATIOS = (0.5, 1.0, 2.0)  # of the anchors' heights to their widths


@dataclass
class Detection:
    """The task of finding things and their boxes.

    Args:
        config: The run's; its dataset is one of scenes.EMBEDDED or `coco`, and `img_size` is what images' shorter sides
            become.
        detector: One of DETECTORS.
        anchor: Side of the smallest anchors in cells of their level; those of `fcos` are one cell, always.
        finest: Reduction of the finest level that is used.
        width: Channels of the pyramid and of the detector's heads.
        check: Look at every image's size before training starts.
    """

    config: Setup
    detector: str = 'fcos'
    anchor: float = 4.0
    finest: int = 8
    width: int = 64
    check: bool = True
    metric: ClassVar[str] = 'box_ap'

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise ValueError(f'detector {self.detector!r} is unknown; choose from {", ".join(DETECTORS)}')
        if not self.anchor > 0:
            raise ValueError(f'anchor must be above 0, got {self.anchor}')
        if self.finest < 1:
            raise ValueError(f'finest must be at least 1, got {self.finest}')
        if self.width < 1 or self.width % GROUP:
            raise ValueError(f'width must be a multiple of {GROUP}, got {self.width}')

    def create_data(self, accelerator: Accelerator, known: Mapping[str, Any] | None = None) -> Data:
        """Loaders of images, which have sizes of their own, and boxes."""
        config = self.config
        folder = dataset_folder(config, accelerator, 'coco', ['coco'])
        augment = {'transform': training(config.hflip), 'skip_empty': True}
        train, val = (
            Boxes(*coco_paths(folder, split), check=self.check, **more)
            for split, more in (('train', augment), ('val', {'crowds': True}))
        )
        if train.coco.categories != val.coco.categories:
            raise ValueError(f'{train.coco.path} and {val.coco.path} have other categories than each other')
        check_splits(config, accelerator, train, val)
        loaders = share(train, val, config, accelerator, collate_boxes)
        mean, std = normalization(config.in_chans, known or {})
        size = (config.in_chans, config.img_size, config.img_size)
        about = {'input_size': size, 'mean': mean, 'std': std, 'interpolation': 'bilinear', 'label_names': train.labels}
        return Data(*loaders, len(val), train.labels, len(train.labels), about)

    def create_net(self, make: Callable[..., nn.Module], data: Data) -> nn.Module:
        """A detector."""
        create = DETECTORS[self.detector]
        side = self.config.img_size
        settings = {
            'num_classes': 1 + data.num_classes,  # and the background
            'min_size': side,
            'max_size': round(LONGEST * side),
            'image_mean': list(data.config['mean']),
            'image_std': list(data.config['std']),
        }
        return BoxNet(
            make(num_classes=0),
            lambda body, strides: create(body, strides, self.anchor, **settings),
            self.finest,
            self.width,
        )

    def loss(self, model: nn.Module, images: list[Tensor], targets: list[Target]) -> Tensor:
        """The sum of the detector's losses."""
        losses: dict[str, Tensor] = model(images, targets)
        return torch.stack(list(losses.values())).sum()

    @torch.no_grad()  # and not inference_mode: training goes on with the anchors that the detector keeps
    def score(self, net: nn.Module, data: Data, accelerator: Accelerator) -> float:
        """Average precision over all test images."""
        was_training = net.training
        net.eval()
        boxes: Boxes = data.val.dataset.dataset
        found = []
        for images, targets in on_device(data.val, accelerator.device):
            for one, target in zip(net(images), targets, strict=True):
                found += results(one, int(target['image_id']), boxes.category_ids)
        net.train(was_training)
        found = sorted(gather_object(found), key=lambda box: box['image_id'])  # in the same order for any processes
        return average_precision(boxes.coco.path, found, 'bbox')


class BoxNet(OnBackbone):
    """A detector of torchvision over a feature pyramid over a backbone.

    Args:
        backbone: Any model of timm that gives maps.
        create: Makes the detector from what it takes for its backbone, and from the strides of the levels.
        finest: Reduction of the finest level that is used; one coarser than the backbone's is added.
        width: Channels of the pyramid.

    Shape:
        Images `(C, H, W)` in [0, 1], each of its size, and their targets to a dict of losses in training; without
        targets, to `boxes`, `scores` and `labels` of each image. A net in training that is given no targets returns
        its levels: that measures batch norm, of which the heads have none.
    """

    def __init__(
        self, backbone: nn.Module, create: Callable[['Body', list[int]], nn.Module], finest: int, width: int
    ) -> None:
        super().__init__(backbone, finest, ('pyramid', 'detector'))
        self.pyramid = FeaturePyramidNetwork(
            self.channels, width, extra_blocks=LastLevelMaxPool(), norm_layer=nn.BatchNorm2d
        )
        self.detector: Any = create(Body(self, width), [*self.reductions, 2 * self.reductions[-1]])

    def forward(self, images: Any, targets: list[Target] | None = None) -> Any:
        """Losses, or boxes."""
        if self.training and targets is None:
            return self.pyramid_levels(self.detector.transform(images)[0].tensors)
        return self.detector(images, targets)

    def pyramid_levels(self, x: Tensor) -> dict[str, Tensor]:
        """The levels as the detector takes them, finest first."""
        maps = self.maps(x.to(memory_format=CHANNELS_LAST))
        levels: dict[str, Tensor] = self.pyramid({str(i): level for i, level in enumerate(maps)})
        return levels


class Body:
    """What a detector calls its backbone: the levels of the net around it; no module, or weights would have two names.

    Args:
        net: The net.
        out_channels: Of every level.
    """

    def __init__(self, net: BoxNet, out_channels: int) -> None:
        self.net = net
        self.out_channels = out_channels

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """The levels."""
        return self.net.pyramid_levels(x)


def fcos(body: Body, strides: list[int], anchor: float, **settings: Any) -> nn.Module:
    """No anchors but the cells."""
    sizes = tuple((stride,) for stride in strides)
    width, num_classes, norm = body.out_channels, settings['num_classes'], group_norm(body.out_channels)
    head = FCOSHead(32, 1, num_classes)  # at multiples of 32 only, so both of its parts are replaced
    head.classification_head = FCOSClassificationHead(width, 1, num_classes, norm_layer=norm)
    head.regression_head = FCOSRegressionHead(width, 1, norm_layer=norm)
    anchors = AnchorGenerator(sizes, ((1.0,),) * len(sizes))
    return FCOS(body, anchor_generator=anchors, head=head, **settings)


def retinanet(body: Body, strides: list[int], anchor: float, **settings: Any) -> nn.Module:
    """Nine anchors a cell: three sizes within an octave, in three ratios."""
    sizes = tuple(tuple(anchor * stride * 2 ** (i / 3) for i in range(3)) for stride in strides)
    width, count = body.out_channels, 3 * len(RATIOS)
    head = RetinaNetHead(width, count, settings['num_classes'], norm_layer=group_norm(width))
    anchors = AnchorGenerator(sizes, (RATIOS,) * len(sizes))
    return RetinaNet(body, anchor_generator=anchors, head=head, **settings)


def faster_rcnn(body: Body, strides: list[int], anchor: float, **settings: Any) -> nn.Module:
    """Three anchors a cell, in three ratios."""
    sizes = tuple((anchor * stride,) for stride in strides)
    return FasterRCNN(body, rpn_anchor_generator=AnchorGenerator(sizes, (RATIOS,) * len(sizes)), **settings)


DETECTORS: dict[str, Callable[..., nn.Module]] = {'fcos': fcos, 'retinanet': retinanet, 'faster_rcnn': faster_rcnn}


def group_norm(width: int) -> Callable[[int], nn.Module]:
    """Norm of a head's layers, in groups as large as torchvision's at its own width."""
    return partial(nn.GroupNorm, width // GROUP)


def results(found: Target, image_id: int, category_ids: list[int]) -> list[dict[str, Any]]:
    """Boxes of an image as COCO's evaluator takes them.

    Args:
        found: `boxes` `(n, 4)`, x1 y1 x2 y2, `scores` and `labels`; label 0, the background, is no find.
        image_id: The image's.
        category_ids: Of labels 1, 2, ...
    """
    boxes = found['boxes'].clone()
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {'image_id': image_id, 'category_id': category_ids[label - 1], 'bbox': box, 'score': score}
        for label, box, score in zip(found['labels'].tolist(), boxes.tolist(), found['scores'].tolist(), strict=True)
        if label
    ]
