"""Measure the range of each activation of an ONNX file on calibration images.

The scale of an INT8 tensor follows from its range. ONNX Runtime measures the ranges, by the
smallest and largest number or by a percentile. An FP16 file is measured in FP32: so it has the
ranges of its FP32 twin, and a histogram has bins as fine as it needs. Explained in
`08_int8.ipynb`.
"""

import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
from onnx import GraphProto, TensorProto, numpy_helper
from torch import Tensor

from helpers.errors import InputError, first_line
from helpers.files import shown
from helpers.sparsity.onnx_constants import quantises
from helpers.sparsity.onnx_file import load_onnx
from helpers.sparsity.onnx_inputs import OnnxInput, onnx_inputs

# One array (N, ...) for a file with one input, or an array for each input by its name.
Images: TypeAlias = Tensor | np.ndarray | Mapping[str, Tensor | np.ndarray]

MIN_IMAGES = 8


@dataclass(frozen=True)
class ActivationRanges:
    """The smallest and the largest number of each activation, by the name of its tensor.

    `sample` are the first of the images, in FP32 and by the names of the inputs: with them a
    quantised file is compared with its source.
    """

    values: Mapping[str, tuple[float, float]]
    images: int
    method: str
    sample: Mapping[str, np.ndarray]


def activation_ranges(
    path: Path, images: Images, percentile: float | None = None, batch_size: int = 8
) -> ActivationRanges:
    """Return the range of each floating-point activation of a file on calibration images.

    Args:
        path: an ONNX file in FP32 or FP16, not yet quantised, of at most 2 GB.
        images: at least `MIN_IMAGES`, prepared as for inference: (N, C, H, W) for a file with one
            input, or an array for each input by its name.
        percentile: of each activation's numbers, such as 99.99, that the range has to contain;
            all of them unless given.
        batch_size: how many images run at a time; a file with a fixed batch keeps its own.

    Raises:
        InputError: the file cannot be read or run or is quantised already, the images are too few,
            not finite or those of another network, or a range is not finite.
    """
    return model_ranges(load_float_model(path), path, images, percentile, batch_size)


def load_float_model(path: Path) -> onnx.ModelProto:
    """Return the model of a file with all its weights.

    Raises:
        InputError: the file cannot be read, is larger than 2 GB or is quantised already.
    """
    model = load_onnx(path)
    for node in model.graph.node:
        if quantises(node) or node.op_type.startswith("QLinear") or "Integer" in node.op_type:
            raise InputError(
                f"{shown(path)} is quantised already, as its {node.op_type} {node.name} shows. "
                "Give the FP32 or FP16 file that it was made from."
            )
    onnx.load_external_data_for_model(model, str(Path(path).parent))
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) >= 2**31:
        raise InputError(f"{shown(path)} is larger than 2 GB, the limit of one ONNX file.")
    return model


def model_ranges(
    model: onnx.ModelProto,
    path: Path,
    images: Images,
    percentile: float | None = None,
    batch_size: int = 8,
) -> ActivationRanges:
    """Return the ranges of a model in memory, as `activation_ranges` does for a file.

    Args:
        model: as `load_float_model` returns it; it is not changed.
        path: where it was read, for messages.
        images: as `activation_ranges` takes them.
        percentile: as `activation_ranges` takes it.
        batch_size: as `activation_ranges` takes it.

    Raises:
        InputError: as `activation_ranges`.
    """
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    if percentile is not None and not 50 < percentile <= 100:
        raise InputError(f"A percentile of {percentile} is not above 50 and at most 100.")
    float_model = in_float32(model)
    feeds = calibration_feeds(onnx_inputs(float_model, path), path, images, batch_size)
    by_percentile = percentile is not None
    method = CalibrationMethod.Percentile if by_percentile else CalibrationMethod.MinMax
    options = {"symmetric": False, "percentile": percentile} if by_percentile else {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "float.onnx"
        onnx.save(float_model, copy)
        try:
            # The calibrator prints, which a library does not.
            with redirect_stdout(io.StringIO()):
                calibrator = create_calibrator(
                    copy,
                    augmented_model_path=str(Path(folder) / "augmented.onnx"),
                    calibrate_method=method,
                    extra_options=options,
                )
                for batch in feeds:  # one at a time: it keeps all activations of one call
                    calibrator.collect_data(_Once(batch))
                found = calibrator.compute_data()
        except Exception as error:  # ONNX Runtime has a dozen classes without a common base
            raise InputError(
                f"{shown(path)} cannot be calibrated: ONNX Runtime does not run it on these "
                f"images ({first_line(error)}). Check that it runs there before it is quantised."
            ) from error
    values = {
        name: (float(np.min(data.lowest)), float(np.max(data.highest)))
        for name, data in found.items()
    }
    for name, ends in values.items():
        if not np.isfinite(ends).all():
            raise InputError(
                f"The activation {name} of {shown(path)} is not finite on the calibration images. "
                "Check the images and the weights."
            )
    text = f"percentile {percentile}" if by_percentile else "min-max"
    return ActivationRanges(values, _count(images), text, feeds[0])


def calibration_feeds(
    inputs: Sequence[OnnxInput], path: Path, images: Images, batch_size: int = 8
) -> list[dict[str, np.ndarray]]:
    """Return calibration images in batches, as ONNX Runtime takes them.

    Where a file fixes its batch, the last batch is filled up with the first images.

    Args:
        inputs: of the file.
        path: of the file, for messages.
        images: as `activation_ranges` takes them.
        batch_size: images in a batch, unless the file fixes it.

    Raises:
        InputError: the images are too few, not finite or those of another network.
    """
    arrays = images if isinstance(images, Mapping) else _by_the_only_name(inputs, path, images)
    wanted = {item.name for item in inputs}
    if set(arrays) != wanted:
        raise InputError(
            f"The calibration data have the inputs {', '.join(sorted(arrays)) or 'none'}, and "
            f"{shown(path)} takes {', '.join(map(str, inputs))}. Give the data of this network."
        )
    feeds = {item.name: _checked(item, arrays[item.name], path) for item in inputs}
    counts = {len(array) for array in feeds.values()}
    if len(counts) != 1:
        raise InputError("The arrays of the calibration data have different lengths.")
    (count,) = counts
    if count < MIN_IMAGES:
        images_are = "is 1 calibration image" if count == 1 else f"are {count} calibration images"
        raise InputError(
            f"There {images_are}, too few to know the ranges of activations: give at least "
            f"{MIN_IMAGES}, better some hundreds."
        )
    fixed = {item.dims[0] for item in inputs if item.dims and isinstance(item.dims[0], int)}
    size = int(next(iter(fixed))) if fixed else batch_size
    batches = []
    for start in range(0, count, size):
        end = start + size if fixed else min(start + size, count)
        rows = np.arange(start, end) % count
        batches.append({name: array[rows] for name, array in feeds.items()})
    return batches


def _by_the_only_name(
    inputs: Sequence[OnnxInput], path: Path, images: Tensor | np.ndarray
) -> dict[str, Tensor | np.ndarray]:
    if len(inputs) != 1:
        raise InputError(
            f"{shown(path)} has {len(inputs)} inputs: {', '.join(map(str, inputs))}. Give the "
            "calibration data of each by its name."
        )
    return {inputs[0].name: images}


def _checked(item: OnnxInput, images: Tensor | np.ndarray, path: Path) -> np.ndarray:
    """Return the images of an input in its type, if they can be those of this network."""
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    fits = array.ndim == len(item.dims) and all(
        isinstance(dim, str) or dim == size
        for dim, size in zip(item.dims[1:], array.shape[1:], strict=True)
    )
    if not fits:
        shape = "x".join(map(str, array.shape))
        raise InputError(
            f"The calibration images have the shape {shape}, which does not fit the input {item} "
            f"of {shown(path)}. Give images of this network, prepared as for inference."
        )
    if np.issubdtype(item.dtype, np.floating) != np.issubdtype(array.dtype, np.floating):
        raise InputError(
            f"The calibration data of {item} are {array.dtype}, and {shown(path)} takes "
            f"{item.dtype}. Prepare them as for inference, normalised if the network expects that."
        )
    array = array.astype(item.dtype)
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        bad = int(np.count_nonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1)))
        raise InputError(
            f"{bad} of {len(array)} calibration images have numbers that are not finite. "
            "Leave these images out, or find what made them."
        )
    return array


def _count(images: Images) -> int:
    return len(next(iter(images.values())) if isinstance(images, Mapping) else images)


class _Once:
    """Gives ONNX Runtime's calibrator one batch; it takes any object with `get_next`."""

    def __init__(self, batch: dict[str, np.ndarray]) -> None:
        self.batches = [batch]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.batches.pop() if self.batches else None


def in_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model in which every FP16 tensor is FP32."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for graph in _graphs(copy.graph):
        # Shapes are inferred again from these.
        del graph.value_info[:]
        for item in (*graph.input, *graph.output):
            if item.type.tensor_type.elem_type == TensorProto.FLOAT16:
                item.type.tensor_type.elem_type = TensorProto.FLOAT
        _to_float32_(graph.initializer)
        for node in graph.node:
            for attribute in node.attribute:
                _to_float32_([attribute.t])
                if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT16:
                    attribute.i = TensorProto.FLOAT
    return copy


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and the bodies of its If, Loop and Scan."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _to_float32_(tensors: Iterable[TensorProto]) -> None:
    for tensor in tensors:
        if tensor.data_type == TensorProto.FLOAT16:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
