"""Search permutations: 256 channels against ASP's greedy, and all of ResNeXt-101 32x8d.

The weights are random and normal, without the structure of trained ones, so that the
magnitude gained is less than a trained network's. Writes
`benchmarks/results/permutation_search_cpu.json` and a picture beside it.
"""

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numba
import numpy as np
from tqdm import tqdm

from helpers import machine, plots
from helpers.artifacts import write_json
from helpers.sparsity.search import kept_2to4, search_permutation

RESULT = Path(__file__).parent / "results" / "permutation_search_cpu.json"
ROUNDS = 7

# One run of ASP itself (apex 6424da3b, CUDA calls removed) on a CPU of two cores with other
# work on it: 256x256 normal weights, escapes off. Recorded elsewhere, not measured here.
ASP_SECONDS_RECORDED = 1401.0

# What is searched in a ResNeXt-101 32x8d at 224x224: name, searches, rows, columns.
# Channels shared by several layers are searched once, over the rows of all of them.
# Inside a grouped convolution each of the 32 groups has channels of its own.
SHARED = [
    ("conv1 and downsample of layer1", 1, 512, 64),
    ("layer1 to layer2", 1, 1536, 256),
    ("layer2 to layer3", 1, 3584, 512),
    ("layer3 to layer4", 1, 26624, 1024),
    ("layer4 to fc", 1, 5096, 2048),
]
REPLICATED = [
    ("conv2 of layer2, all groups alike", 4, 4608, 16),
    ("conv2 of layer3, all groups alike", 23, 9216, 32),
    ("conv2 of layer4, all groups alike", 3, 18432, 64),
]
PER_GROUP = [
    (f"{conv} of layer{layer}, by group", 32 * blocks, rows, width)
    for layer, blocks, width in ((1, 3, 8), (2, 4, 16), (3, 23, 32), (4, 3, 64))
    for conv, rows in (("conv2", 9 * width), ("conv3", 32 * width))
]

SPLITS = [
    [*left, *(lane for lane in range(8) if lane not in left)]
    for left in combinations(range(8), 4)
    if 0 in left
]


def plain_search(matrix: np.ndarray) -> np.ndarray:
    """Return the order that the greedy search finds, step by step in plain NumPy.

    Pairs of stripes are rated in all 35 splits; the best splits go first, each to stripes
    untouched in this round; pairs with a changed stripe are rated again.
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

    Efficacy is the share won of what 2:4 loses against keeping the larger half of every
    row wherever it stands.
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


def interleaved(searches: dict[str, Callable[[], np.ndarray]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each search; every round runs each of them once."""
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(rounds):
        for name, search in searches.items():
            start = time.perf_counter()
            search()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(measured) for name, measured in seconds.items()}


def against_plain(size: int) -> dict[str, float]:
    """Compare with the plain search on a square matrix small enough for it."""
    matrix = normal(size, size, seed=0)
    seconds = interleaved(
        {
            "plain": lambda: plain_search(matrix),
            "greedy": lambda: search_permutation(matrix, escapes=0),
            "escapes": lambda: search_permutation(matrix),
        },
        rounds=ROUNDS,
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
    seconds = interleaved(searches, rounds=ROUNDS)
    return {
        name: {"seconds": seconds[name], **kept_facts(matrix, search())}
        for name, search in searches.items()
    }


def whole_network() -> list[dict]:
    """Run every search of the network once."""
    rows_of_table = []
    listed = SHARED + REPLICATED + PER_GROUP
    bar = tqdm(total=sum(searches for _, searches, _, _ in listed))
    for name, searches, rows, width in listed:
        seconds, facts = 0.0, []
        for seed in range(searches):
            matrix = normal(rows, width, seed)
            start = time.perf_counter()
            order = search_permutation(matrix)
            seconds += time.perf_counter() - start
            facts.append(kept_facts(matrix, order))
            bar.update()
        means = {key: statistics.fmean(fact[key] for fact in facts) for key in facts[0]}
        shape = {"what": name, "searches": searches, "rows": rows, "columns": width}
        rows_of_table.append({**shape, "seconds": seconds, **means})
        bar.write(f"{name:34} {searches:4} x ({rows:5}, {width:4}) {seconds:7.2f} s")
    bar.close()
    return rows_of_table


def draw(result: dict) -> plt.Figure:
    """Draw the seconds of one search beside ASP's, and those of the whole network."""
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
    places = range(len(network))
    bars = right.barh(places, [row["seconds"] for row in network], color=plots.SPARSE)
    right.bar_label(bars, [f" +{row['gain_percent']:.2f} %" for row in network], fontsize=7)
    labels = [f"{row['what']} ({row['searches']})" for row in network]
    right.set_yticks(places, labels, fontsize=7)
    right.invert_yaxis()
    right.set(title="ResNeXt-101 32x8d: magnitude gained", xlabel="seconds")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def main() -> None:
    """Measure, write the result and draw it."""
    for rows, width in ((64, 16), (65536, 32)):  # compile, for one thread and for several
        search_permutation(normal(rows, width, seed=0), escapes=1)
    load = os.getloadavg()[0]  # other work on the machine makes every figure too large
    small, large = against_plain(32), square(256)
    network = whole_network()
    to_mib = 2**20 if sys.platform == "darwin" else 2**10
    result = {
        "what": "channel permutation search for 2:4, normal random weights, float32",
        "command": "python benchmarks/permutation_search.py",
        "load_average_before": load,
        "against_plain_numpy_32x32": small,
        "256x256": large,
        "asp_256x256_seconds_recorded_elsewhere": ASP_SECONDS_RECORDED,
        "resnext101_32x8d": network,
        "resnext101_32x8d_seconds": sum(row["seconds"] for row in network),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / to_mib,
        **machine.provenance(),
    }
    result["versions"] = {
        **result["versions"], "numba": numba.__version__, "numpy": np.__version__,
    }  # fmt: skip
    write_json(RESULT, result)
    plots.save(draw(result), RESULT.with_suffix(".png"))
    print(f"256x256 {large}\n32x32 {small}\nall {result['resnext101_32x8d_seconds']:.1f} s")


if __name__ == "__main__":
    main()
