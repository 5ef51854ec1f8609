"""The answers to the exercises of notebook 02b."""

from collections.abc import Callable

import torch
from torch import Tensor

from helpers.tutorial.exercises import NO_HINT, UNTOUCHED, Judge, Value

_NO_ORDER = "Return each of the numbers 0 to 7 once: the channels in their new order."
_SORTED = "It puts the four largest weights into one group, where two of them must go."


def _weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(8, generator=generator) for _ in range(5)]
    return [torch.tensor([9.0, -8.0, 7.0, 6.0, 0.4, -0.3, 0.2, 0.1]), *made]


def _kept(weight: Tensor, order: list[int]) -> float:
    """Return the magnitude that 2:4 keeps with the channels in this order."""
    return float(weight[order].abs().reshape(2, 4).topk(2, dim=1).values.sum())


def _judge_order(answer: Callable[[Tensor], list[int]]) -> str:
    weights = _weights()
    orders = [answer(weight.clone()) for weight in weights]
    if all(order is None for order in orders):
        return UNTOUCHED
    lists = [[int(channel) for channel in order] for order in orders]
    if any(sorted(order) != list(range(8)) for order in lists):
        return _NO_ORDER
    for weight, order in zip(weights, lists, strict=True):
        if abs(_kept(weight, order) - float(weight.abs().topk(4).values.sum())) > 1e-5:
            by_size = weight.abs().argsort()
            is_sorted = set(order[:4]) in (set(by_size[:4].tolist()), set(by_size[4:].tolist()))
            return _SORTED if is_sorted else NO_HINT
    return ""


EXERCISES: dict[str, Judge] = {
    "02b-compensate": Value(
        0.8,
        tolerance=1e-6,
        mistakes={
            0.5: "Then the output loses 0.3 times the second input.",
            0.4: "The mean of the two weights gives half of the output.",
        },
    ),
    "02b-order": _judge_order,
}
