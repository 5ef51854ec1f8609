"""The answers to the exercises of notebook 03."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.sparsity import mask_2to4
from helpers.tutorial.exercises import Function, Judge, Value


def zeros_over_steps(
    layer: nn.Linear, images: Tensor, labels: Tensor, steps: int, mask: Tensor | None = None
) -> list[int]:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    zeros = []
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(layer(images), labels).backward()
        optimizer.step()
        if mask is not None:
            layer.weight.data.mul_(mask)
        zeros.append(int((layer.weight == 0).sum()))
    return zeros


def _mask_ignored(
    layer: nn.Linear, images: Tensor, labels: Tensor, steps: int, mask: Tensor | None = None
) -> list[int]:
    return zeros_over_steps(layer, images, labels, steps)


def _counted_before(
    layer: nn.Linear, images: Tensor, labels: Tensor, steps: int, mask: Tensor | None = None
) -> list[int]:
    before = int((layer.weight == 0).sum())
    return [before, *zeros_over_steps(layer, images, labels, steps, mask)[:-1]]


def _start_too(
    layer: nn.Linear, images: Tensor, labels: Tensor, steps: int, mask: Tensor | None = None
) -> list[int]:
    before = int((layer.weight == 0).sum())
    return [before, *zeros_over_steps(layer, images, labels, steps, mask)]


def _held_at_the_end(
    layer: nn.Linear, images: Tensor, labels: Tensor, steps: int, mask: Tensor | None = None
) -> list[int]:
    zeros = zeros_over_steps(layer, images, labels, steps)
    if mask is not None:
        layer.weight.data.mul_(mask)
        zeros[-1] = int((layer.weight == 0).sum())
    return zeros


def _last_alone(
    layer: nn.Linear, images: Tensor, labels: Tensor, steps: int, mask: Tensor | None = None
) -> int:
    return zeros_over_steps(layer, images, labels, steps, mask)[-1]


def _trial() -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """Return a pruned layer, images, labels and its mask.

    The last input is always zero, as the output of a ReLU may be: its weights get no gradient.
    """
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, 8, generator=generator))
        layer.bias.zero_()
        mask = mask_2to4(layer.weight)
        layer.weight.mul_(mask)
    images = torch.randn(16, 8, generator=generator)
    images[:, -1] = 0
    return layer, images, torch.randint(4, (16,), generator=generator), mask


def _calls() -> list[tuple]:
    layer, images, labels, mask = _trial()
    return [(layer, images, labels, 10), (layer, images, labels, 10, mask)]


EXERCISES: dict[str, Judge] = {
    "03-test-images": Value(
        40_000,
        mistakes={
            20_000: "The error falls with the square root of the number of images.",
            5_000: "Fewer images make the error larger.",
        },
    ),
    "03-zeros": Function(
        zeros_over_steps,
        _calls(),
        mistakes={
            _mask_ignored: "It does not use the mask.",
            _counted_before: "Count after each step, not before it.",
            _start_too: "Leave out the count before the first step.",
            _held_at_the_end: "It multiplies by the mask once. Do so after every step.",
            _last_alone: "Return the counts after all steps, in a list.",
        },
    ),
}
