"""The tutorial's figures. Each function draws one and returns it.

Dense is grey and sparse is green throughout; pruned but not yet retrained is orange, and the
dense twin is blue.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from torch import Tensor, nn

from helpers.errors import InputError
from helpers.files import atomic_write
from helpers.measurement.benchmark import perf_per_watt_by_batch, speedup_by_batch
from helpers.measurement.roofline import Datasheet, floor_ms, intensity
from helpers.metrics import Accuracy, Comparison
from helpers.sparsity import Compressed, SparsityReport, compress_2to4
from helpers.training.loop import Epoch
from helpers.training.recipe import Recipe, schedule

DENSE, PRUNED, SPARSE = "#7a7f87", "#e08e0b", "#4c9a00"
TWIN = "#3d7ea6"  # the sparse model with its zeros multiplied, measured on a CPU
COLOURS = {"dense": DENSE, "sparse": SPARSE}
GAIN_COLOURS = {"speed": SPARSE, "performance per watt": "#a8cf80", "speed of the twin": TWIN}
GAIN_MARKERS = {"speed": "o", "performance per watt": "s", "speed of the twin": "^"}
EMPTY = "#f2f2f0"
_POINTWISE, _GROUPED = "#cfe5b8", "#f3d3a2"  # pale green and pale orange
_POINTS_PER_EPOCH = 50  # of the curve of a learning rate


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, in one piece or not at all."""
    with atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=150, bbox_inches="tight")
    return path


def _axes(
    width: float, height: float, columns: int = 1, **options: Any
) -> tuple[Figure, np.ndarray]:
    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, **options)
    plt.close(figure)  # else a notebook shows it twice: once by pyplot, once as it is returned
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _legend_above(axis: Axes, **options: Any) -> None:
    """Put the legend above an axis, where it covers nothing."""
    options = {"ncols": 3, "fontsize": 9, **options}
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, **options)


def show_images(images: Tensor, captions: Sequence[str]) -> Figure:
    """Draw normalised images (N, C, H, W) in a row, each under its caption."""
    figure, axes = _axes(1.1 * len(images), 1.6, len(images))
    for axis, image, caption in zip(axes, images, captions, strict=True):
        low, high = image.min(), image.max()
        axis.imshow(((image - low) / (high - low)).permute(1, 2, 0).numpy(), cmap="gray_r")
        axis.set_title(caption, fontsize=8)
        axis.axis("off")
    return figure


def _grid(axis: Axes, values: np.ndarray, title: str) -> None:
    """Draw a matrix as coloured cells with its numbers; zeros stay empty."""
    limit = max(np.abs(values).max(), 1e-12)
    nonzero = np.ma.masked_equal(values, 0)
    colours = plt.get_cmap("PiYG").with_extremes(bad=EMPTY)
    norm = TwoSlopeNorm(0, -1.6 * limit, 1.6 * limit)
    axis.pcolormesh(nonzero, cmap=colours, norm=norm, edgecolors="white", linewidth=1.5)
    for row, column in np.ndindex(values.shape):
        if values[row, column] != 0:
            label = f"{values[row, column]:.2f}".replace("-0.00", "0.00")
            axis.text(column + 0.5, row + 0.5, label, ha="center", va="center", fontsize=7)
    axis.invert_yaxis()
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=10)


def draw_compression(dense: Tensor, sparse: Tensor) -> Figure:
    """Draw a small weight before pruning, after it, and in its compressed form.

    Positive numbers are green, negative ones pink, and zeros are left empty.

    Args:
        dense: (out, in) weight, at most 8 by 8 to remain readable.
        sparse: the same weight, 2:4.
    """
    compressed = compress_2to4(sparse)
    positions = compressed.positions.numpy()
    figure, axes = _axes(11, 1 + 0.4 * len(dense), 4, width_ratios=[2, 2, 1, 1])
    _grid(axes[0], dense.numpy(), "dense weight")
    _grid(axes[1], sparse.numpy(), "2:4, two of every four kept")
    _grid(axes[2], compressed.values.numpy(), "values kept")
    axis = axes[3]
    _grid(axis, np.zeros_like(positions, dtype=float), "2-bit positions")
    for row, column in np.ndindex(positions.shape):
        label = f"{positions[row, column]:02b}"
        axis.text(column + 0.5, row + 0.5, label, ha="center", va="center", fontsize=8)
    for axis, step in zip(axes, (4, 4, 2, 2), strict=True):
        for border in range(0, axis.collections[0].get_array().shape[1] + 1, step):
            axis.axvline(border, color="#333333", linewidth=1.2, clip_on=False)
    axes[0].set_xlabel("input channels, in fours", fontsize=9)
    axes[0].set_ylabel("output channels", fontsize=9)
    figure.tight_layout()
    return figure


def plot_bytes(per_type: dict[str, tuple[Compressed, int]]) -> Figure:
    """Draw the memory of a weight, dense and compressed, for each datatype.

    Args:
        per_type: the compressed weight and its dense size in bytes, by datatype.
    """
    figure, (axis,) = _axes(7, 1.1 + 0.55 * len(per_type))
    rows = np.arange(len(per_type))
    dense = [size for _, size in per_type.values()]
    values = [compressed.values.nbytes for compressed, _ in per_type.values()]
    positions = [compressed.metadata.nbytes for compressed, _ in per_type.values()]
    axis.barh(rows + 0.2, dense, 0.36, color=DENSE, label="dense")
    axis.barh(rows - 0.2, values, 0.36, color=SPARSE, label="values")
    axis.barh(rows - 0.2, positions, 0.36, left=values, color=PRUNED, label="2-bit positions")
    for row, (compressed, size) in zip(rows, per_type.values(), strict=True):
        share = f" {compressed.nbytes / size:.2%} of dense"
        axis.text(compressed.nbytes, row - 0.2, share, va="center", fontsize=9)
    axis.set_yticks(rows, list(per_type))
    axis.set_xlabel("bytes")
    figure.legend(frameon=False, fontsize=9, loc="upper center", ncols=3)
    return figure


def draw_bottleneck(block: nn.Module, reads: bool = True) -> Figure:
    """Draw a block of ResNeXt, from its layers.

    Args:
        block: with `conv1`, `conv2`, `conv3` and `downsample`, as torchvision's `Bottleneck`.
        reads: draw beside it which inputs each output of a convolution reads, in groups or not.
    """
    if reads:
        figure, (axis, ordinary, grouped) = _axes(11, 3, 3, width_ratios=[2.6, 1, 1])
        _draw_reads(ordinary, 1, "ordinary: each output\nreads every input")
        _draw_reads(grouped, 4, "grouped: each output\nreads its own group")
    else:
        figure, (axis,) = _axes(6, 2.4)
    _draw_block(axis, block)
    figure.tight_layout()
    return figure


def _draw_block(axis: Axes, block: nn.Module) -> None:
    layers = [block.get_submodule(f"conv{number}") for number in (1, 2, 3)]
    centres = (2.2, 5, 7.8)
    for layer, x in zip(layers, centres, strict=True):
        _draw_layer(axis, x, 0, layer)
    shortcut = getattr(block, "downsample", None)
    path = ((0.4, 0), (0.4, 1.7), (9.8, 1.7), (9.8, 0.2))
    axis.plot(*zip(*path, strict=True), color="#333333", linewidth=1)
    if shortcut is None:
        axis.text(5, 1.8, "the input itself", ha="center", fontsize=9)
    else:
        _draw_layer(axis, 5, 1.7, shortcut[0])
    for start, end in ((-0.5, 1.1), (3.3, 3.9), (6.1, 6.7), (8.9, 9.6), (10, 10.9)):
        axis.annotate("", (end, 0), (start, 0), arrowprops={"arrowstyle": "->"})
    axis.text(9.8, 0, "+", ha="center", va="center", fontsize=14)
    axis.set_xlim(-0.6, 11)
    axis.set_ylim(-0.8, 2.5)
    axis.axis("off")
    axis.set_title("a block: three convolutions and a path beside them", fontsize=10)


def _draw_layer(axis: Axes, x: float, y: float, layer: nn.Module) -> None:
    """Draw a convolution as a box with its kernel and its channels."""
    if not isinstance(layer, nn.Conv2d):
        raise InputError(f"This block has a {type(layer).__name__} in the place of a convolution.")
    grouped = layer.groups > 1
    text = f"{'x'.join(map(str, layer.kernel_size))}, {layer.in_channels} → {layer.out_channels}"
    if grouped:
        text += f"\nin {layer.groups} groups"
    axis.text(
        x, y, text, ha="center", va="center", fontsize=9,
        bbox={"boxstyle": "round,pad=0.5", "fc": _GROUPED if grouped else _POINTWISE, "ec": "none"},
    )  # fmt: skip


def _draw_reads(axis: Axes, groups: int, title: str, channels: int = 8) -> None:
    """Draw which inputs (left) each output (right) of a convolution reads."""
    size = channels // groups
    for output in range(channels):
        first = output // size * size
        for source in range(first, first + size):
            axis.plot((0, 1), (-source, -output), color=DENSE, linewidth=0.7)
    colour = _GROUPED if groups > 1 else _POINTWISE
    for x in (0, 1):
        places = -np.arange(channels)
        axis.scatter([x] * channels, places, s=70, color=colour, edgecolors="#333333", zorder=2)
    axis.set_xlim(-0.4, 1.4)
    axis.axis("off")
    axis.set_title(title, fontsize=10)


def plot_shares(shares: pd.DataFrame) -> Figure:
    """Draw the share of each kind of layer in the parameters and the MACs, in per cent.

    Args:
        shares: as `helpers.layers.shares_by_kind` returns it.
    """
    figure, (axis,) = _axes(7, 0.9 + 0.5 * len(shares))
    rows = np.arange(len(shares))[::-1]
    for offset, label, colour in ((0.2, "parameters", DENSE), (-0.2, "MACs", SPARSE)):
        bars = axis.barh(rows + offset, shares[f"{label}, %"], 0.36, color=colour, label=label)
        axis.bar_label(bars, fmt="%.1f %%", padding=3, fontsize=8)
    axis.set_yticks(rows, shares.index)
    axis.set_xlabel("share of all convolutions and linear layers, %")
    axis.set_xlim(0, 1.15 * shares[["parameters, %", "MACs, %"]].to_numpy().max())
    _legend_above(axis)
    return figure


def plot_layers(report: SparsityReport) -> Figure:
    """Draw the MACs of every layer in order of execution, coloured by eligibility.

    Layers that can be sparse are green; each reason to stay dense has its own colour.

    Args:
        report: as `helpers.sparsity.sparsity_report` returns it.
    """
    layers = report.layers
    figure, (axis,) = _axes(9, 3)
    reasons = layers.reason[~layers.eligible].value_counts().index
    coppers = plt.get_cmap("copper")(np.linspace(0.9, 0.1, len(reasons)))
    for reason, colour in [("", SPARSE), *zip(reasons, coppers, strict=True)]:
        part = layers[layers.reason == reason]
        label = f"{reason or 'can be sparse'} ({len(part)})"
        axis.bar(part.index, part.macs / 1e6, color=colour, label=label)
    if len(layers) <= 40:
        names = layers.weight.str.removesuffix(".weight")
        axis.set_xticks(layers.index, names, rotation=60, ha="right", fontsize=8)
    else:
        axis.set_xlabel("layer, in order of execution")
    axis.set_ylabel("million MACs")
    _legend_above(axis)
    return figure


def plot_history(
    history: Sequence[Epoch],
    dense_top1: float | None = None,
    before: dict[str, float] | None = None,
    recipe: Recipe | None = None,
) -> Figure:
    """Draw loss and validation accuracy over the epochs of a retraining.

    Args:
        history: as `helpers.training.loop.train` returns it.
        dense_top1: accuracy of the dense model on the same validation images, if known.
        before: accuracies before the training, on the same images, by name; drawn at epoch 0.
        recipe: of the training; its learning rate is drawn too.
    """
    figure, (left, *middle, right) = _axes(10 if recipe else 9, 3.2, 3 if recipe else 2)
    epochs = [epoch.number for epoch in history]
    left.plot(epochs, [epoch.loss for epoch in history], "o-", color=SPARSE)
    left.set_ylabel("training loss")
    if recipe:
        factor = schedule(recipe, _POINTS_PER_EPOCH)
        steps = np.arange(recipe.epochs * _POINTS_PER_EPOCH)
        rates = [recipe.learning_rate * factor(int(step)) for step in steps]
        middle[0].plot(steps / _POINTS_PER_EPOCH, rates, color=DENSE)
        middle[0].set_ylabel("learning rate")
    right.plot(epochs, [epoch.validation for epoch in history], "o-", color=SPARSE, label="2:4")
    for marker, (name, top1) in zip("vD^s", (before or {}).items(), strict=False):
        right.plot(0, top1, marker, color=PRUNED, label=name)
    if dense_top1 is not None:
        right.axhline(dense_top1, color=DENSE, linestyle="--", label="dense, before pruning")
    best = max(history, key=lambda epoch: epoch.validation)
    right.plot(best.number, best.validation, "*", color=PRUNED, markersize=15, label="kept")
    right.set_ylabel("validation top-1, %")
    right.margins(y=0.12)
    _legend_above(right, ncols=2, fontsize=8)
    ticks = [0, *epochs] if before or recipe else epochs
    for axis in (left, *middle, right):
        axis.set_xlabel("epoch")
        axis.set_xticks(ticks if len(ticks) <= 12 else ticks[:: len(ticks) // 10])
    figure.tight_layout()
    return figure


def plot_accuracy(results: dict[str, Accuracy]) -> Figure:
    """Draw test accuracies side by side.

    Args:
        results: accuracy by name, such as dense, pruned and retrained.
    """
    colours = {"dense": DENSE, "pruned": PRUNED}
    figure, (axis,) = _axes(6, 3.2)
    for place, (name, result) in enumerate(results.items()):
        axis.bar(place, result.top1, 0.6, color=colours.get(name, SPARSE))
        label = f"{result.top1:.2f} %\n± {result.standard_error:.2f}"
        axis.text(place, result.top1 + 1, label, ha="center", va="bottom")
    axis.set_xticks(range(len(results)), list(results))
    axis.set_ylabel("test top-1, %\n(± standard error)")
    axis.set_ylim(0, 120)
    axis.set_yticks(range(0, 101, 20))
    return figure


def plot_differences(comparisons: dict[str, Comparison]) -> Figure:
    """Draw differences of accuracy between models on the same images.

    A line through a point reaches two standard errors of the difference to each side, which is
    about a 95 % interval. Where it crosses zero, the test does not tell the models apart.

    Args:
        comparisons: by what is subtracted from what, such as "retrained - dense".
    """
    figure, (axis,) = _axes(8, 0.9 + 0.5 * len(comparisons))
    rows = np.arange(len(comparisons))[::-1]
    axis.axvline(0, color="#333333", linewidth=1)
    for row, each in zip(rows, comparisons.values(), strict=True):
        clear = abs(each.difference) > 2 * each.standard_error
        axis.errorbar(
            each.difference, row, xerr=2 * each.standard_error, capsize=3, marker="o",
            color=SPARSE if clear and each.difference > 0 else PRUNED if clear else DENSE,
        )  # fmt: skip
        label = f"{each.difference:+.2f} ± {each.standard_error:.2f}"
        axis.text(
            each.difference, row + 0.18, label, ha="center", va="bottom", fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    axis.set_yticks(rows, list(comparisons))
    axis.set_ylim(-0.5, len(rows) - 0.3)
    axis.margins(x=0.08)
    axis.set_xlabel("difference in top-1, points (lines: ± 2 standard errors)")
    return figure


def plot_sweep(table: pd.DataFrame, title: str) -> Figure:
    """Draw throughput against batch size, and beside it the gain of sparse over dense.

    Both are at the median. Above 1 sparse is better, in speed and, where measured, in images
    per joule. A line through a point is its 95 % interval; the grey band is that of the dense
    model against its copy, if the table has "dense again". The dense twin is drawn as a third
    model if the table has "twin".

    Args:
        table: as `helpers.measurement.benchmark.sweep` returns it.
        title: runner and machine.
    """
    figure, (left, right) = _axes(9.5, 3.4, 2)
    batch_sizes = sorted(table.batch.unique())
    places = np.arange(len(batch_sizes))
    networks = [name for name in ("dense", "twin", "sparse") if name in set(table.network)]
    width = 0.8 / len(networks)
    for column, name in enumerate(networks):
        own = table[table.network == name].set_index("batch").loc[batch_sizes]
        offsets = places + (column - (len(networks) - 1) / 2) * width
        colour = {**COLOURS, "twin": TWIN}[name]
        left.bar(offsets, 1000 * own.index / own.p50, 0.95 * width, color=colour, label=name)
    left.set_ylabel("images/s at the median")
    gains = _gains(table)
    for label, gain in gains.items():
        right.plot(
            places,
            gain.value,
            GAIN_MARKERS[label],
            linestyle="-",
            color=GAIN_COLOURS[label],
            label=label,
        )
        _draw_intervals(right, places, gain)
    if "dense again" in table.network.values:
        chance = speedup_by_batch(table, "dense again")
        right.fill_between(
            places, chance.low, chance.high, color=DENSE, alpha=0.25, linewidth=0,
            label="dense against itself",
        )  # fmt: skip
    _draw_dense_line(right, gains)
    for axis in (left, right):
        axis.set_xticks(places, batch_sizes)
        axis.set_xlim(-0.5, len(places) - 0.5)
        axis.set_xlabel("batch size")
        _legend_below(axis)
    figure.suptitle(textwrap.fill(title, 120), fontsize=10)
    figure.tight_layout()
    return figure


def plot_load(table: pd.DataFrame, title: str) -> Figure:
    """Draw the latency of models on a server against their throughput.

    Solid lines are medians, dotted ones p99. One panel is for closed loops, where a number is
    that of the clients, and one for open loops, where it is that of the requests per second.

    Args:
        table: as `helpers.serving.load.compare_loads` returns it; a load that got no answer is
            left out.
        title: server and machine.

    Raises:
        InputError: no load got an answer.
    """
    answered = table[table.answered > 0]
    panels = {"closed": "clients", "open": "rate"}
    panels = {loop: column for loop, column in panels.items() if loop in set(answered.loop)}
    if not panels:
        raise InputError("No request was answered, so there is no latency to draw.")
    figure, axes = _axes(4.9 * len(panels), 3.8, len(panels), sharey=True)
    names = {"closed": "closed loop, by clients", "open": "open loop, by requests/s due"}
    for axis, (loop, column) in zip(axes, panels.items(), strict=True):
        own = answered[answered.loop == loop]
        for model, rows in own.groupby("model", sort=False):
            rows = rows.sort_values(column)
            colour = COLOURS.get(model, TWIN)
            axis.plot(rows.images_per_second, rows.p50, "o-", color=colour, label=model, ms=4)
            axis.plot(rows.images_per_second, rows.p99, "o:", color=colour, ms=3)
        for load, rows in own.groupby(column):
            place = (rows.images_per_second.median(), rows.p50.min())
            text = f"{load:.0f}" if load >= 10 else f"{load:.2g}"
            axis.annotate(
                text, place, (0, -12), textcoords="offset points", fontsize=8, ha="center",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )  # fmt: skip
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(names[loop], loc="left", fontsize=10)
        axis.set_xlabel("images/s")
        axis.margins(x=0.08, y=0.15)
        axis.set_xlim(left=0)
    axes[0].set_ylabel("latency in ms: p50, p99 dotted")
    handles = axes[0].get_legend_handles_labels()
    figure.suptitle(textwrap.fill(title, 120), fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(*handles, loc="lower center", ncols=len(handles[0]), frameon=False, fontsize=9)
    return figure


def plot_case_study(record: dict[str, Any]) -> Figure:
    """Draw the case study's figure: speed and performance per watt against batch size.

    Both are those of the sparse model relative to the dense one, with their 95 % intervals;
    performance per watt is left out where no energy was measured. On a CPU the speed of the
    dense twin stands beside them.

    Args:
        record: the content of `06_benchmark.json`, as `json.loads` returns it.
    """
    gains = _gains(pd.DataFrame(record["rows"]))
    figure, (axis,) = _axes(7, 3.6)
    width = 0.8 / len(gains)
    for column, (label, gain) in enumerate(gains.items()):
        places = np.arange(len(gain)) + (column - (len(gains) - 1) / 2) * width
        axis.bar(places, gain.value, 0.95 * width, color=GAIN_COLOURS[label], label=label)
        _draw_intervals(axis, places, gain)
    _draw_dense_line(axis, gains)
    axis.set_ylim(bottom=0)
    axis.set_xticks(range(len(gain)), gain.index)
    axis.set_xlabel("batch size")
    _legend_below(axis)
    machine = record["machine"]
    where = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}"
    runner = textwrap.fill(record["runner"], 90)
    axis.set_title(f"{runner}\n{where}, {record['date']}", fontsize=10)
    figure.tight_layout()
    return figure


def _gains(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the gains over dense by batch size: of sparse in speed and energy, and of the twin.

    Energy and the twin are there if they were measured.
    """
    gains = {"speed": speedup_by_batch(table)}
    if "images_per_joule" in table:
        gains["performance per watt"] = perf_per_watt_by_batch(table)
    if "twin" in set(table.network):
        gains["speed of the twin"] = speedup_by_batch(table, "twin")
    return gains


def _draw_intervals(axis: Axes, places: np.ndarray, gain: pd.DataFrame) -> None:
    """Draw the intervals as lines where there are any, and write each value at its place."""
    measured = gain.value.notna().to_numpy()
    places, gain = places[measured], gain[measured]
    axis.vlines(places, gain.low, gain.high, color="#333333", linewidth=1.2)
    for place, value in zip(places, gain.value, strict=True):
        _write_above(axis, f"{value:.2f}", (place, value))


def _draw_dense_line(axis: Axes, gains: Mapping[str, pd.DataFrame]) -> None:
    """Draw the line of no gain, and let the axis end near the values.

    An interval that is much longer than the values differ ends at the frame.
    """
    axis.axhline(1, color=DENSE, linestyle="--")
    values = pd.concat([gain.value for gain in gains.values()])
    low, high = min(0.9, values.min()), max(1.15, values.max())
    margin = 0.25 * (high - low)
    axis.set_ylim(low - margin, high + margin)
    axis.set_ylabel("gain over dense")


def _legend_below(axis: Axes) -> None:
    """Put the legend under the axis, where nothing is drawn."""
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, frameon=False, fontsize=8,
        columnspacing=1.2, handlelength=1.4,
    )  # fmt: skip


def plot_int8(rows: pd.DataFrame) -> Figure:
    """Draw networks in FP32 and INT8: accuracy, size, latency.

    Args:
        rows: one for each network, with its name as the index and the columns `is_2to4` (whether
            it is 2:4), `top1` (per cent), `difference` and `standard_error` (against the first
            row, in points), `megabytes`, `compressed` (in megabytes), and `p50`, `speedup`,
            `speedup_low` and `speedup_high` as `helpers.measurement.benchmark.sweep` returns them.
    """
    figure, (accuracy, size, latency) = _axes(11, 1.4 + 0.45 * len(rows), 3, sharey=True)
    places = np.arange(len(rows))
    colours = [SPARSE if sparse else DENSE for sparse in rows.is_2to4]
    for place, (row, colour) in enumerate(zip(rows.itertuples(), colours, strict=True)):
        error = [2 * row.standard_error]
        accuracy.errorbar(row.difference, place, xerr=error, fmt="o", color=colour, capsize=3)
        accuracy.annotate(
            f"{row.top1:.2f} %", (row.difference, place), xytext=(0, 8), ha="center",
            textcoords="offset points", fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    accuracy.axvline(0, color="#999999", linewidth=0.8, linestyle="--")
    accuracy.set_xlabel(f"top-1 against {rows.index[0]},\npoints ± two standard errors")
    size.barh(places, rows.megabytes, 0.62, color=EMPTY, edgecolor="#bbbbbb", label="as it is")
    size.barh(places, rows.compressed, 0.34, color=colours, label="compressed")
    latency.barh(places, rows.p50, 0.5, color=colours)
    first = rows.p50.iloc[0]
    spread = [rows.p50 - first / rows.speedup_high, first / rows.speedup_low - rows.p50]
    latency.errorbar(rows.p50, places, xerr=spread, fmt="none", color="#333333", capsize=3)
    sizes = [f"{value:.2f} MB" for value in rows.compressed]
    times = [
        f"{row.p50:.2f} ms" + (f", {row.speedup:.2f}x" if place else "")
        for place, row in enumerate(rows.itertuples())
    ]
    for axis, ends, texts in (
        (size, rows.megabytes, sizes),
        (latency, first / rows.speedup_low, times),
    ):
        for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
            axis.annotate(
                text, (end, place), xytext=(5, 0), va="center", textcoords="offset points",
                fontsize=9,
            )  # fmt: skip
        axis.set_xlim(0, 1.35 * float(ends.max()))
    size.set_xlabel("weights, MB: as they are (pale)\nand compressed")
    latency.set_xlabel("latency, ms; lines: 95 % interval\nof the ratio to the first")
    accuracy.set_yticks(places, list(rows.index))
    accuracy.invert_yaxis()
    accuracy.set_ylim(len(rows) - 0.5, -0.7)
    figure.tight_layout()
    return figure


def plot_gemms(table: pd.DataFrame, sheet: Datasheet | None = None) -> Figure:
    """Draw the rates of dense and sparse products by size, one panel for each datatype.

    The ratio of the times stands above each pair, over its 95 % interval. A product that did
    not run is marked, and a datatype of which none ran shows why.

    Args:
        table: as `helpers.measurement.gemm.measure_gemms` returns it.
        sheet: of the GPU that it was measured on; its peaks are dashed lines.

    Raises:
        InputError: the table has no rows.
    """
    _require_rows(table)
    datatypes = list(dict.fromkeys(table.datatype))
    figure, axes = _axes(max(7, 2.9 * len(datatypes)), 3.8, len(datatypes))
    for axis, datatype in zip(axes, datatypes, strict=True):
        own = table[table.datatype == datatype].sort_values(["m", "n", "k"], ignore_index=True)
        axis.set_title(datatype, fontsize=10)
        if own.ratio.isna().all():
            _draw_reason(axis, own.reason[0])
            continue
        _draw_rates(axis, own)
        axis.set_ylabel("TOP/s" if datatype.startswith("INT") else "TFLOP/s")
        if sheet is not None and datatype in sheet.tflops:
            for peak, colour in zip(sheet.tflops[datatype], COLOURS.values(), strict=True):
                axis.axhline(peak, color=colour, linestyle="--", linewidth=1.2)
        axis.set_ylim(0, 1.18 * axis.get_ylim()[1])  # room for the ratios
    handles: list[Artist] = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    if sheet is not None:
        label = f"published peaks, {sheet.gpu}"
        handles.append(Line2D([], [], color="#333333", linestyle="--", label=label))
    handles.append(Patch(color="none", label="ratio of the times, 95 % interval"))
    figure.legend(handles=handles, frameon=False, fontsize=8, loc="upper center", ncols=4)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    return figure


def _require_rows(products: pd.DataFrame) -> None:
    if products.empty:
        raise InputError(
            "There is no product to draw: the table has no rows. Measure some with "
            "helpers.measurement.gemm.measure_gemms."
        )


def _draw_reason(axis: Axes, reason: str) -> None:
    axis.text(
        0.5, 0.5, textwrap.fill(reason, 30), ha="center", va="center", fontsize=8,
        transform=axis.transAxes,
    )  # fmt: skip
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _draw_rates(axis: Axes, rows: pd.DataFrame) -> None:
    """Draw the two bars of each size, and above them their ratio with its interval."""
    for offset, (name, colour) in zip((-0.2, 0.2), COLOURS.items(), strict=True):
        axis.bar(rows.index + offset, rows[f"{name}_tflops"], 0.38, color=colour)
    tops = rows[["dense_tflops", "sparse_tflops"]].max(axis=1).fillna(0)
    for row, top in zip(rows.itertuples(), tops, strict=True):
        if np.isnan(row.ratio):
            _write_above(axis, "did not run", (row.Index, top), rotation=90)
        else:
            interval = f"{row.ratio_low:.2f}-{row.ratio_high:.2f}"
            _write_above(axis, f"{row.ratio:.2f}x", (row.Index, top), points=11)
            _write_above(axis, interval, (row.Index, top), fontsize=5.5)
    if ((rows.m == rows.n) & (rows.n == rows.k)).all():
        axis.set_xticks(rows.index, rows.m, fontsize=8)
        axis.set_xlabel("m = n = k")
    else:
        sizes = [f"{m}x{n}x{k}" for m, n, k in zip(rows.m, rows.n, rows.k, strict=True)]
        axis.set_xticks(rows.index, sizes, rotation=40, ha="right", fontsize=8)
        axis.set_xlabel("m x n x k")
    axis.set_xlim(-0.6, len(rows) - 0.4)


def _write_above(
    axis: Axes,
    text: str,
    place: tuple[float, float],
    points: int = 4,
    fontsize: float = 8,
    rotation: float = 0,
) -> None:
    axis.annotate(
        text, place, xytext=(0, points), textcoords="offset points", ha="center", va="bottom",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        fontsize=fontsize, rotation=rotation, zorder=3,
    )  # fmt: skip


def plot_roofline(sheet: Datasheet, datatype: str, points: pd.DataFrame) -> Figure:
    """Draw the rooflines of a GPU, dense and sparse, with products at their intensities.

    A filled point was measured; the legend counts those that did not run. An empty point is
    the most that the datasheet allows, and the figure says so. Numbers refer to the list of labels.

    Args:
        sheet: with peaks for the datatype.
        datatype: a name in `helpers.measurement.roofline.DATATYPES`.
        points: one product in each row: `label`, `m`, `n`, `k`, and where they were measured
            `dense_tflops` and `sparse_tflops` (NaN: this product did not run).

    Raises:
        InputError: the datasheet has no peaks for the datatype, or there are no points.
    """
    _require_rows(points)
    if datatype not in sheet.tflops:
        raise InputError(
            f"The datasheet of the {sheet.gpu} has no peaks for {datatype}; it has them for "
            f"{', '.join(sheet.tflops)}."
        )
    figure, (axis,) = _axes(9, 4.8)
    peaks = dict(zip(COLOURS, sheet.tflops[datatype], strict=True))
    places = {
        name: _roofline_places(sheet, datatype, points, name, peak) for name, peak in peaks.items()
    }
    dense, sparse = places["dense"], places["sparse"]
    ridge = 1000 * peaks["sparse"] / sheet.bandwidth
    reach = (dense.x.min() / 1.4, 4 * max(sparse.x.max(), ridge))  # room for the peaks' names
    for name, peak in peaks.items():
        _draw_roof(axis, name, peak, sheet.bandwidth, reach)
        measured = f"{name}_tflops" in points
        label = f"{name}, {'measured' if measured else 'what the datasheet allows'}"
        if missing := places[name].y.isna().sum():
            label += f" ({missing} of {len(points)} did not run)"
        axis.plot(
            places[name].x, places[name].y, "o", color=COLOURS[name], zorder=3, label=label,
            markerfacecolor=COLOURS[name] if measured else "white",
        )  # fmt: skip
    axis.plot([dense.x, sparse.x], [dense.y, sparse.y], ":", color=DENSE, linewidth=1)
    axis.plot([], [], ":", color=DENSE, linewidth=1, label="same layer")
    lowest = np.nanmin([*dense.y, *sparse.y])
    axis.set(xscale="log", yscale="log", xlim=reach)
    axis.set_ylim(lowest / 2, 2 * peaks["sparse"])  # room for the numbers
    axis.set_xlabel("operations for each byte moved")
    axis.set_ylabel("TOP/s" if datatype.startswith("INT") else "TFLOP/s")
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    title = f"{datatype}, {sheet.gpu}, memory {sheet.bandwidth:g} GB/s"
    if not {f"{name}_tflops" for name in COLOURS} <= set(points):
        title += "\nempty points: what the datasheet allows, not measured"
    axis.set_title(title, fontsize=10)
    lower = dense.where(dense.y.notna(), sparse).assign(label=points.label.astype(str).to_numpy())
    _number_points(figure, axis, lower.dropna())
    return figure


def _draw_roof(
    axis: Axes, name: str, peak: float, bandwidth: float, reach: tuple[float, float]
) -> None:
    """Draw a roof: the slope of the bandwidth up to a peak, which is named at its right end."""
    left, right = reach
    corners = np.array([left, 1000 * peak / bandwidth, right])
    roof = np.minimum(peak, bandwidth * corners / 1000)
    order = 2 if name == "dense" else 1  # both have the same slope: dense is drawn on top
    axis.plot(corners, roof, color=COLOURS[name], linewidth=1.5, zorder=order)
    axis.annotate(
        f"{name} peak, {peak:g}", (right, peak), xytext=(0, 3), textcoords="offset points",
        ha="right", fontsize=8, color=COLOURS[name],
    )  # fmt: skip


def _roofline_places(
    sheet: Datasheet, datatype: str, points: pd.DataFrame, name: str, peak: float
) -> pd.DataFrame:
    """Return intensity `x` and rate `y` of each product; no rate (NaN) where it did not run."""
    sparse = name == "sparse"
    sizes = list(zip(points.m, points.n, points.k, strict=True))
    x = [intensity(m, n, k, datatype, sparse) for m, n, k in sizes]
    if f"{name}_tflops" in points:
        y = points[f"{name}_tflops"].to_numpy(dtype=float)
    else:
        bandwidth = sheet.bandwidth
        least = [floor_ms(m, n, k, datatype, peak, bandwidth, sparse) for m, n, k in sizes]
        y = 2e-9 * np.array([m * n * k for m, n, k in sizes], dtype=float) / least
    return pd.DataFrame({"x": x, "y": y})


def _number_points(figure: Figure, axis: Axes, places: pd.DataFrame) -> None:
    """Number points from left to right, and write their labels in a list beside the axis.

    Points that are too close for a number each have them in a column below the lowest.
    """
    places = places.sort_values("x", ignore_index=True)
    rows = [f"{at + 1:>2}  {label}" for at, label in enumerate(places.label)]
    axis.text(1.02, 1, "\n".join(rows), transform=axis.transAxes, va="top", fontsize=8)
    figure.tight_layout()  # the list takes room from the axis, and moves the points
    spots = axis.transData.transform(places[["x", "y"]].to_numpy()) * 72 / figure.dpi
    for group in _too_close(spots, width=14, height=11):
        lowest = places.loc[group, "y"].idxmin()
        axis.annotate(
            "\n".join(str(at + 1) for at in group), (places.x[lowest], places.y[lowest]),
            xytext=(0, -5), textcoords="offset points", ha="center", va="top", fontsize=8,
        )  # fmt: skip


def _too_close(spots: np.ndarray, width: float, height: float) -> list[list[int]]:
    """Return groups of spots whose columns of numbers below them would touch.

    Args:
        spots: (points, 2), in typographic points.
        width: of a number.
        height: of a line.
    """
    groups = [[at] for at in range(len(spots))]

    def touch(one: list[int], other: list[int]) -> bool:
        """Return whether two columns touch, each below the lowest of its spots."""
        (x, top), (other_x, other_top) = (
            spots[min(group, key=lambda at: float(spots[at, 1]))] for group in (one, other)
        )
        lines = len(one) if top > other_top else len(other)  # of the higher one
        return abs(x - other_x) < width and abs(top - other_top) < height * lines

    while pair := next((pair for pair in combinations(groups, 2) if touch(*pair)), None):
        groups = [group for group in groups if group not in pair] + [sorted(pair[0] + pair[1])]
    return groups


def plot_fitted_gains(gains: pd.DataFrame, datatype: str, width: int) -> Figure:
    """Draw the gain of a layer over its rows, one panel for each GPU.

    Args:
        gains: as `helpers.measurement.calibration.fitted_gains` returns it.
        datatype: of the layer.
        width: outputs and inputs of the layer.

    Raises:
        InputError: the table has no rows.
    """
    if gains.empty:
        raise InputError(f"There is no gain in {datatype} to draw; choose GPUs that have it.")
    gpus = list(dict.fromkeys(gains.gpu))
    figure, axes = _axes(max(6, 2.3 * len(gpus)), 3.4, len(gpus), sharey=True)
    for axis, gpu in zip(axes, gpus, strict=True):
        own = gains[gains.gpu == gpu]
        axis.fill_between(own.rows, own.low, own.high, color=SPARSE, alpha=0.25, linewidth=0)
        axis.plot(own.rows, own.gain, color=SPARSE)
        axis.axhline(1, color=DENSE, linewidth=1)
        axis.axhline(2, color="#333333", linestyle="--", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.set_title(gpu, fontsize=9)
        axis.set_xlabel("rows")
    axes[0].set_ylabel(f"dense time over sparse time, {datatype}")
    handles: list[Artist] = [
        Line2D([], [], color=SPARSE, label=f"fitted to published measurements, width {width}"),
        Patch(color=SPARSE, alpha=0.25, label="8 of 10 measured products"),
        Line2D([], [], color="#333333", linestyle="--", label="datasheet"),
    ]
    figure.legend(handles=handles, frameon=False, fontsize=8, loc="upper center", ncols=3)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    return figure


def plot_published(rows: pd.DataFrame) -> Figure:
    """Draw predicted speed-ups of whole networks beside the published ones, by batch size.

    Args:
        rows: of `benchmarks/results/published_networks.json`: `network`, `gpu`, `library`,
            `batch`, `predicted`, `low`, `high` and `error`, predicted less published.

    Raises:
        InputError: the table has no rows.
    """
    if rows.empty:
        raise InputError("There is no network to draw; give the rows of the result.")
    groups = list(rows.groupby(["network", "gpu", "library"], sort=False))
    columns = min(5, len(groups))
    lines = math.ceil(len(groups) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.6 * columns, 2.4 * lines), squeeze=False, sharey=True
    )
    plt.close(figure)
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, ((network, gpu, library), own) in zip(axes.flat, groups, strict=False):
        own = own.sort_values("batch")
        places = np.arange(len(own))
        spread = [own.predicted - own.low, own.high - own.predicted]
        axis.errorbar(
            places, own.predicted, spread, color=SPARSE, marker="o", markersize=4, capsize=2
        )
        axis.plot(places, own.predicted - own.error, "D", color="#333333", markersize=4)
        axis.axhline(1, color=DENSE, linewidth=1)
        axis.set_xticks(places, own.batch.astype(str), fontsize=7)
        axis.set_title(f"{network}\n{gpu}, {library}", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("speed-up by 2:4", fontsize=8)
    handles: list[Artist] = [
        Line2D([], [], color=SPARSE, marker="o", label="predicted, with its interval"),
        Line2D([], [], color="#333333", marker="D", linestyle="", label="published"),
    ]
    figure.legend(handles=handles, frameon=False, fontsize=8, loc="upper center", ncols=2)
    figure.supxlabel("batch size", fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    return figure


def plot_accuracy_differences(rows: pd.DataFrame) -> Figure:
    """Draw what 2:4 costs each network in accuracy, and beside it the control that must lose.

    A network whose failing control did not lose is pale: its row says nothing about 2:4.

    Args:
        rows: a row for each network: `network`, and of `retrained` and of `half_inputs` the mean
            difference to the control and its interval, in points: `retrained`,
            `retrained_low`, `retrained_high`, `half_inputs` and so on.

    Raises:
        InputError: the table has no rows.
    """
    if rows.empty:
        raise InputError("There is no network to draw; give the rows of the study.")
    figure, axes = _axes(9.5, 1.2 + 0.36 * len(rows), 2, sharey=True)
    places = np.arange(len(rows))[::-1]
    panels = (
        ("retrained", SPARSE, "retrained 2:4, less the control"),
        ("half_inputs", PRUNED, "without half of its inputs, less the control"),
    )
    tells = rows.half_inputs_high < 0
    for axis, (arm, colour, title) in zip(axes, panels, strict=True):
        spread = np.array([rows[arm] - rows[f"{arm}_low"], rows[f"{arm}_high"] - rows[arm]])
        for shown, alpha in ((tells, 1.0), (~tells, 0.3)):
            axis.errorbar(
                rows[arm][shown], places[shown], xerr=spread[:, shown], fmt="o", color=colour,
                alpha=alpha, markersize=5, capsize=3, linewidth=1.5,
            )  # fmt: skip
        axis.axvline(0, color=DENSE, linewidth=1)
        axis.set_xscale("symlog", linthresh=1)  # a tenth of a point counts, and so do twenty
        ticks = _points_within(*axis.get_xlim())
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("points, 95 % interval; logarithmic beyond 1")
    axes[0].set_yticks(places, rows.network)
    axes[0].set_ylim(-0.6, len(rows) - 0.4)
    figure.tight_layout()
    return figure


def _points_within(low: float, high: float) -> list[float]:
    """Return round numbers of points to mark on an axis from tenths to tens."""
    marks = (-100, -30, -10, -3, -1, -0.5, 0, 0.5, 1, 3, 10, 30, 100)
    return [mark for mark in marks if low <= mark <= high]


def plot_retraining_length(rows: pd.DataFrame) -> Figure:
    """Draw the accuracy of retrained networks against the length of the retraining.

    Args:
        rows: a row for each network and length: `network`, `percent` of the steps of the first
            training, and the mean `difference` to a retraining of 100 %, with `low` and `high`.

    Raises:
        InputError: the table has no rows.
    """
    if rows.empty:
        raise InputError("There is no retraining to draw; give the rows of the study.")
    networks = list(dict.fromkeys(rows.network))
    figure, axes = _axes(3.2 * len(networks), 3, len(networks), sharex=True, sharey=True)
    for axis, network in zip(axes, networks, strict=True):
        own = rows[rows.network == network].sort_values("percent")
        spread = [own.difference - own.low, own.high - own.difference]
        axis.errorbar(
            own.percent, own.difference, spread, color=SPARSE, marker="o", markersize=4, capsize=2
        )
        axis.axhline(0, color=DENSE, linewidth=1)
        axis.set_yscale("symlog", linthresh=1)
        axis.set_title(network, fontsize=10, loc="left")
        axis.set_xlabel("% of the steps")
    if rows.low.min() < 0:
        axes[0].set_ylim(bottom=1.4 * rows.low.min())  # the margins cut an interval's cap
    ticks = _points_within(*axes[0].get_ylim())
    axes[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0].set_ylabel("points, less a whole retraining;\nlogarithmic beyond 1")
    figure.tight_layout()
    return figure
