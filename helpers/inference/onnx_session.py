"""Run ONNX files in ONNX Runtime on the CPU. Explained in `04_export_onnx.ipynb`."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from helpers.errors import InputError, first_line
from helpers.files import shown
from helpers.metrics import max_relative_error

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


class OnnxSession:
    """An ONNX file with one input, loaded by ONNX Runtime on the CPU.

    It uses as many threads as PyTorch does.

    Args:
        path: the file.

    Raises:
        InputError: the file is missing, damaged or has another number of inputs.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        self.path = path
        self.session = open_session(path)
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            raise InputError(
                f"{shown(path)} has {len(inputs)} inputs; only files with one input can be run."
            )
        self.input: str = inputs[0].name
        self.outputs: list[str] = [output.name for output in self.session.get_outputs()]
        self.dtype = np.float16 if inputs[0].type == "tensor(float16)" else np.float32
        self.version: str = ort.__version__

    def run(self, images: np.ndarray, outputs: list[str] | None = None) -> list[np.ndarray]:
        """Return outputs for images (N, C, H, W) of the session's `dtype`.

        Args:
            images: the input.
            outputs: names of the outputs to compute; all unless given.

        Raises:
            InputError: the file does not take images of this shape.
        """
        try:
            return self.session.run(outputs, {self.input: images})
        except Exception as error:  # see __init__
            raise InputError(
                f"{shown(self.path)} does not run in ONNX Runtime on images of shape "
                f"{images.shape}: {error}"
            ) from error


def open_session(path: Path) -> "InferenceSession":
    """Return an ONNX file loaded by ONNX Runtime on the CPU, with as many threads as PyTorch.

    Raises:
        InputError: the file is missing, damaged, or has operators that ONNX Runtime lacks.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    # Threads wait for work in a busy loop, which makes small models up to 1.6 times as fast. They
    # must not go on after the run: they would slow down whatever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a dozen classes without a common base
        raise InputError(
            f"{shown(path)} cannot be loaded by ONNX Runtime: "
            f"{first_line(error).rstrip('.')}. Export the model again, such as with export_onnx."
        ) from error


def onnx_max_relative_error(path: Path, reference: Path, images: Tensor) -> float:
    """Return the largest `max_relative_error` of two ONNX files' outputs, run by ONNX Runtime.

    Args:
        path: a file with one input.
        reference: another file, with the same input and outputs.
        images: (N, C, H, W), of any floating-point type.

    Raises:
        InputError: a file is missing, damaged, or does not take such images.
    """
    outputs, expected = (
        [torch.from_numpy(output) for output in session.run(images.numpy().astype(session.dtype))]
        for session in (OnnxSession(path), OnnxSession(reference))
    )
    pairs = zip(outputs, expected, strict=True)
    return max(max_relative_error(output, wanted) for output, wanted in pairs)
