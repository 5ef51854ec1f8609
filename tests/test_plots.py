import itertools
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from helpers import sparsity
from helpers.errors import InputError, WriteError
from helpers.measurement.calibration import fitted_gains
from helpers.measurement.gemm import measure_gemms
from helpers.measurement.roofline import DATASHEETS, floor_ms, intensity
from helpers.metrics import Accuracy, Comparison
from helpers.sparsity import compress_2to4, mask_2to4
from helpers.training import networks
from helpers.training.loop import Epoch
from helpers.training.recipe import Recipe
from helpers.tutorial import plots


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def labels(ticks) -> list[str]:
    return [tick.get_text() for tick in ticks]


def legend(axis) -> list[str]:
    return labels(axis.get_legend().get_texts())


@pytest.fixture(autouse=True)
def no_figure_is_left_to_pyplot():
    """A figure that pyplot keeps would be shown twice in a notebook."""
    yield
    assert plt.get_fignums() == []


def test_images_are_drawn_in_a_row_each_under_its_caption():
    images = torch.rand(3, 1, 5, 4)
    figure = plots.show_images(images, ["coat", "bag", "shirt"])
    assert isinstance(figure, Figure)
    assert [axis.get_title() for axis in figure.axes] == ["coat", "bag", "shirt"]
    for axis, image in zip(figure.axes, images, strict=True):
        shown = axis.images[0].get_array()
        assert shown.shape[:2] == (5, 4)
        assert (shown.min(), shown.max()) == (0, 1)
        assert np.argmax(shown) == image.argmax()


def test_compression_shows_weights_values_and_positions():
    dense = torch.tensor([[1.0, -3.0, 2.0, -0.5, 4.0, 0.1, 0.2, -5.0]])
    figure = plots.draw_compression(dense, dense * mask_2to4(dense))
    before, after, values, positions = figure.axes
    assert [float(text) for text in texts(before)] == pytest.approx(dense[0].tolist())
    assert [float(text) for text in texts(after)] == [-3, 2, 4, -5], "zeros stay empty"
    assert texts(values) == texts(after)
    assert texts(positions) == ["01", "10", "00", "11"]
    borders = [line.get_xdata()[0] for line in before.lines]
    assert borders == [0, 4, 8], "a line between any two groups of four"
    assert [line.get_xdata()[0] for line in values.lines] == [0, 2, 4]


def test_bytes_are_drawn_as_bars_with_their_share():
    weight = torch.randn(8, 8)
    half = compress_2to4((weight * mask_2to4(weight)).half())
    figure = plots.plot_bytes({"FP16": (half, 128), "again": (half, 128)})
    (axis,) = figure.axes
    assert [bar.get_width() for bar in axis.patches] == [128, 128, 64, 64, 8, 8]
    assert [bar.get_x() for bar in axis.patches] == [0, 0, 0, 0, 64, 64], "positions beside values"
    assert texts(axis) == 2 * [" 56.25% of dense"]
    assert labels(axis.get_yticklabels()) == ["FP16", "again"]
    assert labels(figure.legends[0].get_texts()) == ["dense", "values", "2-bit positions"]


def test_shares_are_two_bars_for_each_kind_of_layer():
    shares = pd.DataFrame(
        {"layers": [2, 1], "parameters, %": [60.0, 40.0], "MACs, %": [90.0, 10.0]},
        index=["1x1 convolution", "linear"],
    )
    (axis,) = plots.plot_shares(shares).axes
    assert [bar.get_width() for bar in axis.patches] == [60, 40, 90, 10]
    assert texts(axis) == ["60.0 %", "40.0 %", "90.0 %", "10.0 %"]
    assert labels(axis.get_yticklabels()) == ["1x1 convolution", "linear"]
    heights = [bar.get_y() for bar in axis.patches]
    assert heights[0] > heights[1], "the first kind stands on top"


def test_layers_are_coloured_by_the_verdict_and_its_reason():
    model = networks.create_model("resnext14_8x1d", 10)
    report = sparsity.sparsity_report(model, (1, 28, 28))
    (axis,) = plots.plot_layers(report).axes
    sparse = [bar for bar in axis.patches if to_hex(bar.get_facecolor()) == plots.SPARSE]
    assert len(sparse) == len(report.eligible)
    assert len(axis.patches) == len(report.layers)
    assert labels(axis.get_xticklabels())[:2] == ["conv1", "layer1.0.conv1"]
    assert len({to_hex(bar.get_facecolor()) for bar in axis.patches}) == 3
    assert sum(bar.get_height() for bar in axis.patches) == pytest.approx(
        report.layers.macs.sum() / 1e6
    )
    assert legend(axis) == [
        "can be sparse (12)",
        "grouped: TensorRT has no sparse kernel (4)",
        "1 input channel: not a multiple of 4 (1)",
    ]


def test_many_layers_are_not_named_one_by_one():
    layers = pd.DataFrame(
        {"weight": map(str, range(41)), "macs": 1e6, "eligible": True, "reason": ""}
    )
    (axis,) = plots.plot_layers(sparsity.SparsityReport(layers, 1, 1, 0)).axes
    assert len(axis.patches) == 41
    assert axis.get_xlabel() == "layer, in order of execution"


def history(*validation: float) -> list[Epoch]:
    return [Epoch(n, 1 / n, share, 1.0) for n, share in enumerate(validation, 1)]


def test_a_history_is_drawn_with_the_epoch_that_was_kept():
    left, right = plots.plot_history(history(50, 90, 90), dense_top1=92).axes
    assert list(left.lines[0].get_ydata()) == [1, 1 / 2, 1 / 3]
    epochs, dense, kept = right.lines
    assert list(epochs.get_ydata()) == [50, 90, 90]
    assert list(dense.get_ydata()) == [92, 92]
    assert (kept.get_xdata()[0], kept.get_ydata()[0]) == (2, 90), "of equal epochs the earlier"
    assert legend(right) == ["2:4", "dense, before pruning", "kept"]
    assert list(right.get_xticks()) == [1, 2, 3]


def test_a_history_begins_with_what_was_there_before_and_shows_the_learning_rate():
    recipe = Recipe(epochs=3, batch_size=1, learning_rate=0.2, weight_decay=0, warmup=0.5)
    figure = plots.plot_history(history(50, 90, 90), before={"pruned": 40}, recipe=recipe)
    loss, rate, accuracy = figure.axes
    assert max(rate.lines[0].get_ydata()) == pytest.approx(0.2)
    assert rate.lines[0].get_xdata()[np.argmax(rate.lines[0].get_ydata())] == pytest.approx(
        1.5, abs=0.05
    )
    before = accuracy.lines[1]
    assert (before.get_xdata()[0], before.get_ydata()[0]) == (0, 40)
    assert legend(accuracy) == ["2:4", "pruned", "kept"]
    assert list(loss.get_xticks()) == list(accuracy.get_xticks()) == [0, 1, 2, 3]


def test_a_long_history_has_few_ticks():
    left, _ = plots.plot_history(history(*range(1, 101)), dense_top1=92).axes
    assert len(left.get_xticks()) == 10


def test_accuracies_are_bars_with_twice_their_standard_error():
    results = {
        "dense": Accuracy(90, 100),
        "pruned": Accuracy(50, 100),
        "retrained": Accuracy(88, 100),
    }
    (axis,) = plots.plot_accuracy(results).axes
    assert [bar.get_height() for bar in axis.patches] == [90, 50, 88]
    assert [to_hex(bar.get_facecolor()) for bar in axis.patches] == [
        plots.DENSE, plots.PRUNED, plots.SPARSE,
    ]  # fmt: skip
    assert texts(axis) == ["90.00 %\n± 3.00", "50.00 %\n± 5.00", "88.00 %\n± 3.25"]
    assert labels(axis.get_xticklabels()) == list(results)


def test_differences_are_points_with_twice_their_standard_error_and_a_line_at_zero():
    comparisons = {"worse": Comparison(30, 10, 100), "alike": Comparison(10, 12, 100)}
    (axis,) = plots.plot_differences(comparisons).axes
    zero, *points = (line for line in axis.lines if line.get_marker() != "|")
    assert list(zero.get_xdata()) == [0, 0]
    assert [point.get_xdata()[0] for point in points] == [-20, 2]
    assert [to_hex(point.get_color()) for point in points] == [plots.PRUNED, plots.DENSE]
    error = comparisons["worse"].standard_error
    assert list(axis.collections[0].get_segments()[0][:, 0]) == pytest.approx(
        [-20 - 2 * error, -20 + 2 * error]
    )
    assert texts(axis) == ["-20.00 ± 6.00", "+2.00 ± 4.69"]
    assert labels(axis.get_yticklabels()) == ["worse", "alike"]


def test_the_numbers_of_a_weight_have_no_negative_zero():
    weight = torch.tensor([[-0.001, 1.0, 2.0, 3.0]])
    assert texts(plots.draw_compression(weight, weight * mask_2to4(weight)).axes[0])[0] == "0.00"


def test_a_block_is_drawn_with_the_channels_and_groups_of_its_convolutions():
    model = networks.create_model("resnext14_8x1d", 10)
    block, ordinary, grouped = plots.draw_bottleneck(model.layer2[0]).axes
    boxes = ["1x1, 64 → 32", "3x3, 32 → 32\nin 8 groups", "1x1, 32 → 256", "1x1, 64 → 256", "+"]
    assert [text for text in texts(block) if text] == boxes
    assert len(ordinary.lines) == 64, "each of eight outputs reads eight inputs"
    assert len(grouped.lines) == 16, "each of eight outputs reads its two"


def test_a_block_without_a_downsampling_adds_its_input():
    model = networks.create_model("resnext101_32x8d", 10)
    (block,) = plots.draw_bottleneck(model.layer1[1], reads=False).axes
    assert "the input itself" in texts(block)
    assert "3x3, 256 → 256\nin 32 groups" in texts(block)


def test_a_block_of_other_layers_is_refused():
    block = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("conv1", "conv2", "conv3")})
    with pytest.raises(InputError, match="a Linear in the place of a convolution"):
        plots.draw_bottleneck(block)


def test_networks_in_int8_show_accuracy_size_and_latency():
    rows = pd.DataFrame(
        {
            "is_2to4": [False, True],
            "top1": [92.0, 91.5],
            "difference": [0.0, -0.5],
            "standard_error": [0.0, 0.1],
            "megabytes": [8.0, 2.0],
            "compressed": [8.0, 1.25],
            "p50": [6.0, 2.0],
            "speedup": [1.0, 3.0],
            "speedup_low": [1.0, 2.5],
            "speedup_high": [1.0, 4.0],
        },
        index=["dense FP32", "sparse INT8"],
    )
    accuracy, size, latency = plots.plot_int8(rows).axes
    assert labels(accuracy.get_yticklabels()) == list(rows.index)
    assert texts(accuracy) == ["92.00 %", "91.50 %"]
    spread = accuracy.collections[1].get_segments()[0][:, 0]
    assert list(spread) == pytest.approx([-0.7, -0.3])
    assert [bar.get_width() for bar in size.patches] == [8, 2, 8, 1.25]
    assert texts(size) == ["8.00 MB", "1.25 MB"]
    assert [bar.get_width() for bar in latency.patches] == [6, 2]
    assert texts(latency) == ["6.00 ms", "2.00 ms, 3.00x"]
    spread = latency.collections[0].get_segments()[1][:, 0]
    assert list(spread) == pytest.approx([6 / 4, 6 / 2.5])


def sweep_table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "network": ["dense", "sparse", "dense", "sparse"],
            "batch": [8, 8, 1, 1],
            "p50": [9.0, 6.0, 1.0, 2.0],
            "speedup_low": [1.0, 1.25, 1.0, 0.25],
            "speedup_high": [1.0, 1.75, 1.0, 0.75],
            "images_per_second": [100.0, 150.0, 40.0, 20.0],
            "images_per_joule": [2.0, 6.0, 1.0, 3.0],
            "perf_per_watt_low": [1.0, 2.5, 1.0, 2.0],
            "perf_per_watt_high": [1.0, 3.5, 1.0, 4.0],
        }
    )


def intervals(axis) -> list[tuple[float, float, float]]:
    """Return place, low and high of every line of an interval."""
    segments = [segment for lines in axis.collections for segment in lines.get_segments()]
    return [(x, low, high) for (x, low), (_, high) in filter(len, segments)]


def test_a_sweep_shows_throughput_and_the_ratios_in_order_of_batch_size():
    figure = plots.plot_sweep(sweep_table(), "on a GPU")
    left, right = figure.axes
    assert figure.get_suptitle() == "on a GPU"
    heights = [bar.get_height() for bar in left.patches]
    assert heights == pytest.approx([1000 / 1, 8000 / 9, 1000 / 2, 8000 / 6])
    assert legend(left) == ["dense", "sparse"]
    assert texts(right) == ["0.50", "1.50", "3.00", "3.00"]
    assert legend(right) == ["speed", "performance per watt"]
    assert intervals(right) == [(0, 0.25, 0.75), (1, 1.25, 1.75), (0, 2, 4), (1, 2.5, 3.5)]
    for axis in (left, right):
        assert labels(axis.get_xticklabels()) == ["1", "8"]


def test_a_control_in_the_sweep_is_a_band_without_bars():
    table = sweep_table()
    control = table[table.network == "dense"].assign(
        network="dense again", speedup_low=[0.9, 0.8], speedup_high=[1.1, 1.2]
    )
    table = pd.concat([table, control])
    left, right = plots.plot_sweep(table, "on a GPU").axes
    assert len(left.patches) == 4
    assert texts(right) == ["0.50", "1.50", "3.00", "3.00"]
    assert "dense against itself" in legend(right)
    (band,) = (part for part in right.collections if isinstance(part, PolyCollection))
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
    assert corners == {(0, 0.8), (0, 1.2), (1, 0.9), (1, 1.1)}
    (axis,) = plots.plot_case_study(record(table)).axes
    assert len(axis.patches) == 4


def test_the_dense_twin_is_a_third_model_in_both_figures():
    table = sweep_table().drop(columns="images_per_joule")
    twin = table[table.network == "dense"].assign(
        network="twin", p50=[12.0, 4.0], speedup_low=[0.7, 0.2], speedup_high=[0.8, 0.3]
    )
    table = pd.concat([table, twin])
    left, right = plots.plot_sweep(table, "on a CPU").axes
    assert legend(left) == ["dense", "twin", "sparse"]
    assert [bar.get_height() for bar in left.patches] == pytest.approx(
        [1000, 8000 / 9, 250, 8000 / 12, 500, 8000 / 6]
    )
    centres = [bar.get_x() + bar.get_width() / 2 for bar in left.patches]
    assert np.mean(centres[:4:2] + centres[4:5]) == pytest.approx(0), "centred on the batch size"
    (axis,) = plots.plot_case_study(record(table)).axes
    for figure in (right, axis):
        assert texts(figure) == ["0.50", "1.50", "0.25", "0.75"]
        assert legend(figure) == ["speed", "speed of the twin"]
        shown = [(low, high) for _, low, high in intervals(figure)]
        assert shown == [(0.25, 0.75), (1.25, 1.75), (0.2, 0.3), (0.7, 0.8)]
    assert to_hex(left.patches[2].get_facecolor()) == to_hex(axis.patches[2].get_facecolor())


def test_a_sweep_without_energy_shows_no_energy():
    _, right = plots.plot_sweep(sweep_table().drop(columns="images_per_joule"), "on a CPU").axes
    assert texts(right) == ["0.50", "1.50"]
    assert legend(right) == ["speed"]


def test_a_sweep_recorded_without_intervals_is_drawn_without_them():
    table = sweep_table()[["network", "batch", "p50", "images_per_second"]]
    _, right = plots.plot_sweep(table, "long ago").axes
    assert texts(right) == ["0.50", "1.50"]
    assert intervals(right) == []


def record(table: pd.DataFrame, **machine: object) -> dict[str, object]:
    """Return what comes back from a benchmark's JSON file."""
    content = {
        "runner": "TensorRT 11.4",
        "date": "2026-11-23",
        "machine": {"cpu": "EPYC", "cores": 2} | machine,
        "rows": table.to_dict("records"),
    }
    return json.loads(json.dumps(content))


def test_the_case_study_is_drawn_from_its_record():
    (axis,) = plots.plot_case_study(record(sweep_table(), gpu="H100")).axes
    assert [bar.get_height() for bar in axis.patches] == [0.5, 1.5, 3, 3]
    assert texts(axis) == ["0.50", "1.50", "3.00", "3.00"]
    assert legend(axis) == ["speed", "performance per watt"]
    assert axis.get_title() == "TensorRT 11.4\nH100, 2026-11-23"
    assert labels(axis.get_xticklabels()) == ["1", "8"]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in axis.patches]
    places, lows, highs = zip(*intervals(axis), strict=True)
    assert places == pytest.approx(centres), "each interval stands on its own bar"
    assert (lows, highs) == ((0.25, 1.25, 2, 2.5), (0.75, 1.75, 4, 3.5))
    (dense,) = axis.lines
    assert list(dense.get_ydata()) == [1, 1]
    assert axis.get_ylim()[0] == 0


def test_the_case_study_without_energy_shows_speed_alone():
    table = sweep_table().drop(columns="images_per_joule")
    (axis,) = plots.plot_case_study(record(table)).axes
    assert legend(axis) == ["speed"]
    assert [bar.get_x() + bar.get_width() / 2 for bar in axis.patches] == pytest.approx([0, 1])
    assert axis.get_title().endswith("2 cores of EPYC, 2026-11-23")


@pytest.mark.parametrize("draw", [plots.plot_sweep, plots.plot_case_study])
def test_a_long_interval_ends_at_the_frame_and_moves_nothing(draw):
    def drawn(table: pd.DataFrame) -> Axes:
        arguments = (table, "noisy") if draw is plots.plot_sweep else (record(table),)
        figure = draw(*arguments)
        figure.canvas.draw()
        return figure.axes[-1]

    table = sweep_table()
    quiet = drawn(table)
    table.loc[(table.network == "sparse") & (table.batch == 8), "speedup_high"] = 40
    noisy = drawn(table)
    assert max(high for _, _, high in intervals(noisy)) == 40
    assert noisy.get_ylim() == quiet.get_ylim()
    places = [text.xy for text in noisy.texts]
    assert places == [text.xy for text in quiet.texts]
    assert all(str(f"{y:.2f}") == text for (_, y), text in zip(places, texts(noisy), strict=True))
    low, high = noisy.get_ylim()
    assert all(low < y < high for _, y in places)
    assert noisy.get_legend().get_window_extent().y1 < noisy.get_window_extent().y0


def gemm_table(**columns: list) -> pd.DataFrame:
    content = {
        "datatype": ["FP16", "FP16", "INT8"],
        "m": [1024, 2048, 64],
        "n": [1024, 2048, 128],
        "k": [1024, 2048, 256],
        "dense_tflops": [200.0, 300.0, 100.0],
        "sparse_tflops": [300.0, 270.0, 200.0],
        "ratio": [1.5, 0.9, 2.0],
        "ratio_low": [1.45, 0.85, 1.9],
        "ratio_high": [1.55, 0.95, 2.1],
        "reason": ["", "", ""],
    }
    return pd.DataFrame(content | columns)


def heights(axis) -> list[float]:
    return [bar.get_height() for bar in axis.patches]


def test_products_are_drawn_by_datatype_dense_beside_sparse_with_ratio_and_interval():
    figure = plots.plot_gemms(gemm_table())
    left, right = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["FP16", "INT8"]
    assert [axis.get_ylabel() for axis in figure.axes] == ["TFLOP/s", "TOP/s"]
    assert heights(left) == [200, 300, 300, 270]
    assert heights(right) == [100, 200]
    colours = [to_hex(bar.get_facecolor()) for bar in right.patches]
    assert colours == [plots.DENSE, plots.SPARSE]
    assert texts(left) == ["1.50x", "1.45-1.55", "0.90x", "0.85-0.95"]
    ratio, interval, *_ = left.texts
    assert interval.get_fontsize() < ratio.get_fontsize()
    assert interval.xyann[1] < ratio.xyann[1]
    assert labels(left.get_xticklabels()) == ["1024", "2048"]
    assert left.get_xlabel() == "m = n = k"
    assert labels(right.get_xticklabels()) == ["64x128x256"]
    assert labels(figure.legends[0].get_texts()) == [
        "dense", "sparse", "ratio of the times, 95 % interval",
    ]  # fmt: skip
    assert not left.lines
    for axis in figure.axes:
        for text in axis.texts:
            assert text.xy[1] == max(heights(axis)[int(text.xy[0]) :: len(axis.texts) // 2])


def test_products_are_drawn_by_size_in_whatever_order_they_were_measured():
    figure = plots.plot_gemms(gemm_table().iloc[::-1])
    left = figure.axes[1]
    assert labels(left.get_xticklabels()) == ["1024", "2048"]
    assert heights(left) == [200, 300, 300, 270]


def test_published_peaks_are_dashed_lines_where_there_are_any():
    table = gemm_table(datatype=["FP16", "FP16", "FP8"])
    figure = plots.plot_gemms(table, DATASHEETS["a100"])
    left, right = figure.axes
    assert [line.get_ydata()[0] for line in left.lines] == [312, 624]
    assert [to_hex(line.get_color()) for line in left.lines] == [plots.DENSE, plots.SPARSE]
    assert left.get_ylim()[1] > 624
    assert not right.lines, "an A100 has no FP8"
    assert labels(figure.legends[0].get_texts())[2] == "published peaks, NVIDIA A100 80 GB SXM"


def test_a_product_that_did_not_run_is_marked():
    nan = float("nan")
    table = gemm_table(
        dense_tflops=[nan, 300.0, nan],
        sparse_tflops=[nan, 270.0, nan],
        ratio=[nan, 0.9, nan],
        reason=["too small", "", "No GPU was found, so that nothing could be measured."],
    )
    left, right = plots.plot_gemms(table, DATASHEETS["h200"]).axes
    assert texts(left) == ["did not run", "0.90x", "0.85-0.95"]
    (reason,) = texts(right)
    assert reason.replace("\n", " ") == table.reason[2]
    assert not right.patches


PRODUCTS = pd.DataFrame(
    {"label": ["decode", "prefill"], "m": [8, 8192], "n": [4096, 8192], "k": [4096, 8192]}
)


def dots(axis) -> list[tuple[list[float], list[float], str, str]]:
    """Return x, y, colour and filling of every series of points."""
    return [
        (
            list(line.get_xdata()),
            list(line.get_ydata()),
            to_hex(line.get_color()),
            to_hex(line.get_markerfacecolor()),
        )
        for line in axis.lines
        if line.get_marker() == "o"
    ]


def test_products_that_were_not_measured_stand_on_the_roofs_and_the_figure_says_so():
    sheet = DATASHEETS["h200"]
    (axis,) = plots.plot_roofline(sheet, "FP16", PRODUCTS).axes
    sizes = list(PRODUCTS[["m", "n", "k"]].itertuples(index=False, name=None))
    for (x, y, colour, filling), sparse in zip(dots(axis), (False, True), strict=True):
        peak = sheet.tflops["FP16"][sparse]
        assert x == pytest.approx([intensity(*size, "FP16", sparse) for size in sizes])
        roof = [min(peak, sheet.bandwidth * each / 1000) for each in x]
        assert y == pytest.approx(roof)
        rates = [
            2 * m * n * k / floor_ms(m, n, k, "FP16", peak, sheet.bandwidth, sparse) / 1e9
            for m, n, k in sizes
        ]
        assert y == pytest.approx(rates)
        assert colour == (plots.SPARSE if sparse else plots.DENSE)
        assert filling == "#ffffff"
    assert "what the datasheet allows, not measured" in axis.get_title()
    assert legend(axis) == [
        "dense, what the datasheet allows", "sparse, what the datasheet allows", "same layer",
    ]  # fmt: skip
    peaks = {"dense peak, 989.4", "sparse peak, 1978.9"}
    assert {"1", "2", " 1  decode\n 2  prefill"} | peaks == set(texts(axis))
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")


def test_roofs_rise_with_the_bandwidth_to_the_peaks():
    sheet = DATASHEETS["a100"]
    (axis,) = plots.plot_roofline(sheet, "INT8", PRODUCTS).axes
    for roof, peak in zip((axis.lines[0], axis.lines[2]), sheet.tflops["INT8"], strict=True):
        (left, ridge, right), (low, corner, top) = roof.get_xdata(), roof.get_ydata()
        assert low == pytest.approx(sheet.bandwidth * left / 1000)
        assert ridge == pytest.approx(1000 * peak / sheet.bandwidth)
        assert corner == pytest.approx(peak)
        assert top == peak
        assert left < ridge < right
    assert axis.get_ylabel() == "TOP/s"


def test_measured_products_are_filled_points_at_their_rates():
    points = PRODUCTS.assign(dense_tflops=[30.0, 700.0], sparse_tflops=[40.0, float("nan")])
    (axis,) = plots.plot_roofline(DATASHEETS["h200"], "FP16", points).axes
    dense, sparse = dots(axis)
    assert dense[1] == [30, 700]
    assert sparse[1][0] == 40
    assert np.isnan(sparse[1][1])
    assert dense[2:] == (plots.DENSE, plots.DENSE)
    assert sparse[2:] == (plots.SPARSE, plots.SPARSE)
    assert "not measured" not in axis.get_title()
    assert legend(axis) == [
        "dense, measured", "sparse, measured (1 of 2 did not run)", "same layer",
    ]  # fmt: skip


def test_a_product_that_ran_neither_way_has_no_label():
    nan = float("nan")
    points = PRODUCTS.assign(dense_tflops=[nan, nan], sparse_tflops=[nan, 1000.0])
    (axis,) = plots.plot_roofline(DATASHEETS["h200"], "FP16", points).axes
    assert " 1  prefill" in texts(axis)
    assert legend(axis)[:2] == [
        "dense, measured (2 of 2 did not run)", "sparse, measured (1 of 2 did not run)",
    ]  # fmt: skip
    (number,) = [text for text in axis.texts if text.get_text() == "1"]
    assert number.xy[1] == 1000, "it hangs on the point that there is"


def test_products_that_coincide_have_their_numbers_in_a_column():
    same = pd.concat([PRODUCTS[1:]] * 2 + [PRODUCTS[:1]]).assign(label=["a", 2, "c"])
    (axis,) = plots.plot_roofline(DATASHEETS["h200"], "FP16", same).axes
    assert {"1", "2\n3", " 1  c\n 2  a\n 3  2"} < set(texts(axis))
    assert len(axis.texts) == 2 + 2 + 1, "the numbers, the peaks' names and the list"


CLOSE = [(64 * 2**step, 1024 + 64 * step, 1024) for step in range(8)]
ALIKE = [(side, side, side) for side in (1000, 1040, 1080, 1120)]
MANY = [(49 * 2**rows, 64 * 2**n, 64 * 2**k) for rows in range(4) for n in range(3) for k in (0, 2)]


@pytest.mark.parametrize("sizes", [CLOSE, ALIKE, MANY], ids=["close", "alike", "many"])
@pytest.mark.parametrize("measured", [False, True])
def test_every_label_of_a_roofline_can_be_read(sizes, measured):
    """No text touches another one, and all are inside of the figure."""
    points = pd.DataFrame(sizes, columns=["m", "n", "k"])
    points["label"] = [f"layer{number}.0.downsample.0" for number in range(len(points))]
    if measured:
        rates = np.linspace(500, 380, len(points))
        points = points.assign(dense_tflops=rates, sparse_tflops=1.2 * rates)
    figure = plots.plot_roofline(DATASHEETS["h200"], "FP16", points)
    (axis,) = figure.axes
    figure.canvas.draw()
    written = [text for text in axis.texts if text.get_text()]
    boxes = [text.get_window_extent() for text in written]
    for one, other in itertools.combinations(zip(written, boxes, strict=True), 2):
        assert not one[1].overlaps(other[1]), (one[0].get_text(), other[0].get_text())
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    (listed,) = [text.get_text() for text in written if "layer" in text.get_text()]
    numbers = [text.get_text() for text in written if text.get_text()[0].isdigit()]
    told = sorted(int(number) for text in numbers for number in text.split())
    assert told == [int(line.split()[0]) for line in listed.splitlines()]
    assert len(told) == len(points)


def test_a_table_without_products_is_refused():
    for draw in (
        plots.plot_gemms,
        lambda rows: plots.plot_roofline(DATASHEETS["a100"], "FP16", rows),
    ):
        with pytest.raises(InputError, match="There is no product to draw"):
            draw(measure_gemms([]))


def test_a_roofline_without_published_peaks_is_refused():
    with pytest.raises(InputError, match=r"A100 80 GB SXM has no peaks for FP8; .* TF32, FP16"):
        plots.plot_roofline(DATASHEETS["a100"], "FP8", PRODUCTS)


def test_save_writes_a_png(tmp_path):
    path = tmp_path / "figures" / "a.png"
    figure = plots.plot_history(history(1, 2), 3)
    assert plots.save(figure, path) == path
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 500


@pytest.mark.parametrize("error", [RuntimeError("no"), OSError(28, "No space left on device")])
def test_a_figure_that_cannot_be_saved_leaves_the_old_one(tmp_path, monkeypatch, error):
    path = tmp_path / "a.png"
    path.write_bytes(b"the old one")

    def half_a_file(part, **_: object) -> None:
        part.write_bytes(b"half of the new")
        raise error

    figure = plots.plot_history(history(1, 2), 3)
    monkeypatch.setattr(figure, "savefig", half_a_file)
    with pytest.raises(WriteError if isinstance(error, OSError) else RuntimeError):
        plots.save(figure, path)
    assert path.read_bytes() == b"the old one"
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_batch_whose_energy_was_not_measured_has_no_figure_for_it():
    table = sweep_table()
    energy = [name for name in table if "joule" in name or "watt" in name]
    table.loc[table.batch == table.batch.min(), energy] = float("nan")
    (axis,) = plots.plot_case_study(record(table, gpu="H100")).axes
    texts = [text.get_text() for text in axis.texts]
    assert len(texts) == 2 + 1  # speed at both batches, performance per watt at one
    assert "nan" not in texts


def test_fitted_gains_have_a_panel_for_each_gpu_with_its_band_and_the_datasheet():
    gains = fitted_gains(["a100", "h100"], "FP8", (64, 1024, 8192), 4096)
    assert gains.name.unique().tolist() == ["h100"]  # an A100 has no FP8
    gains = fitted_gains(["a100", "h100"], "BF16", (64, 1024, 8192), 4096)
    assert (gains.low < gains.gain).all()
    assert (gains.gain < gains.high).all()
    figure = plots.plot_fitted_gains(gains, "BF16", 4096)
    assert [axis.get_title() for axis in figure.axes] == ["A100 80GB PCIe", "H100 80GB PCIe"]
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[0] == "fitted to published measurements, width 4096"
    with pytest.raises(InputError):
        plots.plot_fitted_gains(gains.iloc[:0], "BF16", 4096)


def load_rows(*, answered: int = 5) -> pd.DataFrame:
    loads = [("closed", 1, np.nan), ("closed", 4, np.nan), ("open", np.nan, 50.0)]
    return pd.DataFrame(
        [
            {
                "model": model, "loop": loop, "clients": clients, "rate": rate,
                "answered": answered, "images_per_second": 100.0 * place, "p50": place + 1.0,
                "p99": place + 9.0,
            }
            for place, (loop, clients, rate) in enumerate(loads, 1)
            for model in ("dense", "sparse")
        ]
    )  # fmt: skip


def test_a_load_is_drawn_as_latency_against_throughput():
    figure = plots.plot_load(load_rows(), "a server")
    closed, opened = figure.axes
    assert labels(figure.legends[0].get_texts()) == ["dense", "sparse"]
    median, tail = closed.lines[:2]
    assert median.get_xdata().tolist() == [100, 200]
    assert median.get_ydata().tolist() == [2, 3]
    assert tail.get_ydata().tolist() == [10, 11]
    assert [line.get_color() for line in closed.lines] == [plots.DENSE] * 2 + [plots.SPARSE] * 2
    assert texts(closed) == ["1", "4"], "one number for all models"
    assert texts(opened) == ["50"]
    assert closed.get_yscale() == "log"


def test_a_load_of_one_kind_has_one_panel_and_one_without_answers_none():
    table = load_rows()
    assert len(plots.plot_load(table[table.loop == "open"], "a server").axes) == 1
    with pytest.raises(InputError, match="no latency to draw"):
        plots.plot_load(load_rows(answered=0), "a server")


def differences(*half_inputs_high: float) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "network": f"network {place}",
                "retrained": -0.2, "retrained_low": -0.5, "retrained_high": 0.1,
                "half_inputs": high - 1, "half_inputs_low": high - 2, "half_inputs_high": high,
            }
            for place, high in enumerate(half_inputs_high)
        ]
    )  # fmt: skip


def test_what_2to4_costs_is_drawn_beside_the_control_that_must_lose():
    figure = plots.plot_accuracy_differences(differences(-3.0, 0.5))
    retrained, failing = figure.axes
    assert labels(retrained.get_yticklabels()) == ["network 0", "network 1"]
    for axis, mean, low, high in ((retrained, -0.2, -0.5, 0.1), (failing, -4.0, -5.0, -3.0)):
        sure, unsure = axis.containers
        assert sure.lines[0].get_xdata().tolist() == [pytest.approx(mean)]
        ((left, right),) = sure.lines[2][0].get_segments()
        assert [left[0], right[0]] == pytest.approx([low, high])
        assert unsure.lines[0].get_alpha() < sure.lines[0].get_alpha()
    with pytest.raises(InputError):
        plots.plot_accuracy_differences(differences())


def test_the_length_of_a_retraining_is_drawn_for_each_network():
    rows = pd.DataFrame(
        {
            "network": ["a", "b", "a"],
            "percent": [100, 5, 5],
            "difference": [0.0, -4.0, -2.0],
            "low": [0.0, -5.0, -2.5],
            "high": [0.0, -3.0, -1.5],
        }
    )
    figure = plots.plot_retraining_length(rows)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["a", "b"]
    (line,) = (container.lines[0] for container in figure.axes[0].containers)
    assert line.get_xdata().tolist() == [5, 100]
    assert line.get_ydata().tolist() == [-2, 0]
    with pytest.raises(InputError):
        plots.plot_retraining_length(rows.iloc[:0])
