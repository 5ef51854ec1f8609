"""Read an ONNX file without its weights, and each stored tensor when it is needed.

Files are mapped into memory, so a weight costs time only when somebody looks at it. Nothing
here is stricter than ONNX Runtime and TensorRT: they load operators that ONNX does not know,
outputs without a shape, and external data behind links, all of which ONNX's checker refuses.
Used in `04_export_onnx.ipynb`.
"""

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.numpy_helper import to_array

from helpers.errors import InputError, first_line
from helpers.files import shown

STANDARD_DOMAINS = ("", "ai.onnx")
Stored = TensorProto | onnx.SparseTensorProto

# The fields of ONNX's messages that hold the weights: model.graph.initializer.raw_data.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_MAPPED = 4096  # bytes; smaller tensors are read with the graph
_HERE = "."  # as the location of external data: in the ONNX file itself


def load_onnx(path: Path) -> onnx.ModelProto:
    """Return an ONNX model; tensors in external files are checked, but not read.

    Raises:
        InputError: the file is missing, is not an ONNX model, or its external data are missing.
    """
    path = Path(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # protobuf raises classes without a common base
        raise _not_a_model(path, first_line(error)) from error
    _require_graph(model, path)
    data = _Mapped(path)
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            data.bytes_of(tensor)
    return model


class OnnxFile:
    """An ONNX model whose large tensors are still in the file.

    Args:
        path: the file.

    Raises:
        InputError: the file is missing or damaged, or is not an ONNX model.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.model = _without_weights(self.path)
        _require_graph(self.model, self.path)
        self._data = _Mapped(self.path)

    def array(self, stored: Stored) -> np.ndarray:
        """Return a stored tensor, without a copy if its bytes allow it.

        Raises:
            InputError: its bytes are missing, or are not as many as its shape says.
        """
        if isinstance(stored, TensorProto):
            return self._dense(stored)
        values, places = self._dense(stored.values), self._dense(stored.indices)
        array = np.zeros(tuple(stored.dims), values.dtype)
        try:
            by_axis = places.T if places.ndim == 2 else np.unravel_index(places, array.shape)
            array[tuple(by_axis)] = values
        except (IndexError, ValueError) as error:
            raise _tensor_error(stored.values, first_line(error)) from error
        return array

    def _dense(self, tensor: TensorProto) -> np.ndarray:
        try:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        except KeyError as error:
            raise _tensor_error(tensor, f"it has no data type {tensor.data_type}") from error
        shape = tuple(tensor.dims)
        if tensor.data_location == TensorProto.EXTERNAL:
            content = self._data.bytes_of(tensor)
            if _bits(tensor) == 8 * dtype.itemsize:
                return np.frombuffer(content, dtype).reshape(shape)
            tensor = TensorProto(
                dims=tensor.dims, data_type=tensor.data_type, name=tensor.name,
                raw_data=bytes(content),
            )  # fmt: skip
        try:
            return to_array(tensor)
        except Exception as error:  # ONNX and NumPy raise classes without a common base
            raise _tensor_error(tensor, first_line(error)) from error


class _Mapped:
    """The bytes of tensors outside of the graph: in the ONNX file or in files beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, memoryview] = {}

    def bytes_of(self, tensor: TensorProto) -> memoryview:
        """Return the bytes of a tensor that is marked as external.

        Raises:
            InputError: there are not as many as its shape says.
        """
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location not in self.files:
            self.files[location] = self._map(tensor, location)
        needed = -(-_bits(tensor) * int(np.prod(tensor.dims, dtype=object)) // 8)
        try:
            offset = int(entries.get("offset") or 0)
            length = int(entries.get("length") or needed)
        except ValueError as error:
            raise _tensor_error(tensor, f"{first_line(error)} in its external data") from error
        content = self.files[location][offset : offset + length]
        if length != needed or len(content) != needed or offset < 0:
            where = "" if location == _HERE else f" in {location}"
            raise _tensor_error(
                tensor, f"its shape needs {needed} bytes and there are {len(content)}{where}"
            )
        return content

    def _map(self, tensor: TensorProto, location: str) -> memoryview:
        if location == _HERE:
            return _map_file(self.path)
        # Beside the file as it was named, and if that is a link, beside the file itself.
        candidates = [self.path.parent / location, self.path.resolve().parent / location]
        found = next((each for each in candidates if each.exists()), candidates[0])
        try:
            return _map_file(found)
        except OSError as error:
            raise _tensor_error(
                tensor, f"{shown(found)} cannot be read ({error.strerror})"
            ) from error


def _map_file(path: Path) -> memoryview:
    if path.exists() and not path.is_file():  # a folder; a pipe would never end
        raise IsADirectoryError(errno.EISDIR, "not a file")
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # nothing that could be mapped
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _bits(tensor: TensorProto) -> int:
    """Return the bits of one number of a tensor; those of four or two bits are packed."""
    name = TensorProto.DataType.Name(tensor.data_type)
    for bits in (2, 4):
        if name in (f"INT{bits}", f"UINT{bits}") or name.startswith(f"FLOAT{bits}E"):
            return bits
    return 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _require_graph(model: onnx.ModelProto, path: Path) -> None:
    if not model.graph.node:
        raise _not_a_model(path, "its graph has no nodes")


# --- the messages of the file, field by field ---


class _Field(NamedTuple):
    """Where a field of a message lies in the file: its tag from `start`, its content to `end`."""

    number: int
    start: int
    content: int
    end: int


def _without_weights(path: Path) -> onnx.ModelProto:
    """Return the model of a file in which large initializers point into the file."""
    try:
        content = _map_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    parts: list[memoryview] = []  # of the model without its graph
    graph_parts: list[memoryview] = []
    tensors: list[TensorProto] = []
    try:
        for field in _fields(content, 0, len(content)):
            if field.number != _GRAPH:
                parts.append(content[field.start : field.end])
                continue
            for inner in _fields(content, field.content, field.end):
                if inner.number == _INITIALIZER and inner.end - inner.content > _MAPPED:
                    tensors.append(_without_bytes(content, inner))
                else:
                    graph_parts.append(content[inner.start : inner.end])
        model = onnx.ModelProto.FromString(b"".join(parts))
        model.graph.MergeFromString(b"".join(graph_parts))
    except Exception as error:  # protobuf raises classes without a common base
        raise _not_a_model(path, first_line(error)) from error
    model.graph.initializer.extend(tensors)
    return model


def _without_bytes(content: memoryview, message: _Field) -> TensorProto:
    """Return a tensor whose raw data, if there are any, stay in the file."""
    parts, raw = [], None
    for field in _fields(content, message.content, message.end):
        if field.number == _RAW_DATA:
            raw = field
        else:
            parts.append(content[field.start : field.end])
    tensor = TensorProto.FromString(b"".join(parts))
    if raw is not None:
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": _HERE, "offset": raw.content, "length": raw.end - raw.content}
        del tensor.external_data[:]
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def _fields(content: memoryview, start: int, end: int) -> Iterator[_Field]:
    """Yield the fields of a protobuf message that lies between two positions.

    Source: protobuf.dev, "Encoding": a tag is a number times eight plus the kind of the value.
    """
    while start < end:
        tag, position = _varint(content, start)
        kind = tag & 7
        if kind == 0:
            begin, (_, stop) = position, _varint(content, position)
        elif kind == 2:
            length, begin = _varint(content, position)
            stop = begin + length
        elif kind in (1, 5):
            begin, stop = position, position + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"there is no field of kind {kind}")
        if stop > end:
            raise ValueError("it ends in the middle of a field")
        yield _Field(tag >> 3, start, begin, stop)
        start = stop


def _varint(content: memoryview, position: int) -> tuple[int, int]:
    """Return a number of variable length and the position after it."""
    value, shift = 0, 0
    while True:
        if position >= len(content):
            raise ValueError("it ends in the middle of a number")
        byte = content[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise ValueError("a number is too long")


# --- errors ---


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{shown(path)} cannot be read: {error.strerror}.")


def _not_a_model(path: Path, reason: str) -> InputError:
    return InputError(
        f"{shown(path)} is not a valid ONNX model: {reason}. Export it again, or copy it again "
        "if it comes from elsewhere."
    )


def _tensor_error(tensor: TensorProto, reason: str) -> InputError:
    return InputError(
        f"The tensor {tensor.name} cannot be read: {reason.rstrip('.')}. Export the model again, "
        "or copy the files of its external data beside it."
    )
