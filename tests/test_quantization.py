from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from int8_cases import PRODUCTS, images, residual_file, weight
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

from helpers.errors import InputError, WriteError
from helpers.inference import quantization
from helpers.inference.activation_ranges import activation_ranges
from helpers.inference.engine import build_engine
from helpers.inference.int8_placement import tensorrt_int8_faults
from helpers.inference.onnx_session import open_session
from helpers.inference.quantization import quantize_for_cpu, quantize_for_tensorrt
from helpers.metrics import max_relative_error
from helpers.sparsity import load_compressed, save_compressed
from helpers.sparsity.onnx_file import OnnxFile
from helpers.sparsity.verify import verify_onnx

BOTH = pytest.mark.parametrize("quantise", [quantize_for_tensorrt, quantize_for_cpu])
SHAPE = (1, 28, 28)


def operators(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def initializer(path, name):
    tensors = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    return numpy_helper.to_array(tensors[name])


def logits(path, data):
    session = open_session(path)
    half = session.get_inputs()[0].type == "tensor(float16)"
    feeds = {"images": data.astype(np.float16) if half else data}
    return torch.from_numpy(session.run(None, feeds)[0].astype(np.float32))


@pytest.mark.parametrize("half", [False, True])
def test_a_file_for_tensorrt_is_int8_where_it_should_be(tmp_path, half):
    source, path = residual_file(tmp_path / "net.onnx", half=half), tmp_path / "q.onnx"
    result = quantize_for_tensorrt(source, path, images(), expect_sparse=True)
    assert set(result.products) == set(PRODUCTS)
    assert result.left_float == {}
    assert tensorrt_int8_faults(path) == []
    # images, stem and its ReLU, the second branch, the last ReLU, the pooled features
    assert operators(path)["QuantizeLinear"] == 5
    assert operators(path)["DequantizeLinear"] == 5 + 4
    assert initializer(path, "stem.w_quantized").dtype == np.int8
    kind = np.float16 if half else np.float32
    assert initializer(path, "stem.w_scale").dtype == kind
    assert initializer(path, "stem.b").dtype == kind
    fresh = images(64, seed=5)
    error = max_relative_error(logits(path, fresh), logits(source, fresh))
    assert 0 < error < 0.1
    assert 0 < result.max_relative_error < 0.1


def test_the_scale_of_a_channel_takes_its_largest_weight_to_127(tmp_path):
    source, path = residual_file(tmp_path / "net.onnx"), tmp_path / "q.onnx"
    quantize_for_tensorrt(source, path, images())
    dense, stored = initializer(source, "main.w"), initializer(path, "main.w_quantized")
    scale = np.abs(dense).max(axis=(1, 2, 3)) / 127
    np.testing.assert_allclose(initializer(path, "main.w_scale"), scale, rtol=1e-6)
    np.testing.assert_array_equal(stored, np.rint(dense / scale[:, None, None, None]))
    assert (stored[dense == 0] == 0).all()


def test_a_file_for_the_cpu_has_unsigned_activations_and_wide_groups(resnext_files, tmp_path):
    data = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "q.onnx"
    result = quantize_for_cpu(resnext_files["fp32"], path, data)
    assert len(result.widened) == 3
    groups = {node: [shape[1], group] for node, shape, group in zip(
        *(verify_onnx(path)[name] for name in ("node", "shape", "groups")), strict=True
    )}  # fmt: skip
    assert all(groups[name][0] >= 32 for name in result.widened)
    zero_points = [
        numpy_helper.to_array(tensor)
        for tensor in onnx.load(path).graph.initializer
        if tensor.name.endswith("_zero_point") and len(tensor.dims) == 0
    ]
    assert {array.dtype for array in zero_points} == {np.dtype(np.uint8)}
    fresh = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1)).numpy()
    assert max_relative_error(logits(path, fresh), logits(resnext_files["fp32"], fresh)) < 0.2


@BOTH
def test_one_calibration_serves_both_files(tmp_path, quantise):
    source = residual_file(tmp_path / "net.onnx")
    ranges = activation_ranges(source, images())
    quantise(source, tmp_path / "ranges.onnx", ranges)
    quantise(source, tmp_path / "images.onnx", images())
    first, second = ((tmp_path / f"{name}.onnx").read_bytes() for name in ("ranges", "images"))
    assert first == second


@BOTH
def test_layers_stay_float_by_choice(tmp_path, quantise):
    source, path = residual_file(tmp_path / "net.onnx"), tmp_path / "q.onnx"
    result = quantise(source, path, images(), first=False, last=False, exclude=["dow*"])
    assert result.products == ("main",)
    assert result.left_float == {
        "down": "excluded",
        "stem": "the first product",
        "fc": "the last product",
    }
    stored = {tensor.name for tensor in onnx.load(path).graph.initializer}
    assert {"stem.w", "down.w", "fc.w", "main.w_quantized"} <= stored
    assert "main.w" not in stored


@BOTH
def test_a_percentile_narrows_the_scales(tmp_path, quantise):
    source, data = residual_file(tmp_path / "net.onnx"), images(64)
    data[0, 0, 0, 0] = 1000
    scales = []
    for name, percentile in (("all", None), ("most", 99.9)):
        quantise(source, tmp_path / f"{name}.onnx", data, percentile=percentile)
        scales.append(float(initializer(tmp_path / f"{name}.onnx", "images_scale")))
    assert scales[1] < scales[0] / 10


@BOTH
def test_nodes_without_names_are_quantised(tmp_path, quantise):
    source = residual_file(tmp_path / "net.onnx", named=False)
    result = quantise(source, tmp_path / "q.onnx", images())
    assert len(set(result.products)) == 4


# --- 2:4 ---


@pytest.mark.parametrize("opset", range(13, 24))
def test_2to4_is_proven_behind_quantisation_in_every_opset(tmp_path, opset):
    for sparse in (True, False):
        source = residual_file(tmp_path / "net.onnx", opset, sparse=sparse)
        quantize_for_tensorrt(source, tmp_path / "q.onnx", images())
        table = verify_onnx(tmp_path / "q.onnx").set_index("node")
        assert table.judged.all()
        assert table.eligible[list(PRODUCTS)].all()
        assert (table.is_2to4 == sparse).all()
    assert onnx.load(tmp_path / "q.onnx").opset_import[0].version == opset


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("activations", [QuantType.QUInt8, QuantType.QInt8])
@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
def test_2to4_is_proven_in_files_of_onnxruntimes_own_quantiser(tmp_path, opset, activations, form):
    class Reader:
        batches = iter([{"images": images()}])

        def get_next(self):
            return next(self.batches, None)

    for sparse in (True, False):
        source = residual_file(tmp_path / "net.onnx", opset, sparse=sparse)
        Reader.batches = iter([{"images": images()}])
        quantize_static(
            source, tmp_path / "q.onnx", Reader(), form, per_channel=True,
            activation_type=activations, weight_type=QuantType.QInt8,
        )  # fmt: skip
        table = verify_onnx(tmp_path / "q.onnx")
        assert len(table) == 4
        assert table.judged.all()
        assert table.eligible.all()
        assert (table.is_2to4 == sparse).all()


def test_a_dense_network_is_refused_where_a_sparse_one_is_expected(tmp_path):
    source = residual_file(tmp_path / "net.onnx", sparse=False)
    with pytest.raises(InputError, match=r"4 of 4 eligible weights are dense, the first stem\.w"):
        quantize_for_tensorrt(source, tmp_path / "q.onnx", images(), expect_sparse=True)
    quantize_for_tensorrt(source, tmp_path / "q.onnx", images())


def test_the_compressed_file_restores_every_tensor(resnext_files, tmp_path):
    data = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0))
    quantize_for_tensorrt(resnext_files["fp16"], tmp_path / "q.onnx", data)
    file = OnnxFile(tmp_path / "q.onnx")
    state = {
        tensor.name: torch.from_numpy(np.array(file.array(tensor)))
        for tensor in file.model.graph.initializer
    }
    names = save_compressed(state, tmp_path / "q.safetensors")
    assert len(names) == 12
    assert all(state[name].dtype == torch.int8 for name in names)
    restored = load_compressed(tmp_path / "q.safetensors")
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], state[name]) for name in state)


def test_tensorrt_rtx_builds_the_file_without_a_gpu(resnext_files, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    data = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0))
    quantize_for_tensorrt(resnext_files["fp16"], tmp_path / "q.onnx", data)
    build_engine(tmp_path / "q.onnx", tmp_path / "q.engine", SHAPE, (1, 8, 32))
    build_engine(resnext_files["fp16"], tmp_path / "half.engine", SHAPE, (1, 8, 32))
    int8, half = ((tmp_path / f"{name}.engine").stat().st_size for name in ("q", "half"))
    assert int8 < half


# --- what cannot be quantised ---


def transposed(tmp_path):
    """A file with an operator that has no INT8 form here."""
    more = (
        helper.make_node("ConvTranspose", ["jr", "up.w"], ["out"], "up"),
        helper.make_node("Identity", ["logits"], ["same"], "same"),
    )
    stored = {"up.w": weight(16, 4, 3, 3, seed=9)}
    return residual_file(tmp_path / "net.onnx", more=more, stored=stored)


def computed(tmp_path):
    """A file that computes a weight from a constant."""
    more = (
        helper.make_node("Transpose", ["t.w"], ["t.t"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["logits", "t.t"], ["out"], "turned"),
    )
    stored = {"t.w": weight(8, 10, seed=9, sparse=False)}
    return residual_file(tmp_path / "net.onnx", more=more, stored=stored)


def quantised(tmp_path):
    residual_file(tmp_path / "float.onnx")
    quantize_for_tensorrt(tmp_path / "float.onnx", tmp_path / "net.onnx", images())
    (tmp_path / "float.onnx").unlink()
    return tmp_path / "net.onnx"


def without_products(tmp_path):
    model = onnx.load(residual_file(tmp_path / "net.onnx"))
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Relu", ["images"], ["logits"], "relu"))
    onnx.save(model, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def old(tmp_path):
    return residual_file(tmp_path / "net.onnx", opset=12)


def missing(tmp_path):
    return tmp_path / "none.onnx"


REFUSED = {
    transposed: "ConvTranspose up of .* cannot be quantised: only Conv, Gemm and MatMul can",
    computed: "MatMul turned of .* cannot be quantised: its weight is not stored as it is used",
    quantised: r"is quantised already, as its \w+Linear .* shows",
    without_products: "has no product to quantise",
    old: "has opset 12, and INT8 in FP32 files needs 13 or newer",
    missing: "cannot be read: No such file",
}


@BOTH
@pytest.mark.parametrize("make", REFUSED)
def test_what_cannot_be_quantised_is_one_sentence_and_nothing_is_written(tmp_path, make, quantise):
    source = make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=REFUSED[make]):
        quantise(source, tmp_path / "q.onnx", images())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@BOTH
def test_an_excluded_operator_stays_float(tmp_path, quantise):
    result = quantise(transposed(tmp_path), tmp_path / "q.onnx", images(), exclude=["up"])
    assert result.left_float == {"up": "excluded"}
    assert "up.w" in {tensor.name for tensor in onnx.load(tmp_path / "q.onnx").graph.initializer}


@BOTH
def test_arguments_that_do_not_fit_leave_the_old_file(tmp_path, quantise):
    source, target = residual_file(tmp_path / "net.onnx"), tmp_path / "q.onnx"
    target.write_text("old")
    bad = images()
    bad[0] = np.nan
    other = residual_file(tmp_path / "other.onnx", named=False)
    renamed = onnx.load(other)
    for node in renamed.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{name}2" if name in ("s", "sr") else name for name in names]
    onnx.save(renamed, other)
    ranges = activation_ranges(other, images())
    calls = [
        (bad, {}, "not finite"),
        (images(0), {}, "There are 0 calibration images"),
        (np.zeros((9, 1, 28, 28), np.float32), {}, "which does not fit the input"),
        (ranges, {}, "The calibration is of another network: it has no range of sr"),
        (activation_ranges(source, images()), {"percentile": 99}, "are measured already"),
        (images(), {"exclude": ["nothing*"]}, r"Nothing in .* matches 'nothing\*'"),
        (images(), {"exclude": ["*"]}, "has no product to quantise"),
    ]
    for data, options, complaint in calls:
        with pytest.raises(InputError, match=complaint):
            quantise(source, target, data, **options)
        assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 3


@BOTH
def test_the_source_is_not_overwritten(tmp_path, quantise):
    source = residual_file(tmp_path / "net.onnx")
    with pytest.raises(InputError, match="is the file to read; write to another one"):
        quantise(source, source, images())


@BOTH
def test_a_folder_that_is_a_file_is_one_sentence(tmp_path, quantise):
    source = residual_file(tmp_path / "net.onnx")
    with pytest.raises(WriteError, match="part of its path is a file"):
        quantise(source, source / "q.onnx", images())


def test_an_fp16_file_is_refused_for_the_cpu(tmp_path):
    with pytest.raises(InputError, match="is in FP16, which is slow on a CPU"):
        quantize_for_cpu(residual_file(tmp_path / "n.onnx", half=True), tmp_path / "q", images())


def test_an_old_fp16_file_is_refused_by_its_opset(tmp_path):
    source = residual_file(tmp_path / "n.onnx", 18, half=True)
    with pytest.raises(InputError, match="has opset 18, and INT8 in FP16 files needs 19"):
        quantize_for_tensorrt(source, tmp_path / "q.onnx", images())


def test_ranges_beyond_fp16_are_refused(tmp_path):
    source = residual_file(tmp_path / "n.onnx", half=True)
    with pytest.raises(InputError, match=r"The activation \w+ of .* reaches .*, too large"):
        quantize_for_tensorrt(source, tmp_path / "q.onnx", 1e6 * np.sign(images()))


def test_wider_groups_that_compute_something_else_are_refused(tmp_path, monkeypatch, resnext_files):
    right = quantization.widen_groups_

    def wrong(model):
        widened = right(model)
        (tensor,) = (t for t in model.graph.initializer if t.name == "fc.weight")
        tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), tensor.name))
        return widened

    monkeypatch.setattr(quantization, "widen_groups_", wrong)
    data = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="computes something else with wider groups"):
        quantize_for_cpu(resnext_files["fp32"], tmp_path / "q.onnx", data)
    assert not list(tmp_path.iterdir())
