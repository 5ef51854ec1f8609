"""Segmentation of the canvases by a small U-Net."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accuracy_tasks.canvases import canvases
from accuracy_tasks.images import CLASSES, convolution
from accuracy_tasks.task import Batch, Scores, Task, adamw
from helpers.training.recipe import Recipe


class UNet(nn.Module):
    """A U-Net of three resolutions, the highest one half of the image's; logits (N, 11, H, W)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.high = _block(1, width, stride=2)
        self.middle = _block(width, 2 * width)
        self.low = _block(2 * width, 4 * width)
        self.middle_again = _block(4 * width + 2 * width, 2 * width)
        self.high_again = _block(2 * width + width, width)
        self.head = nn.Conv2d(width, CLASSES + 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of every pixel."""
        high = self.high(images)
        middle = self.middle(F.max_pool2d(high, 2))
        low = self.low(F.max_pool2d(middle, 2))
        middle = self.middle_again(torch.cat((F.interpolate(low, scale_factor=2), middle), 1))
        high = self.high_again(torch.cat((F.interpolate(middle, scale_factor=2), high), 1))
        return F.interpolate(self.head(high), scale_factor=2, mode="bilinear")


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        convolution(inputs, outputs, 3, stride),
        nn.ReLU(),
        convolution(outputs, outputs, 3),
        nn.ReLU(),
    )


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy over all pixels."""
    images, _, _, classes = batch
    return F.cross_entropy(model(images), classes)


def scores(model: nn.Module, test: Batch) -> Scores:
    """Return the mean intersection over union of the classes, the background among them."""
    images, _, _, classes = test
    answers = torch.cat([model(part).argmax(1) for part in images.split(100)])
    return {"mean IoU %": 100 * mean_iou(answers, classes, CLASSES + 1)}


def mean_iou(answers: Tensor, truth: Tensor, classes: int) -> float:
    """Return the mean over the classes of the intersection over the union of their pixels.

    Args:
        answers: classes (int64) of any number of pixels.
        truth: the right ones, in the same shape.
        classes: how many there are; those that occur in neither tensor do not count.
    """
    pairs = torch.bincount((truth * classes + answers).flatten(), minlength=classes**2)
    confusion = pairs.view(classes, classes).double()
    both = confusion.diagonal()
    either = confusion.sum(0) + confusion.sum(1) - both
    return float((both / either)[either > 0].mean())


RECIPE = Recipe(epochs=6, batch_size=32, learning_rate=5e-3, weight_decay=1e-2, warmup=0.1)
TASKS = (
    Task(
        network="small U-Net",
        mirrors="Mask R-CNN-RN50",
        make_model=UNet,
        load_data=canvases,
        loss=loss,
        scores=scores,
        make_optimizer=adamw,
        recipe=RECIPE,
        training_examples=4_000,
        test_examples=1_000,
    ),
)
