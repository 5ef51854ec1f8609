"""Time channel permutation: one search against ASP's, ResNeXt-101, and which layers are free.

The weights are random and normal. Trained weights have more structure, so a trained
network gains more magnitude. Writes
`benchmarks/results/permutation_cpu.json` and a picture beside it.
"""

import os
import resource
import sys
import time
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numba
import numpy as np
import torch
import torchvision
from tqdm import tqdm

from helpers import machine
from helpers.files import write_json
from helpers.layers import layer_weights
from helpers.sparsity import permute_channels_
from helpers.sparsity.graph import find_channel_groups
from helpers.sparsity.search import kept_2to4, search_permutation
from helpers.training.networks import create_model
from helpers.tutorial import plots
from turns import medians

RESULT = Path(__file__).parent / "results" / "permutation_cpu.json"
ROUNDS = 7

# One run of ASP itself (apex 6424da3b, CUDA calls removed) on a CPU of two cores with other
# work on it: 256x256 normal weights, escapes off. Recorded elsewhere, not measured here.
ASP_SECONDS_RECORDED = 1401.0

NETWORKS = (
    "alexnet vgg11_bn squeezenet1_1 resnet18 resnet50 resnext50_32x4d resnext101_32x8d "
    "wide_resnet50_2 densenet121 googlenet inception_v3 mobilenet_v2 mobilenet_v3_small "
    "mobilenet_v3_large mnasnet1_0 shufflenet_v2_x1_0 efficientnet_b0 efficientnet_v2_s "
    "regnet_x_400mf regnet_y_400mf convnext_tiny swin_t swin_v2_t vit_b_16 maxvit_t"
).split()

SPLITS = [
    [*left, *(lane for lane in range(8) if lane not in left)]
    for left in combinations(range(8), 4)
    if 0 in left
]


def plain_search(matrix: np.ndarray) -> np.ndarray:
    """Return the order that the greedy search finds, written in plain NumPy.

    All 35 splits of each pair of stripes are rated. The best splits are applied first, each
    to stripes not yet changed in this round; pairs with a changed stripe are rated again.
    """
    magnitudes = np.abs(matrix).astype(np.float64)
    stripes = np.arange(matrix.shape[1]).reshape(-1, 4)
    best: dict[tuple[int, int], tuple[float, np.ndarray]] = {}
    changed = set(range(len(stripes)))
    while changed:
        for pair in combinations(range(len(stripes)), 2):
            if changed & set(pair):
                candidates = stripes[list(pair)].ravel()[SPLITS]
                fours = magnitudes[:, candidates].reshape(len(matrix), 35, 2, 4)
                kept = np.sort(fours)[..., 2:].sum(axis=(0, 2, 3))
                best[pair] = kept.max() - kept[0], candidates[kept.argmax()]
        changed = set()
        for pair, (gain, eight) in sorted(best.items(), key=lambda item: -item[1][0]):
            if gain > 1e-6 * magnitudes.max() and not changed & set(pair):
                stripes[list(pair)] = eight.reshape(2, 4)
                changed |= set(pair)
    return stripes.ravel()


def kept_facts(matrix: np.ndarray, order: np.ndarray) -> dict[str, float]:
    """Return the magnitude kept before and after, in per cent of all, and the efficacy.

    Efficacy is the share recovered of what 2:4 loses compared with keeping the larger half
    of every row regardless of position.
    """
    magnitudes = np.abs(matrix)
    middle = matrix.shape[1] // 2
    halves = np.partition(magnitudes, middle, axis=1)[:, middle:].sum(dtype=np.float64)
    before, after = kept_2to4(matrix), kept_2to4(matrix[:, order])
    total = float(magnitudes.sum(dtype=np.float64))
    return {
        "kept_before_percent": 100 * before / total,
        "kept_after_percent": 100 * after / total,
        "gain_percent": 100 * (after / before - 1),
        "efficacy_percent": 100 * (after - before) / float(halves - before),
    }


def normal(rows: int, width: int, seed: int) -> np.ndarray:
    """Return a matrix of random weights."""
    return np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)


def against_plain(size: int) -> dict[str, float]:
    """Compare with the plain search on a small square matrix."""
    matrix = normal(size, size, seed=0)
    seconds = medians(
        {
            "plain": lambda: plain_search(matrix),
            "greedy": lambda: search_permutation(matrix, escapes=0),
            "escapes": lambda: search_permutation(matrix),
        },
        ROUNDS,
    )
    return {
        "plain_seconds": seconds["plain"],
        "greedy_seconds": seconds["greedy"],
        "escapes_seconds": seconds["escapes"],
        "greedy_times_faster": seconds["plain"] / seconds["greedy"],
        "plain_kept": kept_2to4(matrix[:, plain_search(matrix)]),
        "greedy_kept": kept_2to4(matrix[:, search_permutation(matrix, escapes=0)]),
        "escapes_kept": kept_2to4(matrix[:, search_permutation(matrix)]),
    }


def square(size: int) -> dict[str, dict[str, float]]:
    """Time the search with and without escapes on a square matrix."""
    matrix = normal(size, size, seed=0)
    searches = {
        "greedy": lambda: search_permutation(matrix, escapes=0),
        "100 escapes": lambda: search_permutation(matrix),
    }
    seconds = medians(searches, ROUNDS)
    return {
        name: {"seconds": seconds[name], **kept_facts(matrix, search())}
        for name, search in searches.items()
    }


def whole_network() -> dict:
    """Permute ResNeXt-101 32x8d for all 101 layers that ASP prunes."""
    torch.manual_seed(0)
    model = create_model("resnext101_32x8d", num_classes=1000)
    start = time.perf_counter()
    report = permute_channels_(model, torch.zeros(1, 3, 224, 224), rules="asp")
    seconds = time.perf_counter() - start
    gain = report.permuted.after - report.permuted.before
    kinds = report.permuted.weight.str.extract(r"\.?(conv\d|downsample|fc)", expand=False)
    return {
        "layers": len(report.weights),
        "permuted": len(report.permuted),
        "seconds": seconds,
        "points_gained": gain.groupby(kinds).mean().to_dict(),
        "output_error": report.max_relative_error,
    }


def free_layers(name: str) -> dict:
    """Return how many layers of a network have input channels that may change places."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    start = time.perf_counter()
    size = 299 if name == "inception_v3" else 224
    groups = find_channel_groups(model, (torch.zeros(1, 3, size, size),))
    seconds = time.perf_counter() - start
    layers = {name: w for name, w in layer_weights(model).items() if w.tensor.shape[1] >= 4}
    free = 0
    for weight in layers.values():
        inputs = groups.inputs_of(weight.tensor)
        free += inputs is not None and bool((groups.interchangeable_set[inputs] >= 0).all())
    return {"layers": len(layers), "free": free, "seconds": seconds}


def draw(result: dict) -> plt.Figure:
    """Draw the seconds of one search beside ASP's, and the magnitude gained over the network."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    plt.close(figure)
    at_256 = result["256x256"]
    names = ["ASP (recorded)", *at_256]
    seconds = [ASP_SECONDS_RECORDED, *(facts["seconds"] for facts in at_256.values())]
    bars = left.bar(names, seconds, color=[plots.DENSE, plots.SPARSE, plots.SPARSE])
    left.bar_label(
        bars, [f"{value:,.0f} s" if value > 10 else f"{value:.2f} s" for value in seconds]
    )
    left.set(yscale="log", title="256 x 256, one search", ylabel="seconds")
    network = result["resnext101_32x8d"]
    gains = network["points_gained"]
    bars = right.bar(list(gains), list(gains.values()), color=plots.SPARSE)
    right.bar_label(bars, fmt="%.2f")
    right.set(
        title=f"ResNeXt-101 32x8d, {network['permuted']} layers in {network['seconds']:.0f} s",
        ylabel="points of magnitude kept more",
    )
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def main() -> None:
    """Measure, write the result and draw it."""
    for rows, width in ((64, 16), (65536, 32)):  # compile for one thread and for several
        search_permutation(normal(rows, width, seed=0), escapes=1)
    load = os.getloadavg()[0]  # other work on the machine makes every time longer
    small, large = against_plain(32), square(256)
    network = whole_network()
    to_mib = 2**20 if sys.platform == "darwin" else 2**10
    result = {
        "what": "channel permutation for 2:4, normal random weights, float32",
        "command": "python benchmarks/permutation.py",
        "load_average_before": load,
        "against_plain_numpy_32x32": small,
        "256x256": large,
        "asp_256x256_seconds_recorded_elsewhere": ASP_SECONDS_RECORDED,
        "resnext101_32x8d": network,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / to_mib,
        "networks": {name: free_layers(name) for name in tqdm(NETWORKS, leave=False)},
        **machine.provenance(),
    }
    result["versions"] = {
        **result["versions"], "numba": numba.__version__, "numpy": np.__version__,
    }  # fmt: skip
    write_json(RESULT, result)
    plots.save(draw(result), RESULT.with_suffix(".png"))
    print(f"256x256 {large}\n32x32 {small}\nResNeXt-101 {network}")
    for name, row in result["networks"].items():
        print(f"{name:20} {row['free']} of {row['layers']} layers may be permuted")


if __name__ == "__main__":
    main()
