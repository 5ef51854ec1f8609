"""Quantise an ONNX file to INT8, for TensorRT or for ONNX Runtime on a CPU.

No file serves both. TensorRT takes signed numbers without zero points; ONNX Runtime is fast on a
CPU with unsigned activations only. So there are two functions, which can share one calibration:

- `quantize_for_tensorrt(source, target, images)`, best of an FP16 file;
- `quantize_for_cpu(source, target, images)`, of an FP32 file;
- `helpers.inference.activation_ranges.activation_ranges(source, images)`, whose result both take
  in place of the images;
- `helpers.inference.int8_placement.tensorrt_int8_faults(path)`, the check of a file.

Weights are symmetric with a scale for each output channel, so a zero stays a zero and 2:4 stays
2:4. Calibration and arithmetic are those of `onnxruntime.quantization`. Explained in
`08_int8.ipynb`.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto

from helpers.errors import InputError, first_line
from helpers.files import atomic_write, shown
from helpers.inference.activation_ranges import (
    ActivationRanges,
    Images,
    in_float32,
    load_float_model,
    model_ranges,
)
from helpers.inference.int8_placement import PRODUCTS, tensorrt_int8_faults, tensors_to_quantise
from helpers.inference.onnx_session import open_session
from helpers.inference.wide_groups import widen_groups_
from helpers.metrics import max_relative_error
from helpers.sparsity.onnx_file import STANDARD_DOMAINS
from helpers.sparsity.onnx_weights import NodeWeight, node_name, node_weights
from helpers.sparsity.verify import verify_onnx

_LARGEST_FP16 = 65504.0
_SAME = 1e-4  # the maximum relative error that another order of the same sums may cause
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass(frozen=True)
class QuantizedFile:
    """What was written, and what of it runs in INT8."""

    path: Path
    runs_on: str  # TensorRT or CPU
    calibration: str
    images: int
    products: tuple[str, ...]  # the nodes that multiply in INT8
    left_float: Mapping[str, str]  # the products that do not, and why
    widened: tuple[str, ...]  # grouped convolutions with fewer, wider groups than before
    max_relative_error: float  # of the outputs on calibration images, against the source

    def facts(self) -> dict[str, Any]:
        """Return everything but the path as plain values, for JSON."""
        return {
            "runs_on": self.runs_on,
            "calibration": self.calibration,
            "images": self.images,
            "products": list(self.products),
            "left_float": dict(self.left_float),
            "widened": list(self.widened),
            "max_relative_error": self.max_relative_error,
        }

    def __str__(self) -> str:
        lines = [
            f"{len(self.products)} of {len(self.products) + len(self.left_float)} products in INT8 "
            f"for {self.runs_on}, calibrated by {self.calibration} on {self.images} images"
        ]
        lines.append(f"maximum relative error of the outputs {self.max_relative_error:.1e}")
        if self.widened:
            lines.append(f"{len(self.widened)} grouped convolutions with wider groups")
        lines += [f"{name} in floating point: {why}" for name, why in self.left_float.items()]
        return "\n".join(lines)


def quantize_for_tensorrt(
    source: Path,
    target: Path,
    images: Images | ActivationRanges,
    *,
    percentile: float | None = None,
    exclude: Sequence[str] = (),
    first: bool = True,
    last: bool = True,
    expect_sparse: bool = False,
    batch_size: int = 8,
) -> QuantizedFile:
    """Write a copy of an ONNX file that TensorRT runs in INT8.

    All numbers are signed and symmetric, biases stay in floating point, and pairs of
    QuantizeLinear and DequantizeLinear are where TensorRT fuses them, as
    `helpers.inference.int8_placement` explains. What stays in floating point keeps the type of the
    source, so an FP16 file is the better source. The file is checked before it takes its name.

    Args:
        source: an ONNX file in FP16 or FP32, of opset 13 or newer, in FP16 of 19 or newer.
        target: file to write.
        images: for the calibration, as `activation_ranges` takes them, or its result.
        percentile: as `activation_ranges` takes it.
        exclude: name patterns of nodes and weights that stay in floating point.
        first: quantise the first product too.
        last: quantise the last product too.
        expect_sparse: refuse a file that has an eligible weight which is not 2:4.
        batch_size: how many images are calibrated at a time.

    Raises:
        InputError: the source cannot be read, is quantised already or is not sparse although it
            should be, a product of it cannot be quantised, or the images do not fit. Nothing is
            written.
        WriteError: the target cannot be written.
    """
    model = _prepared(source, target, expect_sparse)
    products, left = _products(model, source, exclude, first, last)
    ranges = _ranges(model, source, images, percentile, batch_size)
    _require_range(ranges, source, model)
    options = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": list(PRODUCTS),
    }
    extra = tensors_to_quantise(model, products)
    expected = _float_outputs(model, ranges.sample)
    with atomic_write(target) as part:
        _write(model, part, ranges, "int8", products, list(PRODUCTS), options, extra)
        if faults := tensorrt_int8_faults(part, products):
            raise InputError(
                f"{shown(source)} cannot be quantised for TensorRT: {faults[0].rstrip('.')}. "
                "Exclude this layer, or export the model with known shapes."
            )
        _require_kept(source, part)
        error = _error(part, expected, ranges.sample)
    return _result(target, "TensorRT", ranges, products, left, (), error)


def quantize_for_cpu(
    source: Path,
    target: Path,
    images: Images | ActivationRanges,
    *,
    percentile: float | None = None,
    exclude: Sequence[str] = (),
    first: bool = True,
    last: bool = True,
    expect_sparse: bool = False,
    batch_size: int = 8,
    reduce_range: bool = False,
) -> QuantizedFile:
    """Write a copy of an ONNX file that ONNX Runtime runs in INT8 on a CPU.

    Activations are unsigned, as ONNX Runtime's fast kernels take them, and all its operators that
    can are quantised. Grouped convolutions get fewer, wider groups
    (`helpers.inference.wide_groups`); a run on calibration images proves that they compute the
    same. Such a kernel multiplies by zeros as by any other number: 2:4 makes this file smaller,
    not faster.

    Args:
        source: an ONNX file in FP32, of opset 13 or newer.
        target: file to write.
        images: as `quantize_for_tensorrt` takes them.
        percentile: as `activation_ranges` takes it.
        exclude: name patterns of nodes and weights that stay in floating point.
        first: quantise the first product too.
        last: quantise the last product too.
        expect_sparse: refuse a file that has an eligible weight which is not 2:4.
        batch_size: how many images are calibrated at a time.
        reduce_range: use seven bits of the weights, for x86 processors without VNNI, whose sums
            of eight-bit products can overflow.

    Raises:
        InputError: as `quantize_for_tensorrt`, or the source is in FP16.
        WriteError: the target cannot be written.
    """
    from onnxruntime.quantization.registry import QDQRegistry

    model = _prepared(source, target, expect_sparse)
    if any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer):
        raise InputError(
            f"{shown(source)} is in FP16, which is slow on a CPU. Give the FP32 file of the model."
        )
    products, left = _products(model, source, exclude, first, last)
    ranges = _ranges(model, source, images, percentile, batch_size)
    _require_range(ranges, source, model)
    expected = _float_outputs(model, ranges.sample)
    widened = widen_groups_(model)
    if widened:
        _require_same(model, expected, ranges, source)
    # ONNX Runtime has no INT8 kernel for these: quantising them would only cost accuracy.
    kinds = [name for name in QDQRegistry if name not in ("ConvTranspose", "LSTM")]
    excluded = {node.name for node in model.graph.node if node.name in left}
    nodes = [node.name for node in model.graph.node if node.name not in excluded]
    with atomic_write(target) as part:
        _write(model, part, ranges, "uint8", nodes, kinds, {}, (), reduce_range)
        error = _error(part, expected, ranges.sample)
    return _result(target, "CPU", ranges, products, left, widened, error)


# --- the source ---


def _prepared(source: Path, target: Path, expect_sparse: bool) -> onnx.ModelProto:
    """Return the model of a file that can be quantised, with a name for every node."""
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise InputError(f"{shown(target)} is the file to read; write to another one.")
    model = load_float_model(source)
    opset = next(item.version for item in model.opset_import if item.domain in STANDARD_DOMAINS)
    is_half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    needed = 19 if is_half else 13
    if opset < needed:
        raise InputError(
            f"{shown(source)} has opset {opset}, and INT8 in {'FP16' if is_half else 'FP32'} files "
            f"needs {needed} or newer. Export it again, as export_onnx does."
        )
    if expect_sparse:
        _require_sparse(source)
    taken = {node.name for node in model.graph.node}
    seen: set[str] = set()
    for node in model.graph.node:
        if not node.name or node.name in seen:  # ONNX Runtime knows nodes by their names
            name = node_name(node) if not node.name else f"{node.name}_of_{node.output[0]}"
            while name in taken:
                name += "_"
            taken.add(name)
            node.name = name
        seen.add(node.name)
    del model.graph.value_info[:]
    return model


def _require_sparse(source: Path) -> None:
    table = verify_onnx(source)
    eligible = table[table.eligible]
    dense = eligible[~eligible.is_2to4]
    if eligible.empty or len(dense):
        which = "it has no eligible weight"
        if len(dense):
            which = (
                f"{len(dense)} of {len(eligible)} eligible weights are dense, the first "
                f"{dense.weight.iloc[0]}"
            )
        raise InputError(
            f"{shown(source)} was expected to be 2:4, and {which}. Prune and retrain the model "
            "first."
        )


def _require_kept(source: Path, written: Path) -> None:
    """Refuse a result that has fewer 2:4 weights than its source."""
    before, after = (verify_onnx(path) for path in (source, written))
    if after.is_2to4.sum() < before.is_2to4.sum():
        raise InputError(
            f"{before.is_2to4.sum()} weights of {shown(source)} are 2:4, and after quantising "
            f"{after.is_2to4.sum()}. Please report this."
        )


def _products(
    model: onnx.ModelProto, source: Path, exclude: Sequence[str], first: bool, last: bool
) -> tuple[list[str], dict[str, str]]:
    """Return the nodes to quantise, and why other products stay in floating point."""
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder) / "named.onnx"
        onnx.save(model, named)
        rows = list(node_weights(named))
    names = [(row.node, row.weight) for row in rows]
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for pair in names for name in pair):
            raise InputError(
                f"Nothing in {shown(source)} matches {pattern!r}. Give the name of a node or a "
                "weight, with * for any characters."
            )
    nodes = {node.name: node for node in model.graph.node}
    stored = {item.name for item in model.graph.initializer if item.data_type in _FLOATS}
    products: list[str] = []
    left: dict[str, str] = {}
    for row in rows:
        is_excluded = any(
            fnmatchcase(name, pattern) for pattern in exclude for name in (row.node, row.weight)
        )
        if is_excluded:
            left[row.node] = "excluded"
        elif row.value is None and row.exempt:
            left[row.node] = row.exempt
        elif why := _why_not(row, nodes.get(row.node), stored):
            raise InputError(
                f"The {row.op} {row.node} of {shown(source)} cannot be quantised: {why}. Exclude "
                "it by its name, and it stays in floating point."
            )
        elif row.exempt:
            left[row.node] = row.exempt
        else:
            products.append(row.node)
    for wanted, place, which in ((first, 0, "first"), (last, -1, "last")):
        if not wanted and products:
            left[products.pop(place)] = f"the {which} product"
    if not products:
        raise InputError(
            f"{shown(source)} has no product to quantise. Quantise a file with convolutions or "
            "matrix products whose weights are stored in it."
        )
    return products, left


def _why_not(row: NodeWeight, node: onnx.NodeProto | None, stored: set[str]) -> str:
    """Return why a product with a constant cannot be quantised; empty if it can."""
    if node is None:
        return "it is inside of a body or a function"
    if node.op_type not in PRODUCTS or node.domain not in STANDARD_DOMAINS:
        return f"only {', '.join(PRODUCTS[:-1])} and {PRODUCTS[-1]} can"
    if row.operand not in stored:
        return "its weight is not stored as it is used; fold the constants of the file first"
    return ""


# --- calibration ---


def _ranges(
    model: onnx.ModelProto,
    source: Path,
    images: Images | ActivationRanges,
    percentile: float | None,
    batch_size: int,
) -> ActivationRanges:
    if not isinstance(images, ActivationRanges):
        return model_ranges(model, source, images, percentile, batch_size)
    if percentile is not None:
        raise InputError("The ranges are measured already: give the percentile when measuring.")
    return images


def _require_range(ranges: ActivationRanges, source: Path, model: onnx.ModelProto) -> None:
    """Refuse ranges of another network, or those that FP16 cannot hold."""
    inputs = [name for node in model.graph.node if node.op_type in PRODUCTS for name in node.input]
    stored = {tensor.name for tensor in model.graph.initializer}
    for name in inputs:
        if name and name not in stored and name not in ranges.values:
            raise InputError(
                f"The calibration is of another network: it has no range of {name}, an activation "
                f"of {shown(source)}. Calibrate this file."
            )
    if any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer):
        for name, ends in ranges.values.items():
            if max(map(abs, ends)) > _LARGEST_FP16:
                raise InputError(
                    f"The activation {name} of {shown(source)} reaches {max(map(abs, ends)):.3g}, "
                    "too large for FP16. Quantise the FP32 file."
                )


# --- writing and checking ---


def _write(
    model: onnx.ModelProto,
    path: Path,
    ranges: ActivationRanges,
    activations: str,
    nodes: list[str],
    kinds: list[str],
    options: dict[str, Any],
    extra: Sequence[str],
    reduce_range: bool = False,
) -> None:
    """Quantise some nodes of a model and some more tensors, and write the result."""
    from onnxruntime.quantization import (
        CalibrationMethod,
        QDQQuantizer,
        QuantType,
        TensorData,
        TensorsData,
    )

    is_half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    dtype = np.float16 if is_half else np.float32
    known = {name for node in model.graph.node for name in (*node.input, *node.output)}
    values = {
        name: TensorData(lowest=np.array(low, dtype), highest=np.array(high, dtype))
        for name, (low, high) in ranges.values.items()
        if name in known
    }
    try:
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=reduce_range,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8 if activations == "int8" else QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, values),
            nodes_to_quantize=nodes,
            nodes_to_exclude=[],
            op_types_to_quantize=kinds,
            extra_options=options,
        )
        for name in extra:
            quantizer.quantize_activation_tensor(name)
        quantizer.quantize_model()
        quantizer.model.save_model_to_file(str(path))
    except (InputError, OSError):
        raise
    except Exception as error:  # ONNX Runtime raises classes without a common base
        raise InputError(
            f"ONNX Runtime cannot quantise the file: {first_line(error)}. Exclude the layer that "
            "it names, or export the model again."
        ) from error


def _outputs(path: Path, sample: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
    """Return what ONNX Runtime computes with a file for FP32 inputs."""
    session = open_session(path)
    kinds = {item.name: item.type for item in session.get_inputs()}
    feeds = {
        name: array.astype(np.float16) if kinds[name] == "tensor(float16)" else array
        for name, array in sample.items()
    }
    return [torch.from_numpy(np.asarray(output)) for output in session.run(None, feeds)]


def _error(path: Path, expected: Sequence[torch.Tensor], sample: Mapping[str, np.ndarray]) -> float:
    """Return the maximum relative error of a file's outputs."""
    pairs = zip(_outputs(path, sample), expected, strict=True)
    return max(max_relative_error(output, wanted) for output, wanted in pairs)


def _float_outputs(model: onnx.ModelProto, sample: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
    """Return the outputs of a model in FP32."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        onnx.save(in_float32(model), path)
        return _outputs(path, sample)


def _require_same(
    model: onnx.ModelProto, expected: list[torch.Tensor], ranges: ActivationRanges, source: Path
) -> None:
    """Refuse wider groups that compute something else, by a run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wide.onnx"
        onnx.save(model, path)
        error = _error(path, expected, ranges.sample)
    if not error <= _SAME:  # a NaN is not below it either
        raise InputError(
            f"{shown(source)} computes something else with wider groups: its outputs differ by "
            f"{error:.1e} of the largest. Please report this."
        )


def _result(
    target: Path,
    runs_on: str,
    ranges: ActivationRanges,
    products: list[str],
    left: dict[str, str],
    widened: tuple[str, ...],
    error: float,
) -> QuantizedFile:
    return QuantizedFile(
        Path(target), runs_on, ranges.method, ranges.images, tuple(products), left, widened, error
    )
