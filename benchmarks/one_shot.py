"""Compare ways to prune the quick preset's model, right after pruning and retrained.

By magnitude and with SparseGPT, each with and without permuted channels and with and
without new statistics for the batch norms; SparseGPT with fewer and more calibration
images and other values of dampening. The calibration images are training images; accuracy is on
the whole test set. Writes `benchmarks/results/one_shot_quick.json`.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from helpers import machine
from helpers.files import write_json
from helpers.sparsity import masks_of, permute_channels_, prune_2to4_, prune_sparsegpt_
from helpers.training.data import first_images
from helpers.training.loop import evaluate, train
from helpers.tutorial.inputs import load_pretrained, load_splits
from helpers.tutorial.settings import Settings

SEEDS = (0, 1, 2)  # of the draw of calibration images
IMAGES, DAMPENING = 1024, 0.01
RESULT = Path(__file__).parent / "results" / "one_shot_quick.json"

Method = Callable[[nn.Module, list[Tensor]], object]


def by_magnitude(model: nn.Module, calibration_data: list[Tensor]) -> None:
    """Prune by magnitude; it needs no images."""
    prune_2to4_(model)


def with_sparsegpt(dampening: float = DAMPENING) -> Method:
    """Return a function that prunes with SparseGPT at this dampening."""
    return lambda model, calibration_data: prune_sparsegpt_(
        model, calibration_data, dampening=dampening
    )


def permuted(prune: Method) -> Method:
    """Return a function that permutes the channels and then prunes."""

    def permute_and_prune(model: nn.Module, calibration_data: list[Tensor]) -> None:
        permute_channels_(model, calibration_data[0][:1])
        prune(model, calibration_data)

    return permute_and_prune


def and_batch_norm(prune: Method) -> Method:
    """Return a function that prunes and recomputes the batch norms' statistics."""

    def prune_and_update(model: nn.Module, calibration_data: list[Tensor]) -> None:
        prune(model, calibration_data)
        update_bn(calibration_data, model)

    return prune_and_update


def main() -> None:
    """Measure each way with several draws of the calibration images, and write the result."""
    settings = Settings.load("quick")
    splits = load_splits(settings)
    rows = []

    def measure(method: str, prune: Method, images: int = IMAGES, **facts: float) -> None:
        accuracies = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            calibration_data = first_images(splits.train, images)[0].to(machine.device()).split(128)
            model = load_pretrained(settings).to(machine.device())
            prune(model, list(calibration_data))
            accuracies.append(evaluate(model, splits.test).top1)
        row = {"method": method, "images": images, **facts, "top1": round(mean(accuracies), 2)}
        rows.append(row | {"top1_by_seed": accuracies})
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    dense = evaluate(load_pretrained(settings), splits.test).top1
    ways = {
        "magnitude": by_magnitude,
        "magnitude, permuted": permuted(by_magnitude),
        "SparseGPT": with_sparsegpt(),
        "SparseGPT, permuted": permuted(with_sparsegpt()),
    }
    for method, prune in ways.items():
        measure(method, prune)
        measure(f"{method}, batch norm re-estimated", and_batch_norm(prune))
    for images in (32, 128, 4096):
        measure("SparseGPT", with_sparsegpt(), images)
    for dampening in (0.0001, 0.001, 0.1, 1.0):
        measure("SparseGPT", with_sparsegpt(dampening), dampening=dampening)

    retrained = {}
    for method, prune in ways.items():
        model = load_pretrained(settings)
        prune(model, list(first_images(splits.train, IMAGES)[0].split(128)))
        train(model, splits, settings.recipe, settings.seed, masks=masks_of(model))
        retrained[method] = evaluate(model, splits.test).top1
        print(f"{method}, retrained: {retrained[method]} %", flush=True)

    result = {
        "what": "top-1 accuracy in per cent on the test set. rows: right after pruning, mean "
        "over draws of the calibration images. retrained: after the "
        "recipe of notebook 03, one seed",
        "command": "python benchmarks/one_shot.py",
        "seeds": SEEDS,
        "dense": dense,
        "images": IMAGES,
        "dampening": DAMPENING,
        "rows": rows,
        "retrained": retrained,
        **machine.provenance(),
    }
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
