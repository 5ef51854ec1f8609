import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from helpers.sparsity import verify_onnx
from helpers.sparsity.onnx_constants import dequantize, quantize

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FP4 = np.dtype(ml_dtypes.float4_e2m1fn)


def by_onnx(op, *inputs, opset=23, **attributes):
    """Return what ONNX's reference computes."""
    names = [f"in{place}" for place in range(len(inputs))]
    values = [helper.make_value_info(name, onnx.TypeProto()) for name in (*names, "out")]
    node = helper.make_node(op, names, ["out"], **attributes)
    graph = helper.make_graph([node], "graph", values[:-1], values[-1:])
    feeds = dict(zip(names, inputs, strict=True))
    (result,) = ReferenceEvaluator(graph, opsets={"": opset}).run(None, feeds)
    return result


@given(
    dtype=st.sampled_from(["int8", "uint8", "int4", "uint4"]),
    axis=st.integers(0, 2),
    block_size=st.sampled_from([0, 2]),
    seed=st.integers(0, 1000),
)
def test_quantisation_is_that_of_onnx(dtype, axis, block_size, seed):
    numbers = np.random.default_rng(seed)
    values = numbers.normal(0, 20, (2, 4, 6)).astype(np.float32)
    dtype = np.dtype(getattr(ml_dtypes, dtype) if "4" in dtype else dtype)
    shape = (
        [4 if i == 9 else size for i, size in enumerate((2, 4, 6))]
        if block_size
        else [(2, 4, 6)[axis]]
    )
    if block_size:
        shape[axis] //= block_size
    scale = numbers.uniform(0.1, 2, shape).astype(np.float32)
    zero_point = numbers.integers(0, 7, shape).astype(dtype)
    options = {"axis": axis, "block_size": block_size}
    stored = quantize(values, scale, zero_point, dtype, **options)
    expected = by_onnx("QuantizeLinear", values, scale, zero_point, **options)
    assert stored.dtype == dtype
    assert np.array_equal(stored.astype(int), expected.astype(int))
    restored = dequantize(stored, scale, zero_point, **options)
    expected = by_onnx("DequantizeLinear", stored, scale, zero_point, **options)
    assert np.allclose(restored, expected)
    assert np.array_equal(restored == 0, expected == 0)


def test_fp8_saturates_and_rounds_small_numbers_to_zero():
    values = np.float32([1e6, -1e6, 1, 2.0**-9, 2.0**-11])
    stored = quantize(values, np.float32(1), None, FP8)
    assert stored.astype(np.float32).tolist() == [448, -448, 1, 2.0**-9, 0]


# Weights behind the quantisation of every opset and of TensorRT.


def pattern(sparse):
    values = np.ones((8, 32), np.float32)
    if sparse:
        values[:, 1::4] = values[:, 2::4] = 0
    return values


def verify(tmp_path, nodes, opset=21, **tensors):
    """Return the verdict on a Gemm by `v`, which the nodes compute from the tensors."""
    graph = helper.make_graph(
        [*nodes, helper.make_node("Gemm", ["x", "v", "b"], ["y"], name="gemm", transB=1)],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
        + [numpy_helper.from_array(np.zeros(8, np.float32), "b")],
    )
    imports = [helper.make_opsetid("", opset)]
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=11), path)
    (row,) = verify_onnx(path).to_dict("records")
    assert (row["node"], row["shape"]) == ("gemm", (8, 32))
    return row


def trt(op, inputs, outputs, **attributes):
    return helper.make_node(f"TRT_{op}", inputs, outputs, domain="trt", **attributes)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("opset", range(10, 24))
def test_a_quantised_weight_is_judged_in_every_opset(tmp_path, opset, sparse):
    dequantise = helper.make_node("DequantizeLinear", ["w", "s", "z"], ["v"])
    stored = pattern(sparse).astype(np.int8)
    row = verify(tmp_path, [dequantise], opset, w=stored, s=np.float32(0.1), z=np.int8(0))
    assert (row["eligible"], row["judged"], row["is_2to4"]) == (True, True, sparse)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("opset", [13, 18])
def test_scales_by_axis_apply_before_blocks_existed(tmp_path, opset, sparse):
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=0),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["v"], axis=0),
    ]
    scales = np.full(8, 0.1, np.float32)
    row = verify(tmp_path, nodes, opset, w=pattern(sparse), s=scales, z=np.zeros(8, np.int8))
    assert (row["eligible"], row["is_2to4"]) == (True, sparse)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kind", ["FP8", "INT4", "INT8"])
def test_tensorrts_quantisation_is_followed(tmp_path, kind, sparse):
    nodes = [
        trt(f"{kind}QuantizeLinear", ["w", "s"], ["q"]),
        trt(f"{kind}DequantizeLinear", ["q", "s"], ["v"]),
    ]
    row = verify(tmp_path, nodes, 17, w=pattern(sparse), s=np.float32(0.25))
    assert (row["eligible"], row["is_2to4"], row["weight"]) == (True, sparse, "w")


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_fp8_numbers_may_be_stored_as_bytes(tmp_path, as_bytes, sparse):
    stored = pattern(sparse).astype(FP8)
    nodes = [trt("FP8DequantizeLinear", ["w", "s"], ["v"])]
    stored = stored.view(np.uint8) if as_bytes else stored
    row = verify(tmp_path, nodes, w=stored, s=np.float32(0.25))
    assert (row["eligible"], row["is_2to4"]) == (True, sparse)


@pytest.mark.parametrize("sparse", [True, False])
def test_fp4_in_blocks_is_followed(tmp_path, sparse):
    """NVFP4: the scales of the blocks are quantised themselves."""
    nodes = [
        trt("FP4DynamicQuantize", ["w", "s"], ["q", "qs"], axis=-1, block_size=16),
        helper.make_node("DequantizeLinear", ["qs", "s"], ["ws"]),
        helper.make_node("DequantizeLinear", ["q", "ws"], ["v"], axis=-1, block_size=16),
    ]
    row = verify(tmp_path, nodes, 23, w=pattern(sparse), s=np.float32(0.01))
    assert (row["eligible"], row["is_2to4"], row["weight"]) == (True, sparse, "w")
    stored, scales = pattern(sparse).astype(FP4), np.ones((8, 2), FP8)
    row = verify(tmp_path, nodes[1:], 23, q=stored, qs=scales, s=np.float32(0.01))
    assert (row["eligible"], row["is_2to4"], row["weight"]) == (True, sparse, "q")


def test_what_fp4_rounds_to_zero_is_zero(tmp_path):
    values = pattern(sparse=True)
    values[values == 0] = 0.01  # a sixth of a quarter of the block's largest number is 0.04
    nodes = [
        trt("FP4DynamicQuantize", ["w", "s"], ["q", "qs"], axis=-1, block_size=16),
        helper.make_node("DequantizeLinear", ["qs", "s"], ["ws"]),
        helper.make_node("DequantizeLinear", ["q", "ws"], ["v"], axis=-1, block_size=16),
    ]
    assert verify(tmp_path, nodes, 23, w=values, s=np.float32(0.01))["is_2to4"]
    values[values == 0.01] = 0.06
    assert not verify(tmp_path, nodes, 23, w=values, s=np.float32(0.01))["is_2to4"]


@pytest.mark.parametrize("sparse", [True, False])
def test_mxfp8_is_followed(tmp_path, sparse):
    nodes = [
        trt("MXFP8DynamicQuantize", ["w"], ["q", "qs"], axis=-1, block_size=32),
        trt("MXFP8DequantizeLinear", ["q", "qs"], ["v"], axis=-1, block_size=32),
    ]
    row = verify(tmp_path, nodes, 23, w=pattern(sparse))
    assert (row["eligible"], row["is_2to4"]) == (True, sparse)


def test_a_zero_point_is_told_and_not_passed(tmp_path):
    """TensorRT takes weights with zero point 0 alone."""
    dequantise = helper.make_node("DequantizeLinear", ["w", "s", "z"], ["v"])
    shifted = pattern(sparse=True).astype(np.int8) + np.int8(3)
    row = verify(tmp_path, [dequantise], w=shifted, s=np.float32(0.1), z=np.int8(3))
    assert (row["eligible"], row["judged"], row["is_2to4"]) == (False, False, True)
    assert row["reason"].startswith("its zero point is not 0, and TensorRT takes no such weight")
    stored = pattern(sparse=True).astype(np.int8)  # zeros, which stand for -0.3
    row = verify(tmp_path, [dequantise], w=stored, s=np.float32(0.1), z=np.int8(3))
    assert (row["eligible"], row["judged"], row["is_2to4"]) == (False, False, False)


def test_scales_that_do_not_fit_are_not_judged(tmp_path):
    dequantise = helper.make_node("DequantizeLinear", ["w", "s"], ["v"], axis=0)
    path = tmp_path / "net.onnx"
    stored = pattern(sparse=True).astype(np.int8)
    with pytest.raises(AssertionError):  # the row has no shape
        verify(tmp_path, [dequantise], w=stored, s=np.ones(7, np.float32))
    (row,) = verify_onnx(path).to_dict("records")
    assert (row["eligible"], row["judged"]) == (False, False)
    assert row["reason"] == "DequantizeLinear before it cannot be evaluated"


@pytest.mark.parametrize("sparse", [True, False])
def test_a_shape_that_the_file_fixes_is_a_constant(tmp_path, sparse):
    """As ONNX Runtime folds it: the input has the shape (1, 32)."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Shape", ["r"], ["shape"], start=1),
        helper.make_node("Concat", ["rows", "shape"], ["both"], axis=0),
        helper.make_node("Reshape", ["w", "both"], ["v"]),
    ]
    row = verify(tmp_path, nodes, w=pattern(sparse).ravel(), rows=np.int64([8]))
    assert (row["weight"], row["is_2to4"]) == ("w", sparse)


@pytest.mark.parametrize("sparse", [True, False])
def test_an_operator_that_onnx_s_reference_lacks_is_computed(tmp_path, sparse):
    """Its reference has no Upsample; ONNX Runtime computes it."""
    upsample = helper.make_node("Upsample", ["w", "scales"], ["u"], mode="nearest")
    squeeze = helper.make_node("Squeeze", ["u"], ["v"], axes=[0])
    stored = pattern(sparse)[None, ::2]
    row = verify(tmp_path, [upsample, squeeze], 9, w=stored, scales=np.float32([1, 2, 1]))
    assert (row["weight"], row["is_2to4"]) == ("w", sparse)
