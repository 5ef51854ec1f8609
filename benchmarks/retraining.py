"""Measure what matters when a 2:4 model is retrained, on three networks and several seeds.

Every variant starts from the same dense model and changes one thing of the plain procedure, which
is that of `accuracy.py`: prune by magnitude by TensorRT's rules, then repeat the whole training
with the masks held, in FP32. Differences to the plain procedure are paired by seed, with 95 %
intervals over the seeds.

A row is written when its network and seed are done, and a run continues where an earlier one
stopped:

    python benchmarks/retraining.py --processes 2
    python benchmarks/retraining.py --table
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from accuracy import shown
from accuracy_tasks import TASKS
from accuracy_tasks.record import Record, Row, run_missing
from accuracy_tasks.task import Batch, Data, Task, score, train
from helpers import machine
from helpers.errors import InputError
from helpers.metrics import paired_difference
from helpers.sparsity import (
    eligible_weights,
    kept_magnitude,
    mask_2to4,
    mask_nm,
    masks_2to4,
    permute_channels_,
    prune_2to4_,
    prune_sparsegpt_,
)
from helpers.sparsity.prune import Masks, apply_masks_

NETWORKS = ("small ResNet", "small ResNeXt", "small ViT")  # all of them take images
RESULT = Path(__file__).parent / "results" / "retraining.json"
ABOUT = {
    "what": "accuracy of small networks after variants of retraining; a row for each network, "
    "seed and variant; kept is the share of the magnitude of the pruned weights that the masks "
    "keep, in per cent",
    "command": "python benchmarks/retraining.py",
}
PLAIN = "plain"
CALIBRATION_IMAGES = 1024
DECAY = 2e-4  # of the weights that SR-STE does not use at the moment

# Trains a copy of the dense model, and returns it with the share of its magnitude that was kept.
Variant = Callable[[Task, nn.Module, Data, int], tuple[nn.Module, float]]
Masker = Callable[[nn.Module, Data], Masks]


def magnitude(model: nn.Module, data: Data) -> Masks:
    """Return the masks of the plain procedure."""
    return masks_2to4(model)


def retrained(mask: Masker = magnitude, share: float = 1.0, learning_rate: float = 1.0) -> Variant:
    """Return the procedure with other masks, fewer steps or a lower learning rate.

    Args:
        mask: returns the masks, and may change the model before.
        share: of the steps.
        learning_rate: times that of the recipe.
    """

    def retrain(task: Task, model: nn.Module, data: Data, seed: int) -> tuple[nn.Module, float]:
        recipe = replace(task.recipe, learning_rate=learning_rate * task.recipe.learning_rate)
        masks = mask(model, data)
        kept = total_kept(model, masks)
        apply_masks_(model, masks)
        train(replace(task, recipe=recipe), model, data, seed, 1, masks, share)
        return model, kept

    return retrain


def total_kept(model: nn.Module, masks: Masks) -> float:
    """Return the share of the summed magnitude of all masked weights that is kept, in per cent."""
    weights = torch.cat([model.get_parameter(name).detach().flatten() for name in masks])
    return kept_magnitude(weights, torch.cat([mask.flatten() for mask in masks.values()]))


# --- what to prune ---


def by_asp(model: nn.Module, data: Data) -> Masks:
    """Return masks of the weights that NVIDIA's ASP prunes."""
    return masks_2to4(model, rules="asp")


def permuted(mask: Masker) -> Masker:
    """Return a function that permutes the channels of the model before it is masked."""

    def permute_and_mask(model: nn.Module, data: Data) -> Masks:
        permute_channels_(model.eval(), data.train[0][:1].to(machine.device()))
        return mask(model, data)

    return permute_and_mask


def in_blocks(outputs: int) -> Masker:
    """Return a function whose masks are the same for every so many consecutive outputs.

    Each mask is 2:4, by the summed magnitude of the block.
    """

    def mask_blocks(model: nn.Module, data: Data) -> Masks:
        masks = {}
        for name, weight in eligible_weights(model).items():
            blocks = weight.detach().abs().split(outputs)
            sums = torch.cat([block.sum(0, keepdim=True) for block in blocks])
            shared = mask_2to4(sums, name).repeat_interleave(outputs, 0)
            masks[name] = shared[: len(weight)].clone()
        return masks

    return mask_blocks


# --- how to train ---


def from_sparsegpt(task: Task, model: nn.Module, data: Data, seed: int) -> tuple[nn.Module, float]:
    """Start from the weights of SparseGPT, which changes those that it keeps."""
    dense = copy.deepcopy(model)
    images = data.train[0][:CALIBRATION_IMAGES].to(machine.device())
    masks = prune_sparsegpt_(model, list(images.split(128)))
    return train(task, model, data, seed, 1, masks), total_kept(dense, masks)


def gradual(task: Task, model: nn.Module, data: Data, seed: int) -> tuple[nn.Module, float]:
    """Remove one of every four weights, train for half of the steps, remove one more, train on."""
    weights = eligible_weights(model)
    first = {name: mask_nm(weight.detach(), 3, 4, name) for name, weight in weights.items()}
    apply_masks_(model, first)
    train(task, model, data, seed, 1, first, share=0.5)
    kept = total_kept(model, masks_2to4(model))
    masks = prune_2to4_(model)
    return train(task, model, data, seed, 2, masks, share=0.5), kept


class _KeepTwoOfFour(torch.autograd.Function):
    """2:4 in the forward pass; the gradient goes to every weight, and the unused ones decay."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        mask = mask_2to4(weight)
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        weight, mask = ctx.saved_tensors
        return gradients[0] + DECAY * ~mask * weight


class _SrSte(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return _KeepTwoOfFour.apply(weight)


def sr_ste(task: Task, model: nn.Module, data: Data, seed: int) -> tuple[nn.Module, float]:
    """Choose the mask anew in every step.

    Source: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks",
    arXiv 2102.04010.
    """
    kept = total_kept(model, masks_2to4(model))
    owners = [name.rpartition(".") for name in eligible_weights(model)]
    for owner, _, attribute in owners:
        register_parametrization(model.get_submodule(owner), attribute, _SrSte())
    train(task, model, data, seed, 1)
    for owner, _, attribute in owners:
        remove_parametrizations(model.get_submodule(owner), attribute)
    return model, kept


def distilled(
    task: Task, model: nn.Module, data: Data, seed: int, classes: int = 1
) -> tuple[nn.Module, float]:
    """Learn half from the labels and half from the outputs of the dense model.

    `classes` is the dimension of the logits that holds the classes.
    """
    teacher = copy.deepcopy(model).eval()

    def loss(student: nn.Module, batch: Batch) -> Tensor:
        calls: list[tuple[Any, ...]] = []
        hook = student.register_forward_hook(
            lambda _, inputs, logits: calls.append((inputs, logits))
        )
        with hook:
            of_labels = task.loss(student, batch)
        ((inputs, logits),) = calls
        with torch.no_grad():
            wanted = teacher(*inputs).log_softmax(classes)
        found = logits.log_softmax(classes)
        of_teacher = F.kl_div(found, wanted, reduction="none", log_target=True).sum(classes).mean()
        return (of_labels + of_teacher) / 2

    return retrained()(replace(task, loss=loss), model, data, seed)


def in_bfloat16(task: Task, model: nn.Module, data: Data, seed: int) -> tuple[nn.Module, float]:
    """Train with autocast to BF16."""

    def loss(student: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(machine.device().type, torch.bfloat16):
            return task.loss(student, batch)

    return retrained()(replace(task, loss=loss), model, data, seed)


# By the question that they answer.
VARIANTS: dict[str, dict[str, Variant]] = {
    PLAIN: {PLAIN: retrained()},
    "how long": {
        f"{percent} % of the steps": retrained(share=percent / 100)
        for percent in (0, 5, 10, 25, 50)
    },
    "learning rate": {
        "a tenth": retrained(learning_rate=0.1),
        "a hundredth": retrained(learning_rate=0.01),
    },
    "what to prune": {"rules of ASP": retrained(by_asp)},
    "where to start": {"permuted": retrained(permuted(magnitude)), "SparseGPT": from_sparsegpt},
    "when to prune": {"SR-STE": sr_ste, "1 of 4, then 2 of 4": gradual},
    "how to train": {"distilled": distilled, "BF16 autocast": in_bfloat16},
    "one pattern": {
        f"for {outputs} outputs": retrained(in_blocks(outputs)) for outputs in (4, 8, 16)
    },
    "one pattern, permuted": {
        f"for {outputs} outputs": retrained(permuted(in_blocks(outputs))) for outputs in (4, 8, 16)
    },
}


def variants() -> Iterator[tuple[str, str, Variant]]:
    """Yield each question, each variant's name and the variant."""
    for question, answers in VARIANTS.items():
        for name, variant in answers.items():
            yield question, name, variant


def run(task: Task, seed: int) -> list[Row]:
    """Train a dense model and retrain it in each variant.

    Returns:
        Rows with `network`, `metric`, `seed`, `question`, `variant`, `score`, `kept` and the
        `seconds` of processor time.
    """
    data = task.data()
    torch.manual_seed(seed)
    dense = train(task, task.make_model(), data, seed, phase=0)
    rows = []
    for question, name, variant in variants():
        started = time.process_time()
        model, kept = variant(task, copy.deepcopy(dense), data, seed)
        rows += [
            {
                "network": task.network, "metric": metric, "seed": seed,
                "question": question, "variant": name, "score": round(value, 4),
                "kept": round(kept, 2), "seconds": round(time.process_time() - started),
            }
            for metric, value in score(task, model, data).items()
        ]  # fmt: skip
    return rows


def summary(rows: list[Row]) -> pd.DataFrame:
    """Return a line for each network and variant: means, and the difference to the plain one."""
    lines = []
    for network, of_network in pd.DataFrame(rows).groupby("network", sort=False):
        of_plain = of_network[of_network["variant"] == PLAIN].sort_values("seed")
        plain = of_plain["score"].tolist()
        for (question, name), group in of_network.groupby(["question", "variant"], sort=False):
            scores = group.sort_values("seed")["score"].tolist()
            lines.append(
                {
                    "network": network, "question": question, "variant": name,
                    "seeds": len(scores), "score": group["score"].mean(),
                    "kept": group["kept"].mean(),
                    "variant - plain": paired_difference(plain, scores),
                }
            )  # fmt: skip
    return pd.DataFrame(lines)


def main(
    only: Annotated[list[str], typer.Option(help="pattern of a network's name")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(dir_okay=False, help="JSON file for the results")] = RESULT,
    seeds: Annotated[int, typer.Option(min=1, help="how many")] = 3,
    processes: Annotated[int, typer.Option(min=1, help="at a time, one thread each")] = 1,
    table: Annotated[bool, typer.Option("--table", help="only print what the file has")] = False,
) -> None:
    """Retrain the networks of the study in each variant, and print the table."""
    patterns = only or ["*"]
    tasks = [
        task
        for task in TASKS
        if task.network in NETWORKS
        and any(fnmatchcase(task.network, pattern) for pattern in patterns)
    ]
    if not tasks:
        raise typer.BadParameter(
            f"No network fits {', '.join(only)}. There are {', '.join(NETWORKS)}."
        )
    try:
        record = Record.open(out, ABOUT)
        if not table:
            record.require_same_versions()
            run_missing(record, run, record.missing(tasks, seeds), processes)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    print(shown(summary(record.rows)) if record.rows else "Nothing is measured yet.")


if __name__ == "__main__":
    typer.run(main)
