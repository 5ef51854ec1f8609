"""Compare the ONNX verifier with what a runtime computes, on thousands of random graphs.

Hypothesis draws graphs: operators of ONNX and ONNX Runtime, opsets, weights behind
transpositions, reshapes, slices, casts and quantisation, shared and external constants. The
reference knows nothing of how a weight is stored: ONNX Runtime multiplies by each unit vector in
turn, with its optimisations off, and so tells each number of the weight that really takes part;
plain loops look for the pattern in it. Writes `benchmarks/results/verify_fuzz.json`.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from hypothesis import strategies as st
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from helpers import machine
from helpers.files import write_json
from helpers.sparsity import verify_onnx

SEED = 0
RESULT = Path(__file__).parent / "results" / "verify_fuzz.json"
MICROSOFT = "com.microsoft"
OPSETS = (9, 10, 11, 13, 15, 17, 19, 21, 23)


@dataclass
class Product:
    """A node of a graph that multiplies, and what the verifier should say of it.

    `to_weight` brings the node's outputs for all unit vectors into the form (out, in, kernel).
    """

    node: str
    op: str
    to_weight: Callable[[np.ndarray], np.ndarray] | None = None
    output: str = ""
    groups: int = 1
    may_be_sparse: bool = True  # by its operator and the number of matrices
    judged: bool = True


@dataclass
class Case:
    """A graph, the feeds that show its weights, and its products.

    `feeds` holds one set of inputs for the positive unit vectors, one for the negative and one
    for zeros. `reference` is the graph in operators that ONNX Runtime has.
    """

    model: onnx.ModelProto
    reference: onnx.ModelProto
    feeds: list[dict[str, np.ndarray]]
    products: list[Product]
    external: bool


# --- drawing graphs ---


@dataclass
class Matrix:
    """A constant of a graph that is under construction."""

    name: str
    shape: tuple[int, ...]
    shifted: bool  # it was dequantised with a zero point that is not 0


@dataclass
class Builder:
    """Draws a graph, node by node."""

    draw: Any
    opset: int
    numbers: np.random.Generator
    nodes: list[NodeProto] = field(default_factory=list)
    functions: list[FunctionProto] = field(default_factory=list)
    tensors: list[TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    feeds: list[dict[str, np.ndarray]] = field(default_factory=lambda: [{}, {}, {}])
    products: list[Product] = field(default_factory=list)
    pool: list[Matrix] = field(default_factory=list)
    names: int = 0

    def choose(self, *options: Any) -> Any:
        """Draw one of several options."""
        return self.draw(st.sampled_from(options))

    def name(self, prefix: str) -> str:
        """Return a new name."""
        self.names += 1
        return f"{prefix}{self.names}"

    def add(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node of the constant part of the graph, and return its output."""
        output = self.name("t")
        self.nodes.append(helper.make_node(op, inputs, [output], domain=domain, **attributes))
        return output

    def store(self, value: Any, in_node: bool | None = None) -> str:
        """Store a number or a tensor, as an initializer or in a Constant node."""
        name = self.name("w")
        tensor = numpy_helper.from_array(np.array(value, order="C"), name)
        if self.draw(st.booleans()) if in_node is None else in_node:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.tensors.append(tensor)
        return name

    def probe(self, unit: np.ndarray, zero: int = 0, dtype: Any = np.float32) -> str:
        """Add an input of the graph that takes unit vectors."""
        name = self.name("x")
        for feeds, sign in zip(self.feeds, (1, -1, 0), strict=True):
            feeds[name] = (sign * unit + zero).astype(dtype)
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        dims = (
            list(unit.shape)
            if self.draw(st.booleans())
            else [f"{name}_{i}" for i in range(unit.ndim)]
        )
        self.inputs.append(helper.make_tensor_value_info(name, kind, dims))
        return name

    def multiply(
        self, op: str, inputs: list[str], product: Product, domain: str = "", **attributes: Any
    ) -> None:
        """Add a node that multiplies, whose output is one of the graph."""
        product.output = self.name("y")
        node = helper.make_node(
            op, inputs, [product.output], product.node, domain=domain, **attributes
        )
        if self.choose(True, False, False, False):
            self.nodes.append(self.in_function(node))
        else:
            self.nodes.append(node)
        integer = op in ("ConvInteger", "MatMulInteger")
        kind = TensorProto.INT32 if integer else TensorProto.FLOAT
        kind = TensorProto.UINT8 if op.startswith("QLinear") else kind
        # TensorRT and ONNX Runtime load outputs without a shape.
        self.outputs.append(helper.make_tensor_value_info(product.output, kind, None))
        self.products.append(product)

    def in_function(self, node: NodeProto) -> NodeProto:
        """Put a node into a local function, and return its call."""
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        formal = [f"in{place}" for place in range(len(node.input))]
        inner = NodeProto()
        inner.CopyFrom(node)
        inner.input[:] = formal
        inner.output[:] = ["out"]
        name = self.name("Function")
        function = helper.make_function("local", name, formal, ["out"], [inner], imports)
        self.functions.append(function)
        return helper.make_node(name, node.input, node.output, domain="local")

    # --- numbers ---

    def pattern(self, shape: tuple[int, ...], axis: int) -> np.ndarray:
        """Draw where a tensor is not zero: mostly 2:4 along an axis, or nearly so, or dense."""
        keep = np.ones(shape, bool)
        kind = self.choose("2:4", "2:4", "2:4", "one too many", "dense", "other axis", "random")
        if kind == "random":
            return self.numbers.random(shape) < 0.6
        if kind == "dense":
            return keep
        if kind == "other axis":
            axis = self.draw(st.integers(0, len(shape) - 1))
        along = np.moveaxis(keep, axis, -1)
        for lane in range(0, shape[axis], 4):
            group = along[..., lane : lane + 4]
            order = self.numbers.random(group.shape).argsort(-1)
            group[...] = order < 2
        if kind == "one too many" and not keep.all():
            places = np.argwhere(~keep)
            keep[tuple(self.numbers.choice(places))] = True
        return keep

    def floats(self, keep: np.ndarray) -> np.ndarray:
        """Return numbers of magnitudes from 0.5 to 2 where `keep` is true."""
        values = self.numbers.uniform(0.5, 2, keep.shape) * self.numbers.choice([-1, 1], keep.shape)
        return np.where(keep, values, 0).astype(np.float32)

    def integers(self, keep: np.ndarray, zero: Any, dtype: Any, largest: int) -> np.ndarray:
        """Return integers that are `zero` where `keep` is false."""
        signs = self.numbers.choice([-1, 1], keep.shape)
        values = self.numbers.integers(1, largest + 1, keep.shape) * signs
        if np.dtype(dtype).name.startswith("u") and not np.any(zero):
            values = np.abs(values)
        return (np.where(keep, values, 0) + zero).astype(dtype)

    # --- constants that are computed from constants ---

    def constant(self, keep: np.ndarray) -> Matrix:
        """Add nodes that compute an FP32 constant from what is stored."""
        kind = self.choose("float", "float", "qdq", "qat")
        if kind == "float" or self.opset < 10:
            made = Matrix(self.moved(self.floats(keep), 3), keep.shape, shifted=False)
        elif kind == "qdq":
            made = self.dequantised(keep)
        else:
            made = self.quantised_and_back(keep)
        if self.choose(True, False, False):
            made.name = self.add("Identity", made.name)
        self.pool.append(made)
        return made

    def moved(self, target: np.ndarray, depth: int) -> str:
        """Add nodes that end in `target`, apart from factors."""
        if depth == 0 or self.choose(True, False, False, False):
            return self.store(target)
        step = self.choose(
            "transpose", "reshape", "unsqueeze", "cast", "slice", "concat", "mul", "gather",
            "identity", "product", "add",
        )  # fmt: skip
        if step == "transpose":
            order = self.draw(st.permutations(range(target.ndim)))
            below = self.moved(target.transpose(np.argsort(order)), depth - 1)
            return self.add("Transpose", below, perm=list(order))
        if step == "reshape":
            below = self.moved(target.reshape(target.shape[0], -1), depth - 1)
            return self.add("Reshape", below, self.store(np.array(target.shape)))
        if step == "unsqueeze":
            below = self.moved(target[None], depth - 1)
            if self.opset < 13:
                return self.add("Squeeze", below, axes=[0])
            return self.add("Squeeze", below, self.store(np.array([0])))
        if step == "cast":
            stored = target.astype(self.choose(np.float16, np.float64))
            return self.add("Cast", self.moved(stored, 0), to=TensorProto.FLOAT)
        if step == "slice":
            axis = self.draw(st.integers(0, target.ndim - 1))
            more = np.concatenate([np.ones_like(target), target], axis)
            size = target.shape[axis]
            below = self.moved(more, depth - 1)
            if self.opset < 10:
                return self.add("Slice", below, axes=[axis], starts=[size], ends=[2 * size])
            places = [self.store(np.array([each])) for each in (size, 2 * size, axis)]
            return self.add("Slice", below, *places)
        if step == "concat":
            axis = self.draw(st.integers(0, target.ndim - 1))
            at = self.draw(st.integers(0, target.shape[axis]))
            parts = [part for part in np.split(target, [at], axis) if part.size]
            return self.add("Concat", *(self.moved(p, depth - 1) for p in parts), axis=axis)
        if step == "gather":
            axis = self.draw(st.integers(0, target.ndim - 1))
            order = self.numbers.permutation(target.shape[axis])
            below = self.moved(np.take(target, np.argsort(order), axis), depth - 1)
            return self.add("Gather", below, self.store(order), axis=axis)
        if step == "mul":
            factor = np.float32(self.choose(0.5, -3, 0))
            return self.add("Mul", self.moved(target, depth - 1), self.store(factor))
        if step == "add":
            return self.add("Add", self.moved(target, depth - 1), self.store(np.zeros(1, "f4")))
        if step == "product" and target.ndim == 2:
            return self.product_of_constants(self.moved(target, depth - 1), target.shape[1])
        return self.add("Identity", self.moved(target, depth - 1))

    def product_of_constants(self, left: str, size: int) -> str:
        """Add a product whose factors are both constants, which is no product at run time."""
        node = self.name("constant")
        output = self.name("t")
        right = self.store(np.eye(size, dtype=np.float32))
        self.nodes.append(helper.make_node("MatMul", [left, right], [output], node))
        self.products.append(Product(node, "MatMul", may_be_sparse=False))
        return output

    def scales(self, shape: tuple[int, ...]) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw the scales of a tensor, and the attributes that say where they apply."""
        kind = self.choose("tensor", "axis", "blocks")
        if kind == "blocks" and self.opset >= 21 and len(shape) > 1:
            axis, size = self.draw(st.integers(0, len(shape) - 1)), self.choose(2, 4, 16)
            blocks = [*shape]
            blocks[axis] = -(-shape[axis] // size)
            return self.numbers.uniform(0.1, 1, blocks).astype("f4"), {
                "axis": axis,
                "block_size": size,
            }
        if kind == "axis" and self.opset >= 13:
            axis = self.draw(st.integers(0, len(shape) - 1))
            return self.numbers.uniform(0.1, 1, shape[axis]).astype("f4"), {"axis": axis}
        return np.full((), 0.25, "f4"), {}

    def dequantised(self, keep: np.ndarray) -> Matrix:
        """Add a weight that is stored quantised, and its dequantisation."""
        options = ["int8", "int8", "uint8", "microsoft"]
        options += ["fp8", "trt fp8"] if self.opset >= 19 else []
        options += ["int4", "uint4", "trt int4"] if self.opset >= 21 else []
        kind = self.choose(*options)
        if kind.endswith("fp8"):
            stored = self.store(self.floats(keep).astype(ml_dtypes.float8_e4m3fn))
            name = self.dequantize(kind, [stored, self.store(np.float32(0.5))])
            return Matrix(name, keep.shape, shifted=False)
        name = "int8" if kind == "microsoft" else kind.removeprefix("trt ")
        dtype = np.dtype(getattr(ml_dtypes, name) if name.endswith("int4") else name)
        scale, attributes = self.scales(keep.shape)
        if kind == "microsoft":  # one scale, and a zero point that cannot be left out
            scale, attributes = np.full((), 0.25, "f4"), {}
        zero = 0 if kind == "trt int4" else self.choose(0, 0, 0, 3)
        zeros = np.full(scale.shape, zero)
        if zero and self.draw(st.booleans()):
            zeros = np.asarray(self.numbers.integers(1, 4, scale.shape))
        spread = np.broadcast_to(_spread(zeros, keep.shape, attributes), keep.shape)
        values = self.integers(keep, spread, dtype, 3 if name.endswith("int4") else 100)
        inputs = [self.store(values), self.store(scale)]
        needed = zero or kind in ("uint8", "uint4", "microsoft")
        if needed or (kind != "trt int4" and self.draw(st.booleans())):
            inputs.append(self.store(zeros.astype(dtype)))
        return Matrix(self.dequantize(kind, inputs, **attributes), keep.shape, bool(zero))

    def dequantize(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        """Add the operator that dequantises a kind of number."""
        if kind.startswith("trt"):
            op = f"TRT_{kind.removeprefix('trt ').upper()}DequantizeLinear"
            return self.add(op, *inputs, domain="trt", **attributes)
        domain = MICROSOFT if kind == "microsoft" else ""
        return self.add("DequantizeLinear", *inputs, domain=domain, **attributes)

    def quantised_and_back(self, keep: np.ndarray) -> Matrix:
        """Add a weight in FP32 that is quantised and dequantised, as training leaves it."""
        below = self.moved(self.floats(keep), 2)
        scale, attributes = self.scales(keep.shape)
        scale = np.asarray(scale * self.choose(0.1, 4))  # the larger ones round some to zero
        kind = self.choose("int8", "trt fp8") if self.opset >= 19 else "int8"
        if kind == "trt fp8":
            inputs = [below, self.store(np.float32(self.choose(0.5, 2000)))]
            quantised = self.add("TRT_FP8QuantizeLinear", *inputs, domain="trt")
            return Matrix(self.dequantize(kind, [quantised, inputs[1]]), keep.shape, shifted=False)
        zero = self.choose(0, 0, 0, 5)
        inputs = [self.store(scale), self.store(np.full(scale.shape, zero, np.int8))]
        quantised = self.add("QuantizeLinear", below, *inputs, **attributes)
        name = self.add("DequantizeLinear", quantised, *inputs, **attributes)
        return Matrix(name, keep.shape, shifted=bool(zero))

    # --- products ---

    def shared(self, least: int = 2, most: int = 2) -> Matrix | None:
        """Draw a constant that the graph has already, if one has that many dimensions."""
        fitting = [each for each in self.pool if least <= len(each.shape) <= most]
        return self.choose(*fitting) if fitting and self.choose(True, False, False) else None

    def channels(self) -> int:
        """Draw a number of input channels, mostly a multiple of four."""
        return self.choose(4, 8, 8, 12, 16, 3, 6)

    def conv(self, op: str = "Conv", domain: str = "") -> None:
        """Add a convolution."""
        groups = self.choose(1, 1, 1, 2)
        kernel = self.choose((1,), (3,), (1, 1), (2, 3))
        if op == "FusedConv":
            kernel = self.choose((1, 1), (2, 3))
        shape = (groups * self.choose(1, 2, 3), self.channels(), *kernel)
        weight = self.shared(3, 4) if groups == 1 and op == "Conv" else None
        weight = weight or self.constant(self.pattern(shape, 1))
        attributes: dict[str, Any] = {"group": groups} if groups > 1 else {}
        if op == "FusedConv":
            attributes["activation"] = "Relu"
        inputs = [self.probe(_units(weight.shape, groups)), weight.name]
        if op == "Conv" and self.draw(st.booleans()):
            inputs.append(self.store(self.floats(np.ones(weight.shape[0], bool))))
        product = Product(
            self.name("node"), op, _from_conv(weight.shape, groups), groups=groups,
            may_be_sparse=groups == 1, judged=not weight.shifted,
        )  # fmt: skip
        self.multiply(op, inputs, product, domain, **attributes)

    def gemm(self, op: str = "Gemm", domain: str = "") -> None:
        """Add a Gemm with the weight on either side."""
        left, transposed = self.draw(st.booleans()), self.draw(st.booleans())
        last = left != transposed  # whether the sum is over the last axis of the weight
        size = (self.choose(1, 3, 4), self.channels())
        weight = self.shared() or self.constant(
            self.pattern(size if last else size[::-1], int(last))
        )
        inputs = self.around(weight, left, last)
        attributes: dict[str, Any] = {"transA" if left else "transB": int(transposed)}
        if op == "FusedGemm":
            attributes["activation"] = "Relu"
        if self.opset < 11 or (op == "Gemm" and self.draw(st.booleans())):
            inputs.append(self.store(np.zeros(1, np.float32)))
        if self.draw(st.booleans()):
            attributes["alpha"] = 0.5
        product = Product(self.name("node"), op, _from_matrix(left), judged=not weight.shifted)
        self.multiply(op, inputs, product, domain, **attributes)

    def around(self, weight: Matrix, left: bool, last: bool) -> list[str]:
        """Return the inputs of a product with a weight on one side, unit vectors on the other."""
        unit = self.probe(np.eye(weight.shape[-1 if last else -2]))
        return [weight.name, unit] if left else [unit, weight.name]

    def matmul(self, op: str = "MatMul", domain: str = "") -> None:
        """Add a matrix product with the weight on either side, with or without batches."""
        left = self.draw(st.booleans())
        transposed = op == "FusedMatMul" and self.draw(st.booleans())
        last = left != transposed
        batch = self.choose((), (), (), (1,), (2,), (2, 3)) if op == "MatMul" else ()
        size = (self.choose(1, 3, 4), self.channels())
        weight = self.shared() if not batch else None
        if weight is None:
            shape = (*batch, *(size if last else size[::-1]))
            weight = self.constant(self.pattern(shape, len(shape) - (1 if last else 2)))
        attributes = {"transA" if left else "transB": int(transposed)} if transposed else {}
        product = Product(
            self.name("node"), op, _from_matrix(left), judged=not weight.shifted,
            may_be_sparse=not batch or (batch == (1,) and not left),
        )  # fmt: skip
        product.judged = product.judged or not product.may_be_sparse
        self.multiply(op, self.around(weight, left, last), product, domain, **attributes)

    def vector(self) -> None:
        """Add the product of rows with one vector."""
        left = self.draw(st.booleans())
        weight = self.constant(self.pattern((1, self.channels()), 1)[0])
        unit = self.probe(np.eye(weight.shape[0]))
        inputs = [weight.name, unit] if left else [unit, weight.name]
        product = Product(self.name("node"), "MatMul", lambda y: y[None], judged=not weight.shifted)
        self.multiply("MatMul", inputs, product)

    def quantised(self, shape: tuple[int, ...], axis: int) -> tuple[str, str, Any, int]:
        """Store an integer weight; return it, its zero point, their type, and that number."""
        dtype = np.dtype(self.choose(np.int8, np.uint8))
        zero = self.choose(0, 0, 5)
        values = self.integers(self.pattern(shape, axis), zero, dtype, 60)
        return self.store(values), self.store(np.asarray(zero, dtype)), dtype, zero

    def conv_integer(self) -> None:
        """Add a convolution of integers."""
        shape = (self.choose(1, 2, 3), self.channels(), *self.choose((1, 1), (2, 3)))
        weight, zero_point, _, zero = self.quantised(shape, 1)
        data = self.probe(_units(shape, 1), 100, np.uint8)
        inputs = [data, weight, self.store(np.uint8(100)), zero_point]
        product = Product(self.name("node"), "ConvInteger", _from_conv(shape, 1), judged=not zero)
        self.multiply("ConvInteger", inputs, product)

    def qlinear_conv(self) -> None:
        """Add a quantised convolution, with one scale or one for each output channel."""
        shape = (self.choose(1, 2, 3), self.channels(), *self.choose((1, 1), (2, 3)))
        weight, zero_point, dtype, zero = self.quantised(shape, 1)
        scale = np.float32(0.5)
        if self.draw(st.booleans()):
            scale = self.numbers.uniform(0.5, 1, shape[0]).astype("f4")
            zero_point = self.store(np.full(shape[0], zero, dtype))
        data = self.probe(_units(shape, 1), 100, np.uint8)
        one, middle = self.store(np.float32(1)), self.store(np.uint8(100))
        inputs = [data, one, middle, weight, self.store(scale), zero_point,
                  self.store(np.float32(0.5)), middle]  # fmt: skip
        product = Product(self.name("node"), "QLinearConv", _from_conv(shape, 1), judged=not zero)
        self.multiply("QLinearConv", inputs, product)

    def integer_matrix(self) -> tuple[str, str, int, int]:
        """Store an integer matrix; return it, its zero point, that number, and its inputs."""
        size = (self.channels(), self.choose(1, 3, 4))
        weight, zero_point, _, zero = self.quantised(size, 0)
        return weight, zero_point, zero, size[0]

    def matmul_integer(self) -> None:
        """Add a matrix product of integers."""
        weight, zero_point, zero, inputs_ = self.integer_matrix()
        data = self.probe(np.eye(inputs_), 100, np.uint8)
        inputs = [data, weight, self.store(np.uint8(100)), zero_point]
        product = Product(self.name("node"), "MatMulInteger", _from_matrix(False), judged=not zero)
        self.multiply("MatMulInteger", inputs, product)

    def qlinear_matmul(self) -> None:
        """Add a quantised matrix product."""
        weight, zero_point, zero, inputs_ = self.integer_matrix()
        data = self.probe(np.eye(inputs_), 100, np.uint8)
        one, middle = self.store(np.float32(1)), self.store(np.uint8(100))
        half = self.store(np.float32(0.5))
        inputs = [data, one, middle, weight, half, zero_point, half, middle]
        product = Product(self.name("node"), "QLinearMatMul", _from_matrix(False), judged=not zero)
        self.multiply("QLinearMatMul", inputs, product)

    def dynamic(self) -> None:
        """Add a product of ONNX Runtime whose activations are quantised when it runs."""
        weight, zero_point, zero, inputs_ = self.integer_matrix()
        scale = self.store(np.float32(0.5))
        inputs = [self.probe(np.eye(inputs_)), weight, scale, zero_point]
        op = "DynamicQuantizeMatMul"
        product = Product(self.name("node"), op, _from_matrix(False), judged=not zero)
        self.multiply(op, inputs, product, MICROSOFT)

    def qgemm(self) -> None:
        """Add ONNX Runtime's quantised Gemm with an FP32 result."""
        weight, zero_point, zero, inputs_ = self.integer_matrix()
        data = self.probe(np.eye(inputs_), 100, np.uint8)
        one, middle = self.store(np.float32(1)), self.store(np.uint8(100))
        inputs = [data, one, middle, weight, self.store(np.float32(0.5)), zero_point]
        product = Product(self.name("node"), "QGemm", _from_matrix(False), judged=not zero)
        self.multiply("QGemm", inputs, product, MICROSOFT)

    def n_bits(self) -> None:
        """Add ONNX Runtime's product with a weight of four bits in blocks."""
        rows, columns, size = self.choose(2, 4), self.choose(16, 32, 40), self.choose(16, 32)
        blocks = -(-columns // size)
        zero = self.choose(8, 8, 5)
        values = np.full((rows, blocks * size), zero)
        keep = self.pattern((rows, columns), 1)
        values[:, :columns] = self.integers(keep, zero, np.int64, 4)
        packed = (values[:, ::2] | values[:, 1::2] << 4).astype(np.uint8)
        scale = self.numbers.uniform(0.1, 1, rows * blocks).astype("f4")
        inputs = [
            self.probe(np.eye(columns)),
            self.store(packed.reshape(rows, blocks, size // 2), in_node=False),
            self.store(scale, in_node=False),
        ]
        if zero != 8:
            bytes_ = -(-blocks // 2)
            inputs.append(self.store(np.full(rows * bytes_, zero * 17, np.uint8), in_node=False))
        product = Product(self.name("node"), "MatMulNBits", _from_matrix(False), judged=zero == 8)
        self.multiply(
            "MatMulNBits", inputs, product, MICROSOFT, K=columns, N=rows, bits=4, block_size=size
        )

    def conv_transpose(self) -> None:
        """Add a transposed convolution, which never runs sparse."""
        weight = self.constant(self.pattern((8, 4, 1, 1), 0))
        inputs = [self.probe(np.eye(8)[..., None, None]), weight.name]
        product = Product(self.name("node"), "ConvTranspose", may_be_sparse=False)
        self.multiply("ConvTranspose", inputs, product)

    def at_run_time(self) -> None:
        """Add a product whose second factor depends on the run."""
        keep = self.pattern((8, 4), 0)
        judged = self.draw(st.booleans())
        if judged:
            factor = self.add("Relu", self.probe(np.eye(8)))
        else:
            shape = self.name("shape")
            self.inputs.append(helper.make_tensor_value_info(shape, TensorProto.INT64, [2]))
            for feeds in self.feeds:
                feeds[shape] = np.array([8, 4])
            factor = self.add("Reshape", self.constant(keep).name, shape)
        product = Product(self.name("node"), "MatMul", may_be_sparse=False, judged=judged)
        self.multiply("MatMul", [self.probe(np.eye(8)), factor], product)


def _spread(values: np.ndarray, shape: tuple[int, ...], attributes: dict[str, int]) -> np.ndarray:
    """Return zero points so that they broadcast against their weight."""
    if values.size == 1 and "block_size" not in attributes:
        return values.reshape(())
    axis = attributes["axis"]
    if "block_size" in attributes:
        return values.repeat(attributes["block_size"], axis).take(range(shape[axis]), axis)
    return values.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def _units(shape: tuple[int, ...], groups: int) -> np.ndarray:
    """Return one image for each input channel and position of a kernel, all others zero."""
    image = (groups * shape[1], *shape[2:])
    return np.eye(int(np.prod(image))).reshape(-1, *image)


def _from_conv(shape: tuple[int, ...], groups: int) -> Callable[[np.ndarray], np.ndarray]:
    def to_weight(outputs: np.ndarray) -> np.ndarray:
        whole = outputs.reshape(len(outputs), shape[0]).T.reshape(shape[0], groups * shape[1], -1)
        rows = shape[0] // groups  # each group of them sums over its own channels
        return np.stack([
            whole[row, row // rows * shape[1] : (row // rows + 1) * shape[1]]
            for row in range(shape[0])
        ])  # fmt: skip

    return to_weight


def _from_matrix(left: bool) -> Callable[[np.ndarray], np.ndarray]:
    def to_weight(outputs: np.ndarray) -> np.ndarray:
        rows = outputs if left else outputs.swapaxes(-1, -2)
        return rows.reshape(-1, rows.shape[-1])

    return to_weight


@st.composite
def cases(draw: Any) -> Case:
    """Draw a graph of one to three products and what is computed from constants for them."""
    opset = draw(st.sampled_from(OPSETS))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    builder = Builder(draw, opset, numbers)
    kinds: list[Callable[[], None]] = [
        builder.conv, builder.conv, builder.gemm, builder.matmul, builder.matmul, builder.vector,
        builder.conv_transpose, builder.at_run_time, builder.n_bits, builder.qgemm,
        lambda: builder.conv("FusedConv", MICROSOFT),
        lambda: builder.gemm("FusedGemm", MICROSOFT),
        lambda: builder.matmul("FusedMatMul", MICROSOFT), builder.dynamic,
    ]  # fmt: skip
    if opset >= 10:
        kinds += [
            builder.conv_integer, builder.matmul_integer, builder.qlinear_conv,
            builder.qlinear_matmul,
        ]  # fmt: skip
    for _ in range(draw(st.integers(1, 3))):
        draw(st.sampled_from(kinds))()
    graph = helper.make_graph(
        builder.nodes, "graph", builder.inputs, builder.outputs, builder.tensors
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    imports.append(helper.make_opsetid("local", 1))
    model = helper.make_model(
        graph, opset_imports=imports, ir_version=10, functions=builder.functions
    )
    return Case(
        model, _for_onnxruntime(model), builder.feeds, builder.products, draw(st.booleans())
    )


def _for_onnxruntime(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with TensorRT's operators in those of ONNX that compute the same."""
    reference = onnx.ModelProto()
    reference.CopyFrom(model)
    for node in reference.graph.node:
        if node.domain != "trt":
            continue
        node.domain = ""
        node.op_type = node.op_type.removeprefix("TRT_FP8").removeprefix("TRT_INT4")
        if node.op_type == "QuantizeLinear":
            node.attribute.append(
                helper.make_attribute("output_dtype", TensorProto.FLOAT8E4M3FN)
            ) if model.opset_import[0].version >= 21 else None
            zero = np.zeros((), ml_dtypes.float8_e4m3fn)
            reference.graph.initializer.append(numpy_helper.from_array(zero, f"{node.output[0]}_z"))
            node.input.append(f"{node.output[0]}_z")
    return reference


# --- the reference ---


def weights_by_probing(case: Case, folder: Path) -> dict[str, np.ndarray]:
    """Return where the weight of each product is not zero, (out, in, kernel), by its node."""
    path = folder / "reference.onnx"
    onnx.save(case.reference, path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    runs = [dict(zip(names, session.run(names, feeds), strict=True)) for feeds in case.feeds]
    found = {}
    for product in case.products:
        if product.to_weight is not None:
            positive, negative, zero = (run[product.output].astype(float) for run in runs)
            found[product.node] = product.to_weight((positive != zero) | (negative != zero))
    return found


def is_2to4(nonzero: np.ndarray) -> bool:
    """Return whether every four input channels hold at most two non-zeros, one by one."""
    outputs, inputs = nonzero.shape[:2]
    kernel = nonzero.reshape(outputs, inputs, -1)
    return inputs % 4 == 0 and all(
        sum(bool(kernel[row, first + lane, place]) for lane in range(4)) <= 2
        for row in range(outputs)
        for first in range(0, inputs, 4)
        for place in range(kernel.shape[2])
    )


def verdicts(case: Case, folder: Path) -> tuple[list[tuple], list[tuple]]:
    """Return node, eligible, judged, 2:4 and zeros of each product: expected and found."""
    path = folder / "model.onnx"
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    data = folder / "weights.bin"
    data.unlink(missing_ok=True)
    if case.external:
        onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=0)
    else:
        onnx.save(model, path)
    truth = weights_by_probing(case, folder)
    table = verify_onnx(path)
    expected, found = [], []
    for product in case.products:
        rows = table[table.node == product.node]
        assert len(rows) == 1, f"{len(rows)} rows of {product.node}"
        row = rows.iloc[0]
        numbers: tuple = ()
        measured: tuple = ()
        may_be_sparse, judged = product.may_be_sparse and product.judged, product.judged
        if product.node in truth:
            nonzero = truth[product.node]
            share = round(100 * (1 - np.count_nonzero(nonzero) / nonzero.size), 2)
            numbers = (is_2to4(nonzero), share)
            measured = (bool(row.is_2to4), row.zeros)
            in_fours = nonzero.shape[1] % 4 == 0
            # A shape that cannot be sparse is verdict enough.
            judged = product.judged or not in_fours or product.groups > 1
            may_be_sparse = may_be_sparse and in_fours
        expected.append((product.node, product.op, may_be_sparse, judged, *numbers))
        found.append((row.node, row.op, bool(row.eligible), bool(row.judged), *measured))
    assert len(table) == len(case.products), "a row of no product"
    return expected, found


def verdict_of(row: tuple) -> str:
    """Return the verdict on a product in words."""
    _, _, eligible, judged, *numbers = row
    if not judged:
        return "not judged"
    return "not eligible" if not eligible else "2:4" if numbers[0] else "dense"


def main() -> None:
    """Compare on as many graphs as asked for, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", type=int, default=5000, help="how many")
    parser.add_argument("--out", type=Path, default=RESULT, help="the file of the result")
    arguments = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    opsets: Counter[int] = Counter()
    operators: Counter[str] = Counter()
    graphs = 0

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=arguments.graphs, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(cases())
    def compare(case: Case) -> None:
        nonlocal graphs
        with tempfile.TemporaryDirectory() as folder:
            expected, found = verdicts(case, Path(folder))
        assert expected == found
        graphs += 1
        opsets[case.model.opset_import[0].version] += 1
        counts.update((row[1], verdict_of(row)) for row in found)
        operators.update(node.op_type for node in case.model.graph.node if not node.name)

    compare()
    by_operator: dict[str, dict[str, int]] = {}
    for (op, verdict), count in sorted(counts.items()):
        by_operator.setdefault(op, {})[verdict] = count
    result = {
        "what": "random graphs on which the ONNX verifier and ONNX Runtime, probed with unit "
        "vectors, agree; every disagreement stops the run",
        "command": f"python benchmarks/verify_fuzz.py --graphs {arguments.graphs}",
        "seed": SEED,
        "graphs": graphs,
        "disagreements": 0,
        "products": sum(counts.values()),
        "by_operator": by_operator,
        "constants_computed_by": {
            op: count for op, count in sorted(operators.items()) if "Function" not in op
        },
        "by_opset": {str(opset): count for opset, count in sorted(opsets.items())},
        "hypothesis_version": hypothesis.__version__,
        **machine.provenance(),
    }
    write_json(arguments.out, result)
    print(f"{graphs} graphs, {sum(counts.values())} products: no disagreement")


if __name__ == "__main__":
    main()
