"""Canvases with several items of Fashion-MNIST, for detection and segmentation.

A canvas is drawn with a seed: one to four items, each scaled and placed at random, none over
another, and noise over everything. Items of the training images are on the training canvases
only.
"""

from functools import cache

import torch
from torch.nn import functional as F

from accuracy_tasks.images import all_images
from accuracy_tasks.task import Batch, Data
from helpers.training.data import FASHION_MEAN, FASHION_STD

SIZE = 48  # pixels, in height and width
MOST_ITEMS = 4
SMALLEST, LARGEST = 14, 26  # pixels, of the square that holds an item
NOISE = 0.15  # standard deviation, of pixels from 0 to 1
VISIBLE = 0.1  # above it a pixel belongs to an item
NOTHING = -1  # the label in place of an item that is not there


@cache
def canvases(train: int, test: int) -> Data:
    """Return canvases for training and for testing.

    Returns:
        In each part: normalised images (N, 1, 48, 48); boxes (N, 4, 4) as x1, y1, x2, y2 in
        pixels; labels (N, 4), `NOTHING` where there are fewer items; and the class of every pixel
        (N, 48, 48), 0 for the background and 1 more than the label for an item.
    """
    images = all_images()
    return Data(_draw(images.train, train, seed=1), _draw(images.test, test, seed=2))


def _draw(items: Batch, count: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pictures, labels = items[0] * FASHION_STD + FASHION_MEAN, items[1]

    def integer(low: int, high: int) -> int:
        """Return a number from `low` to `high`, both included."""
        return int(torch.randint(low, high + 1, (), generator=generator))

    images = torch.zeros(count, 1, SIZE, SIZE)
    boxes = torch.zeros(count, MOST_ITEMS, 4)
    found = torch.full((count, MOST_ITEMS), NOTHING)
    classes = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    for canvas in range(count):
        placed = 0
        for _ in range(integer(1, MOST_ITEMS)):
            which, size = integer(0, len(labels) - 1), integer(SMALLEST, LARGEST)
            x, y = integer(0, SIZE - size), integer(0, SIZE - size)
            here = (canvas, slice(y, y + size), slice(x, x + size))
            if classes[here].any():
                continue  # there is an item already
            item = F.interpolate(pictures[which][None], (size, size), mode="area")[0, 0]
            visible = item > VISIBLE
            rows, columns = visible.any(1).nonzero(), visible.any(0).nonzero()
            images[canvas, 0, here[1], here[2]] += item
            classes[here][visible] = labels[which] + 1
            boxes[canvas, placed] = torch.tensor(
                [
                    x + int(columns[0]),
                    y + int(rows[0]),
                    x + int(columns[-1]) + 1,
                    y + int(rows[-1]) + 1,
                ]
            )
            found[canvas, placed] = labels[which]
            placed += 1
    images += NOISE * torch.randn(images.shape, generator=generator)
    return (images - FASHION_MEAN) / FASHION_STD, boxes, found, classes
