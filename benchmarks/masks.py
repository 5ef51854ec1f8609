"""Time the masks of ResNeXt-101 32x8d, and holding them, against other implementations.

The implementations take turns in one process after a warm-up, so that the ratios hold on
a busy machine too; on a very busy one set OMP_NUM_THREADS=1, or the wait for threads is all
that is measured. The weights are random; the work does not depend on their values. The
peers are nvidia-modelopt's `create_asp_mask`, which is the algorithm of NVIDIA's ASP, and
torch.ao's WeightNormSparsifier, which takes matrices only and so is given the convolutions
as matrices. Needs `pip install nvidia-modelopt`. Writes `benchmarks/results/masks_cpu.json`
and a picture of it next to it.
"""

import statistics
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from modelopt.torch.sparsity.weight_sparsity.magnitude import create_asp_mask
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier
from torchvision.models import resnext101_32x8d

from helpers import machine
from helpers.files import write_json
from helpers.sparsity import eligible_weights, hold_masks, masks_2to4
from helpers.tutorial.plots import DENSE, SPARSE, save
from turns import in_turns

RESULT = Path(__file__).parent / "results" / "masks_cpu.json"
ROUNDS = 5
OURS = "helpers.sparsity"


def summary(times: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Return medians in ms, and how many times faster than the reference: the median of rounds."""
    return {
        name: {
            "ms": round(1e3 * statistics.median(each), 1),
            "ms_min": round(1e3 * min(each), 1),
            "times_faster": round(
                statistics.median(r / t for r, t in zip(times[reference], each, strict=True)), 2
            ),
        }
        for name, each in times.items()
    }


def torch_ao(weights: Sequence[Tensor]) -> Callable[[], None]:
    """Return torch.ao's computation of the 2:4 masks of these weights as matrices."""
    layers = nn.Sequential()
    for weight in weights:
        matrix = weight.detach().movedim(1, -1).flatten(0, -2).contiguous()
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = nn.Parameter(matrix)
        layers.append(layer)
    sparsifier = WeightNormSparsifier(1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(layers, config=None)
    return sparsifier.step


def compare_masks(model: nn.Module) -> dict:
    """Return the times of making all masks, and in how many places the masks differ."""
    weights = list(eligible_weights(model, "asp").values())
    times = in_turns(
        {
            OURS: lambda: masks_2to4(model, "asp"),
            "nvidia-modelopt": lambda: [create_asp_mask(w, "2:4 sparsity") for w in weights],
            "torch.ao": torch_ao(weights),
            "reading only": lambda: [weight.detach().sum() for weight in weights],
        },
        ROUNDS,
    )
    ours = masks_2to4(model, "asp").values()
    pairs = zip(weights, ours, strict=True)
    differing = sum(int((create_asp_mask(w, "2:4 sparsity") != mask).sum()) for w, mask in pairs)
    return {
        "weights": len(weights),
        "parameters": sum(weight.numel() for weight in weights),
        "differing_from_modelopt": differing,
        "ways": summary(times, "nvidia-modelopt"),
    }


def compare_holding(model: nn.Module) -> dict:
    """Return the times of restoring the zeros once, after a step that itself changes nothing."""
    masks = masks_2to4(model, "asp")
    weights = [model.get_parameter(name) for name in masks]
    gradients = [torch.zeros_like(weight) for weight in weights]
    idle = torch.optim.SGD(model.parameters())  # without gradients a step changes nothing
    hold_masks(idle, model, masks)

    def as_asp_does() -> None:
        with torch.no_grad():
            for weight, gradient, mask in zip(weights, gradients, masks.values(), strict=True):
                gradient.mul_(mask)
                weight.mul_(mask)

    times = in_turns({OURS: idle.step, "ASP's way": as_asp_does}, ROUNDS)
    return {"ways": summary(times, "ASP's way")}


def draw(masks: dict, holding: dict) -> plt.Figure:
    """Draw the medians as bars, ours in green."""
    figure, axes = plt.subplots(2, 1, figsize=(8, 3.6), height_ratios=[2, 1])
    titles = ("masks of all 101 weights", "putting the zeros back after a step")
    for axis, title, found in zip(axes, titles, (masks["ways"], holding["ways"]), strict=True):
        names = list(found)[::-1]
        colours = [SPARSE if name == OURS else DENSE for name in names]
        bars = axis.barh(names, [found[name]["ms"] for name in names], color=colours)
        labels = [f" {found[name]['ms']:,.0f} ms" for name in names]
        axis.bar_label(bars, labels, fontsize=9)
        axis.set_title(title, loc="left", fontsize=10)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(f"ResNeXt-101 32x8d, milliseconds, median of {ROUNDS} rounds")
    figure.tight_layout()
    return figure


def main() -> None:
    """Measure, print, and write the result."""
    torch.manual_seed(0)
    model = resnext101_32x8d()
    masks, holding = compare_masks(model), compare_holding(model)
    result = {
        "what": "101 weights of ResNeXt-101 32x8d, FP32; median of the rounds",
        "command": "python benchmarks/masks.py",
        "rounds": ROUNDS,
        "threads": torch.get_num_threads(),
        "masks": masks,
        "holding": holding,
        "peers": {name: metadata.version(name) for name in ("nvidia-modelopt", "numba")},
        **machine.provenance(),
    }
    write_json(RESULT, result)
    save(draw(masks, holding), RESULT.with_suffix(".png"))
    for found in (masks, holding):
        for name, row in found["ways"].items():
            print(f"{name:16} {row['ms']:8.1f} ms  {row['times_faster']:6.2f}x")


if __name__ == "__main__":
    main()
