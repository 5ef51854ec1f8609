import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rates_cases import A100, LARGE, SMALL, product
from torch import nn

from helpers.errors import InputError
from helpers.measurement.advice import advise, advise_batches
from helpers.measurement.rates import AdviceError, Rates
from helpers.measurement.roofline import DATATYPES
from helpers.sparsity import sparsity_report
from helpers.sparsity.eligibility import why_not_cusparselt
from helpers.training.networks import create_model

IMAGE = (3, 224, 224)


@cache
def on_meta(name):
    with torch.device("meta"):
        return create_model(name, 1000)


@pytest.fixture
def resnext():
    return on_meta("resnext101_32x8d")


@pytest.fixture
def measured(recorded):
    """Rates of products over many sizes: slow small ones, sparse ones that gain when large."""
    rows = []
    for m in (49, 196, 784, 3136, 12544, 50176, 200704, 802816):
        for side in (64, 256, 1024, 2048):
            dense = 0.004 + m * side**2 / 1e11
            rows.append(product(m, side, side, dense, 0.005 + 0.6 * m * side**2 / 1e11))
    return Rates.from_record(recorded(*rows))


# What a model does.


@pytest.mark.parametrize("name", ["FP16", "INT8", "FP8"])
def test_layer_outputs_have_the_width_of_their_inputs(name):
    rates = replace(A100, best={name: (math.inf, math.inf)})
    numbers = 64 * 512 + 512 * 256 + 64 * 256
    assert rates.product_ms(64, 256, 512, name, False) == pytest.approx(
        DATATYPES[name].input_bytes * numbers / 2039e6
    )
    convolution = nn.Conv2d(4, 8, 3, bias=False)
    (dense,) = advise(convolution, rates, (4, 6, 6), datatype=name).layers.dense_ms
    numbers = 4 * 36 + 8 * 4 * 9 + 8 * 16
    assert dense == pytest.approx(DATATYPES[name].input_bytes * numbers / 2039e6)


def sizes(model, image_shape, batch=1):
    layers = advise(model, A100, image_shape, batch=batch).layers
    return layers.set_index("layer")[["m", "n", "k", "groups"]].T.to_dict("list")


def test_the_model_is_unchanged():
    model = create_model("resnext14_8x1d", 10).train()
    model.bn1.eval()
    before = {
        key: (value, value.clone()) for key, value in model.state_dict(keep_vars=True).items()
    }
    modes = [layer.training for layer in model.modules()]
    with pytest.raises(AdviceError, match="does not run on these shapes"):
        advise(model, A100, (3, 28, 28))
    advise(model, A100, (1, 28, 28), batch=64)
    assert [layer.training for layer in model.modules()] == modes
    assert torch.backends.mha.get_fastpath_enabled()
    for key, value in model.state_dict(keep_vars=True).items():
        assert value is before[key][0]
        assert torch.equal(value, before[key][1])


@pytest.mark.parametrize(
    "inputs",
    [{}, {"image_shape": (4, 6, 4), "example": torch.zeros(1)}],
)
def test_there_is_one_kind_of_input(inputs):
    with pytest.raises(InputError, match="either `image_shape`"):
        advise(nn.Linear(4, 4), A100, **inputs)


@pytest.mark.parametrize("batch", [0, -1, 1.5, True, "1", math.nan])
def test_a_batch_is_a_count(batch):
    with pytest.raises(InputError, match="There are no images of shape"):
        advise(nn.Linear(4, 4), A100, (4, 6, 4), batch=batch)


@pytest.mark.parametrize("shape", ["abc", (4, 0, 4), (4, -6, 4), (4, 6.0, 4), 4.5])
def test_sides_of_an_image_are_counts(shape):
    with pytest.raises(InputError, match="There are no images of shape"):
        advise(nn.Linear(4, 4), A100, shape)


@pytest.mark.parametrize(
    "example", [3, "abc", (), {}, torch.zeros(0, 4), torch.tensor(1.0), (2, torch.zeros(0, 4))]
)
def test_an_example_has_a_tensor_with_a_batch(example):
    with pytest.raises(InputError, match="`example` holds no tensor with a batch"):
        advise(nn.Linear(4, 4), A100, example=example)


def test_an_example_of_named_tensors_is_given_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(32, 16)

        def forward(self, *, scale, x):
            return self.inner(x) * scale

    x, scale = torch.zeros(8, 32), torch.zeros(())
    advice = advise(Named(), A100, example={"scale": scale, "x": x})
    assert advice.layers[["m", "n", "k"]].to_numpy().tolist() == [[8, 16, 32]]
    assert advice.batch == 8
    with pytest.raises(AdviceError, match=r"does not run on these shapes \(TypeError: "):
        advise(Named(), A100, example={"x": x})


@pytest.mark.parametrize("error", [IndexError, KeyError, AttributeError, ZeroDivisionError])
def test_the_error_of_a_model_is_quoted(error):
    class Failing(nn.Module):
        def forward(self, x):
            raise error("my words\nand more")

    words = f"does not run on these shapes \\({error.__name__}: '?my words"
    with pytest.raises(AdviceError, match=words):
        advise(Failing(), A100, example=torch.zeros(4))


def test_images_too_large_to_count_are_refused(resnext):
    for shape, batch in (((3, 10**9, 10**9), 1), (IMAGE, 10**17), (IMAGE, 10**30)):
        with pytest.raises(AdviceError, match="does not run on these shapes"):
            advise(resnext, A100, shape, batch=batch)


def test_a_model_that_depends_on_values_is_refused():
    class Curious(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(AdviceError, match="must not depend on the numbers"):
        advise(Curious(), A100, example=torch.zeros(4))
    for model, example in ((nn.Identity(), torch.zeros(4)), (nn.GELU(), torch.zeros(4, 0))):
        with pytest.raises(AdviceError, match="neither multiplies nor moves"):
            advise(model, A100, example=example)


# What to expect.


def test_without_memory_the_speed_up_is_the_ceiling_by_macs(resnext):
    report = sparsity_report(resnext, IMAGE, rules="cusparselt")
    advice = advise(resnext, replace(A100, bandwidth=math.inf), IMAGE, batch=8)
    assert advice.speedup == pytest.approx(report.ceiling, rel=1e-9)
    assert advice.rest_ms == 0
    assert set(advice.layers.bound) == {"arithmetic"}


def test_eligible_are_the_layers_that_the_sparse_engine_takes(resnext):
    layers = advise(resnext, A100, IMAGE).layers.set_index("layer")
    assert layers.sparse_ms.notna().sum() == 70
    assert len(sparsity_report(resnext, IMAGE).eligible) == 71  # TensorRT takes the last one too
    assert layers.reason["fc"] == why_not_cusparselt(1000, 2048) != ""
    assert layers.reason["layer1.0.conv2"] == "not a matrix product"
    assert math.isnan(layers.sparse_ms["layer1.0.conv2"])


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16"])
@settings(max_examples=8)  # each runs the network twice
@given(
    bandwidths=st.tuples(st.floats(1, 1e5), st.floats(1, 1e5)).map(sorted),
    batch=st.integers(1, 256),
)
def test_more_bandwidth_never_hurts_and_sparse_never_costs(name, bandwidths, batch):
    model = on_meta(name)
    slow, fast = (
        advise(model, replace(A100, bandwidth=each), IMAGE, batch=batch) for each in bandwidths
    )
    assert fast.dense_ms <= slow.dense_ms
    assert fast.sparse_ms <= slow.sparse_ms
    assert min(fast.speedup, slow.speedup) >= 1
    assert max(fast.speedup, slow.speedup) < 2


def test_where_kernels_cost_a_launch_batch_1_gains_less_than_256(resnext, measured):
    table = advise_batches(resnext, measured, IMAGE, (1, 256))
    assert table.columns.tolist() == ["batch", "dense_ms", "sparse_ms", "speedup"]
    assert table.batch.tolist() == [1, 256]
    one, many = table.speedup
    assert 1 <= one < many
    assert many == advise(resnext, measured, IMAGE, batch=256).speedup
    single = advise(resnext, measured, IMAGE, batch=1)
    assert (single.layers.bound == "launch").mean() > 0.5
    assert single.rest_ms >= 33 * measured.launch_ms  # one addition in each block


def test_the_parts_make_the_whole(resnext, measured):
    advice = advise(resnext, measured, IMAGE, batch=32)
    layers = advice.layers
    assert advice.dense_ms == pytest.approx(layers.dense_ms.sum() + advice.rest_ms)
    assert advice.sparse_ms == pytest.approx((layers.dense_ms / layers.gain).sum() + advice.rest_ms)
    assert ((layers.gain > 1) == (layers.reason == "")).all()


def test_a_slower_sparse_kernel_is_not_taken(recorded):
    rates = Rates.from_record(recorded(SMALL, LARGE))
    model = nn.Sequential(nn.Linear(512, 512), nn.GELU())
    small, large = (advise(model, rates, example=torch.zeros(m, 512)) for m in (64, 4096))
    assert small.speedup == 1
    assert small.layers.reason.tolist() == ["its sparse kernel is not faster"]
    assert small.layers.sparse_ms.item() > small.layers.dense_ms.item()
    assert large.layers.gain.item() == pytest.approx(0.02 / 0.0125)
    assert large.batch == 4096


def test_a_network_without_an_eligible_layer_gains_nothing_and_says_why():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 10))
    advice = advise(model, A100, (3, 8, 8))
    assert advice.speedup == 1.0
    assert "No layer gains 1 % or more: " in repr(advice)
    assert "1 x not a matrix product" in repr(advice)
    assert f"1 x {why_not_cusparselt(10, 576)}" in repr(advice)
    assert "layers that gain most" not in repr(advice) + advice._repr_html_()


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(32, 32))

    def forward(self, x):
        return x @ self.matrix


@pytest.mark.parametrize("model", [nn.LSTM(32, 32), nn.GRU(32, 32), Product()], ids=repr)
def test_arithmetic_outside_of_layers_is_reported(model):
    advice = advise(model, A100, example=torch.zeros(8, 4, 32))
    assert advice.layers.empty
    assert advice.speedup == 1
    assert "operations that are not counted as layers" in repr(advice)


def test_a_gain_below_one_percent_counts_as_none(recorded):
    rates = Rates.from_record(recorded(product(64, 512, 512, 0.01005, 0.01), LARGE))
    small, large = nn.Linear(512, 512), nn.Linear(512, 512)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = small, large

        def forward(self, few, many):
            return self.small(few), self.large(many)

    few, many = torch.zeros(64, 512), torch.zeros(4096, 512)
    alone = advise(small, rates, example=few)
    assert 1 < alone.speedup < 1.01
    assert "No layer gains 1 % or more: 1 x its sparse kernel gains less." in repr(alone)
    assert "layers that gain most" not in repr(alone)
    both = advise(Both(), rates, example=(few, many))
    assert both._largest_savings()["layers that gain most"].tolist() == ["large"]
    assert "is in work that gains less than 1 %: 0.01 ms in 1 of 2 layers, 0 ms outside" in repr(
        both
    )


def test_eight_bits_take_channels_in_thirty_twos():
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32))
    half, eight = (
        advise(model, A100, example=torch.zeros(4096, 48), datatype=name).layers.reason.tolist()
        for name in ("FP16", "INT8")
    )
    assert half[0] != eight[0] == "64 rows, 48 columns: not multiples of 32"
    assert eight[1] == half[1]


@pytest.mark.parametrize("name", ["TF32", "FP17"])
def test_a_datatype_without_2to4_is_refused(name):
    with pytest.raises(AdviceError, match=f"no 2:4 in '{name}'; choose one of FP16, BF16"):
        advise(nn.Linear(16, 16), A100, example=torch.zeros(1, 16), datatype=name)


def test_the_verdict_of_a_datasheet_states_its_condition():
    advice = advise(nn.Linear(1024, 1024), A100, example=torch.zeros(4096, 1024))
    assert advice.verdict == (
        f"{advice.speedup:.2f}x at batch 4096 in FP16 if dense and sparse kernels both reached the "
        "floors of the NVIDIA A100 80 GB SXM's datasheet; not compared with any measurement"
    )


def test_the_verdict_of_a_measured_gpu_states_its_largest_error(recorded):
    model, example = nn.Linear(512, 512), torch.zeros(4096, 512)
    silent = advise(model, Rates.from_record(recorded(LARGE)), example=example)
    said = "1.60x at batch 4096 in FP16 from products measured on NVIDIA X1"
    assert silent.verdict == f"{said}; never compared with a measurement end to end"
    checked = [
        {"network": "n", "datatype": "FP16", "batch": batch, "predicted": p, "measured": m}
        for batch, p, m in ((1, 1.0, 1.0), (64, 1.1, 1.25), (256, 1.21, 1.1))
    ]
    checked.append(checked[0] | {"datatype": "INT8", "measured": 10.0})  # says nothing of FP16
    rates = Rates.from_record(recorded(LARGE, checked=checked))
    assert advise(model, rates, example=example).verdict == (
        f"{said}; end to end such predictions were off by at most 12 % (3 measurements)"
    )
    rates = Rates.from_record(recorded(LARGE, checked=checked[:1]))
    assert advise(model, rates, example=example).verdict.endswith("at most 0 % (1 measurement)")


def idle_ms(advice):
    return advice.layers.dense_ms[advice.layers.gain < 1.01].sum()


def test_advice_shows_where_the_time_goes(resnext, measured):
    advice = advise(resnext, measured, IMAGE, batch=64)
    verdict, where, _, header, *rows = repr(advice).splitlines()
    assert verdict == advice.verdict
    assert f"Of {advice.dense_ms:.3g} ms dense" in where
    stuck = (advice.layers.gain < 1.01).sum()
    told = f"is in work that gains less than 1 %: {idle_ms(advice):.3g} ms in {stuck} of 105 layers"
    assert told in where
    assert where.endswith(
        "Convolutions that are not a matrix product count at the best dense rate."
    )
    assert header.split() == (
        "layers that gain most m x n x k dense, ms sparse, ms gain bound".split()
    )
    assert len(rows) == 5
    layers = advice.layers[advice.layers.reason == ""]
    best = layers.loc[(layers.dense_ms - layers.sparse_ms).idxmax()]
    assert rows[0].split()[0] == best.layer
    assert "<table" in advice._repr_html_()
    assert advice.verdict in advice._repr_html_()


# Calibrated rates.

CALIBRATED = Rates.calibrated("a100")


def test_the_interval_holds_the_speed_up_and_narrows_as_errors_average_out(resnext):
    advice = advise(resnext, CALIBRATED, IMAGE, batch=64)
    low, high = advice.interval
    assert 1 <= low < advice.speedup < high
    alone = advise(nn.Linear(1024, 1024), CALIBRATED, example=torch.zeros(8192, 1024))
    worst = CALIBRATED.errors("FP16").ratio["p80"]
    assert math.log(alone.interval[1] / alone.speedup) == pytest.approx(worst)
    assert math.log(high / advice.speedup) < worst
    slow, fast = advice.dense_interval
    assert slow < advice.dense_ms < fast


def test_other_rates_have_no_interval():
    advice = advise(nn.Linear(1024, 1024), A100, example=torch.zeros(64, 1024))
    assert all(map(math.isnan, (*advice.interval, *advice.dense_interval)))
    assert "low" not in advise_batches(nn.Conv2d(16, 16, 1), A100, (16, 8, 8), (1,))


def test_the_verdict_says_which_layers_stay_dense():
    class Layers(nn.Module):
        def __init__(self, *widths):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(width, width) for width in widths)

        def forward(self, *inputs):
            return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]

    def verdict(*widths, rows=8192):
        return advise(
            Layers(*widths), CALIBRATED, example=[torch.zeros(rows, width) for width in widths]
        ).verdict

    assert "; layers below 4096 channels stay dense. Expected " in verdict(32, 4096)
    assert "; every layer that can be sparse gains. Expected 1." in verdict(2048, 4096)
    assert "1.00x to " in verdict(32, rows=16)
    assert "; no layer gains. " in verdict(32, rows=16)
    assert verdict(10).startswith("1.00x to 1.00x at batch 8192 in FP16; no layer can be sparse")


def test_a_convolution_is_the_product_of_its_windows_where_tensorrt_runs_it():
    model = nn.Conv2d(512, 512, 3, padding=1, bias=False)
    dense = advise(model, CALIBRATED, (512, 28, 28), batch=32).layers
    assert dense.reason.tolist() == ["not a matrix product"]
    row = advise(model, CALIBRATED, (512, 28, 28), batch=32, rules="tensorrt").layers.iloc[0]
    assert row.dense_ms == dense.dense_ms.item()
    assert row.gain > 1.2
    windows = CALIBRATED.product_ms(32 * 28 * 28, 512, 9 * 512, "FP16", False, read=1 / 9)
    assert row.dense_ms == pytest.approx(windows)
    with pytest.raises(InputError, match="no rules 'none'"):
        advise(model, CALIBRATED, (512, 28, 28), rules="none")


def test_the_table_of_batches_has_the_intervals():
    table = advise_batches(nn.Conv2d(256, 256, 1), CALIBRATED, (256, 28, 28), (1, 64))
    assert table.columns.tolist() == [
        "batch", "dense_ms", "sparse_ms", "speedup", "low", "high",
    ]  # fmt: skip
    assert (table.low <= table.speedup).all()
