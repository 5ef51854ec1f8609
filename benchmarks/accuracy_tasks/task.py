"""What a row of the study is made of, and the procedure that every row goes through.

Nothing is chosen by looking at the test data: every training runs all its epochs, and its last
weights count.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from helpers import machine
from helpers.errors import HelpersError
from helpers.sparsity import eligible_weights, hold_masks, is_2to4, mask_2to4, prune_2to4_
from helpers.sparsity.prune import Masks, apply_masks_
from helpers.training.recipe import Recipe, schedule

Batch = tuple[Tensor, ...]
Scores = dict[str, float]  # by the name of the metric

ARMS = ("dense", "pruned", "retrained", "control", "half_inputs")


class StudyError(HelpersError, RuntimeError):
    """A training of the study diverged, or a model that should be 2:4 is not."""


@dataclass(frozen=True)
class Data:
    """Everything that is trained on and tested on: tensors whose first dimension is the example."""

    train: Batch
    test: Batch


def sgd(parameters: Iterable[nn.Parameter], recipe: Recipe) -> Optimizer:
    """Return SGD with momentum, as convolutional networks are trained with."""
    return SGD(
        parameters,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )


def adamw(parameters: Iterable[nn.Parameter], recipe: Recipe) -> Optimizer:
    """Return AdamW, as transformers are trained with; the recipe's momentum is its first beta."""
    return AdamW(
        parameters,
        lr=recipe.learning_rate,
        betas=(recipe.momentum, 0.98),
        weight_decay=recipe.weight_decay,
    )


@dataclass(frozen=True)
class Task:
    """One network on one kind of data.

    `network` names the row, `mirrors` the network of the published table that it stands for.
    `load_data` takes how many examples to train on and to test on. `loss` takes the model in
    training mode and a batch; `scores` the model in evaluation mode and all test data.
    """

    network: str
    mirrors: str
    make_model: Callable[[], nn.Module]
    load_data: Callable[[int, int], Data]
    loss: Callable[[Any, Batch], Tensor]
    scores: Callable[[Any, Batch], Scores]
    make_optimizer: Callable[[Iterable[nn.Parameter], Recipe], Optimizer]
    recipe: Recipe
    training_examples: int
    test_examples: int

    def data(self) -> Data:
        """Return what this network is trained and tested on."""
        return self.load_data(self.training_examples, self.test_examples)

    def settings(self) -> dict[str, Any]:
        """Return what the results depend on, apart from the code and the seed."""
        model = self.make_model()
        return {
            "mirrors": self.mirrors,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "in 2:4 weights": sum(weight.numel() for weight in eligible_weights(model).values()),
            "training examples": self.training_examples,
            "test examples": self.test_examples,
            "optimizer": self.make_optimizer.__name__,
            "recipe": vars(self.recipe),
        }


def run(task: Task, seed: int) -> list[dict[str, Any]]:
    """Take a network through the study with one seed, and return a row for each of its metrics.

    The dense model is trained. From it three trainings start, with the same recipe, the same
    order of the examples and the same random numbers: *retrained* with 2:4 masks held, *control*
    without masks, *half_inputs* with masks that remove the same two of every four inputs for all
    outputs.

    Returns:
        Rows with `network`, `metric`, `seed`, the score of each of `ARMS`, and the `seconds` of
        processor time that all of it took.
    """
    started = time.process_time()
    data = task.data()
    torch.manual_seed(seed)
    dense = train(task, task.make_model(), data, seed, phase=0)
    pruned = copy.deepcopy(dense)
    masks = prune_2to4_(pruned)
    half = copy.deepcopy(dense)
    half_masks = same_inputs_masks(half)
    apply_masks_(half, half_masks)

    scores = {"dense": score(task, dense, data), "pruned": score(task, pruned, data)}
    for arm, model, held in (
        ("retrained", pruned, masks), ("control", dense, None), ("half_inputs", half, half_masks)
    ):  # fmt: skip
        scores[arm] = score(task, train(task, model, data, seed, 1, held), data)
    _require_2to4(pruned, masks)
    seconds = time.process_time() - started
    return [
        {
            "network": task.network,
            "metric": metric,
            "seed": seed,
            **{arm: round(scores[arm][metric], 4) for arm in ARMS},
            "seconds": round(seconds),
        }
        for metric in scores["dense"]
    ]


def train(
    task: Task,
    model: nn.Module,
    data: Data,
    seed: int,
    phase: int,
    masks: Masks | None = None,
    share: float = 1.0,
) -> nn.Module:
    """Train a model in place, and return it.

    Args:
        task: gives the loss, the optimizer and the recipe.
        model: the weights to start from.
        data: what to train on.
        seed: sets the order of the examples, and every random number of the training.
        phase: 0 for the first training, 1 for the one after it, which gets other random numbers.
        masks: weights to hold at zero.
        share: of the recipe's steps; the schedule of the learning rate is shortened with them.

    Raises:
        StudyError: the loss is NaN or infinite.
    """
    # Convolutions take two thirds of the time in this layout on a CPU.
    model.to(machine.device()).to(memory_format=torch.channels_last).train()
    optimizer = task.make_optimizer(model.parameters(), task.recipe)
    count, size = len(data.train[0]), task.recipe.batch_size
    steps = round(share * task.recipe.epochs * (count // size))
    if steps == 0:
        return model
    scheduler = LambdaLR(optimizer, schedule(replace(task.recipe, epochs=1), steps))
    if masks is not None:
        hold_masks(optimizer, model, masks)
    for epoch in range(math.ceil(steps / (count // size))):
        torch.manual_seed(1_000_000 * phase + 1000 * seed + epoch)
        batches = torch.randperm(count).split(size)[: count // size]
        for indices in batches[: steps - epoch * len(batches)]:
            batch = tuple(part[indices].to(machine.device()) for part in data.train)
            loss = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        last = float(loss.detach())
        if not math.isfinite(last):
            raise StudyError(
                f"The loss of {task.network} became {last} in epoch {epoch + 1} with seed {seed}. "
                "Lower the learning rate of its recipe."
            )
    return model


@torch.no_grad()
def score(task: Task, model: nn.Module, data: Data) -> Scores:
    """Return the scores of a model on all test data."""
    model.to(machine.device()).eval()
    return task.scores(model, tuple(part.to(machine.device()) for part in data.test))


def same_inputs_masks(model: nn.Module) -> Masks:
    """Return masks that keep the same two of every four input channels for all outputs.

    Of each four inputs the two with the larger summed magnitude are kept. This removes as many
    weights as 2:4 does, and is 2:4 too, but removes whole inputs: it must hurt.
    """
    masks = {}
    for name, weight in eligible_weights(model).items():
        # Over outputs and positions of the kernel; eligible weights have their inputs in dim 1.
        others = tuple(dim for dim in range(weight.dim()) if dim != 1)
        magnitudes = weight.detach().abs().sum(others)
        kept = mask_2to4(magnitudes[None], name).view(1, -1, *[1] * (weight.dim() - 2))
        masks[name] = kept.expand(weight.shape).clone()
    return masks


def _require_2to4(model: nn.Module, masks: Masks) -> None:
    state = model.state_dict()
    for name in masks:
        if not is_2to4(state[name]):
            raise StudyError(f"{name} of the retrained model is not 2:4.")
