"""Detection of the items on the canvases by a small SSD."""

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from accuracy_tasks.canvases import NOTHING, SIZE, canvases
from accuracy_tasks.images import CLASSES, convolution
from accuracy_tasks.task import Batch, Scores, Task, adamw
from helpers.training.recipe import Recipe

Items = dict[str, Tensor]  # boxes (M, 4), labels (M), and of detections scores (M)


class Backbone(nn.Module):
    """Convolutions that give activations of two resolutions, 12x12 and 6x6."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            *_layer(1, width, 2),
            *_layer(width, 2 * width, 1),
            *_layer(2 * width, 2 * width, 2),
            *_layer(2 * width, 2 * width, 1),
        )
        self.coarse = nn.Sequential(
            *_layer(2 * width, 4 * width, 2), *_layer(4 * width, 4 * width, 1)
        )
        self.out_channels = [2 * width, 4 * width]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the activations by their names."""
        fine = self.fine(images)
        return OrderedDict(fine=fine, coarse=self.coarse(fine))


def _layer(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return convolution(inputs, outputs, 3, stride), nn.ReLU()


def small_ssd() -> nn.Module:
    """Return torchvision's SSD with a small backbone, for the classes and the background."""
    return SSD(
        Backbone(),
        DefaultBoxGenerator([[2], [2]], scales=[0.3, 0.42, 0.54]),
        size=(SIZE, SIZE),
        num_classes=CLASSES + 1,
        image_mean=[0.0],  # the canvases are normalised already
        image_std=[1.0],
        score_thresh=0.05,
        topk_candidates=50,
        detections_per_img=50,
    )


def items(boxes: Tensor, labels: Tensor) -> list[Items]:
    """Return the items of each canvas, with labels from 1 as torchvision counts them."""
    return [
        {"boxes": some[which != NOTHING], "labels": which[which != NOTHING] + 1}
        for some, which in zip(boxes, labels, strict=True)
    ]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the sum of SSD's losses for classes and for boxes."""
    images, boxes, labels, _ = batch
    losses = model(list(images), items(boxes, labels))
    return losses["classification"] + losses["bbox_regression"]


def scores(model: nn.Module, test: Batch) -> Scores:
    """Return the mean average precision at an IoU of 0.5."""
    images, boxes, labels, _ = test
    found = [one for part in images.split(100) for one in model(list(part))]
    return {"mAP@0.5 %": 100 * mean_average_precision(found, items(boxes, labels))}


def mean_average_precision(found: list[Items], truth: list[Items], iou: float = 0.5) -> float:
    """Return the mean over the classes of the average precision, as COCO defines it.

    Args:
        found: the detections on each image, with scores.
        truth: the items on each image. Classes of which there is no item do not count.
        iou: the least intersection over union of a detection with its item.
    """
    classes = torch.cat([each["labels"] for each in truth]).unique().tolist()
    return sum(_average_precision(found, truth, label, iou) for label in classes) / len(classes)


def _average_precision(found: list[Items], truth: list[Items], label: int, iou: float) -> float:
    """Return the mean, over 101 recalls, of the best precision at that recall or above."""
    matched, confidence, total = [], [], 0
    for detections, wanted in zip(found, truth, strict=True):
        boxes = wanted["boxes"][wanted["labels"] == label]
        mine = detections["labels"] == label
        order = detections["scores"][mine].argsort(descending=True, stable=True)
        overlaps = box_iou(detections["boxes"][mine][order], boxes)
        confidence += detections["scores"][mine][order].tolist()
        matched += _matches(overlaps, iou)
        total += len(boxes)
    order = torch.tensor(confidence).argsort(descending=True, stable=True)
    right = torch.tensor(matched, dtype=torch.float64)[order].cumsum(0)
    recall = right / total
    precision = right / torch.arange(1, len(right) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)  # at this recall or above
    # NumPy's steps, as in COCO's code: PyTorch's differ in the last bit, which a recall may meet.
    wanted_recalls = torch.from_numpy(np.linspace(0, 1, 101))
    place = torch.searchsorted(recall, wanted_recalls)  # the first that reaches each recall
    return float(torch.cat((best, best.new_zeros(1)))[place].mean())


def _matches(overlaps: Tensor, iou: float) -> list[bool]:
    """Return whether each detection (rows, the surest first) finds an item (columns) of its own."""
    free, matches = overlaps.clone(), []
    for row in range(len(free)):
        best, column = free[row].max(0) if free.shape[1] else (torch.tensor(0.0), None)
        matches.append(bool(best >= iou))
        if matches[-1]:
            free[:, column] = 0
    return matches


RECIPE = Recipe(epochs=3, batch_size=32, learning_rate=5e-3, weight_decay=1e-2, warmup=0.1)
TASKS = (
    Task(
        network="small SSD",
        mirrors="SSD-RN50",
        make_model=small_ssd,
        load_data=canvases,
        loss=loss,
        scores=scores,
        make_optimizer=adamw,
        recipe=RECIPE,
        training_examples=6_000,
        test_examples=1_000,
    ),
)
