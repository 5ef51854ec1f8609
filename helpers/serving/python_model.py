"""The Python that Triton runs for a model; each version folder of the repository has a copy.

A repository is to be served where this package is not installed, so this module imports NumPy
and, for the step that needs it, ONNX Runtime or Pillow. `helpers.serving.repository` writes the
configuration that it reads. Explained in `09_serve_with_triton.ipynb`.

Triton hands over requests as they come; they wait here in a queue of the model's own, until they
are computed in batches. A request that has waited too long is answered with an error: a server
that falls behind then still answers the others in time, and its memory stays bounded.
"""

import io
import json
import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

COUNTERS = {  # on the page of metrics, for each model
    "model_refused_requests": "Requests answered with an error because they waited too long",
    "model_wait_duration_us": "Cumulative time that requests waited for their batch",
}
MAX_PIXELS = 50_000_000  # of a JPEG; one of a few kilobytes can hold gigabytes of pixels


class RequestError(ValueError):
    """A request does not fit; its sender is told why."""


class Step(ABC):
    """What a model does: one array of N entries in, one or two arrays of N entries out."""

    merges = True  # several requests are computed as one batch

    @abstractmethod
    def __init__(self, folder: Path, parameters: Mapping[str, str]) -> None:
        """Load what the step needs from the folder of the version."""

    def check(self, array: np.ndarray) -> np.ndarray:
        """Return the input of one request.

        Raises:
            RequestError: it does not fit; the batch then runs without it.
        """
        return array

    @abstractmethod
    def run(self, array: np.ndarray) -> list[np.ndarray]:
        """Return the outputs of a batch."""


class Classify(Step):
    """Images (N, C, H, W) to logits (N, classes), in ONNX Runtime on the CPU."""

    def __init__(self, folder: Path, parameters: Mapping[str, str]) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = int(parameters.get("threads", os.cpu_count() or 1))
        # Threads wait for each other in a busy loop while a batch is computed, which makes small
        # models much faster, and stop with it: the server and its clients need the cores too.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = ort.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.name = self.session.get_inputs()[0].name

    def check(self, array: np.ndarray) -> np.ndarray:
        if not np.isfinite(array).all():
            raise RequestError("images: some values are NaN or infinite; send finite numbers")
        return array

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        return self.session.run(None, {self.name: array})


class DecodeJpeg(Step):
    """JPEG files (N, 1) to normalised images (N, C, H, W), as the model was trained on them."""

    merges = False  # a damaged file must not spoil other requests

    def __init__(self, folder: Path, parameters: Mapping[str, str]) -> None:
        self.preprocessing = json.loads(parameters["preprocessing"])
        self.dtype = np.dtype(parameters["dtype"])

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        images = []
        for number, file in enumerate(array[:, 0]):
            try:
                images.append(decode_jpeg(file, **self.preprocessing))
            except RequestError as error:
                raise RequestError(f"jpeg {number}: {error}") from error
        return [np.stack(images).astype(self.dtype)]


def decode_jpeg(
    file: bytes, mean: Sequence[float], std: Sequence[float], resize: int, crop: int
) -> np.ndarray:
    """Return a JPEG file as a normalised image (C, H, W), float32.

    The shorter side is resized, the middle is cut out, and each channel is normalised.

    Args:
        file: the bytes of a JPEG file.
        mean: of each channel: one for grey images, three for RGB.
        std: of each channel.
        resize: length of the shorter side after resizing, in pixels.
        crop: height and width of the middle part.

    Raises:
        RequestError: the file is no JPEG image, is damaged, or has too many pixels.
    """
    from PIL import Image

    try:
        opened = Image.open(io.BytesIO(file), formats=["JPEG"])  # reads the header alone
    except Image.DecompressionBombError as error:  # Pillow has a limit too
        raise RequestError(f"too many pixels; send at most {MAX_PIXELS:,}") from error
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise RequestError("this is no JPEG file") from error
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise RequestError(f"too many pixels, {width} x {height}; send at most {MAX_PIXELS:,}")
    try:
        image = opened.convert("L" if len(mean) == 1 else "RGB")
    except Exception as error:  # see above
        raise RequestError(f"this JPEG file is damaged ({error})") from error
    short = min(width, height)
    if short != resize:
        # torchvision rounds the longer side down too.
        new_size = int(resize * width / short), int(resize * height / short)
        image = image.resize(new_size, Image.Resampling.BILINEAR)
    left, top = (round((side - crop) / 2) for side in image.size)
    image = image.crop((left, top, left + crop, top + crop))
    pixels = np.asarray(image, dtype=np.float32).reshape(crop, crop, len(mean)).transpose(2, 0, 1)
    means, deviations = (
        np.asarray(values, dtype=np.float32).reshape(-1, 1, 1) for values in (mean, std)
    )
    return (pixels / np.float32(255) - means) / deviations


class NameClasses(Step):
    """Logits (N, classes) to the names and probabilities of the most likely classes."""

    def __init__(self, folder: Path, parameters: Mapping[str, str]) -> None:
        names = [name.encode() for name in json.loads(parameters["classes"])]
        self.classes = np.array(names, dtype=object)
        self.best = int(parameters["best"])

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        order, scores = best_classes(array, self.best)
        return [self.classes[order], scores]


def best_classes(logits: np.ndarray, best: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers (N, best) of the likeliest classes and their probabilities, float32."""
    logits = logits.astype(np.float32)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    order = np.argsort(-logits, axis=1, kind="stable")[:, :best]
    return order, np.take_along_axis(powers / powers.sum(axis=1, keepdims=True), order, axis=1)


STEPS: Mapping[str, type[Step]] = {
    "classify": Classify,
    "decode_jpeg": DecodeJpeg,
    "name_classes": NameClasses,
}


@dataclass(frozen=True)
class Waiting:
    """A request in the queue."""

    array: np.ndarray
    sender: Any  # answers it
    since: float  # seconds by the monotonic clock


class TritonPythonModel:
    """What Triton creates for each instance of a model, and calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model; `args` are Triton's, with the configuration of config.pbtxt."""
        import triton_python_backend_utils as triton

        self.triton = triton
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        self.step = STEPS[parameters["step"]](folder, parameters)
        self.input: str = config["input"][0]["name"]
        self.outputs = [output["name"] for output in config["output"]]
        self.largest = int(config["max_batch_size"])
        self.longest_wait = int(parameters["longest_wait_ms"]) / 1000
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self.families = [  # kept, because a metric disappears with its family
            triton.MetricFamily(name=name, description=text, kind=triton.MetricFamily.COUNTER)
            for name, text in COUNTERS.items()
        ]
        self.refused, self.waited = (family.Metric(labels=labels) for family in self.families)
        self.queue: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self.worker = threading.Thread(target=self._work, daemon=True)
        self.worker.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Put requests into the queue; they are answered later."""
        now = time.monotonic()
        for request in requests:
            sender = request.get_response_sender()
            array = self.triton.get_input_tensor_by_name(request, self.input).as_numpy()
            try:
                self.queue.put(Waiting(self.step.check(array), sender, now))
            except RequestError as error:
                self._refuse(sender, str(error), self.triton.TritonError.INVALID_ARG)

    def finalize(self) -> None:
        """Answer what is in the queue, and stop."""
        self.queue.put(None)
        self.worker.join()

    def _work(self) -> None:
        following = None  # the request that did not fit into the last batch
        while (first := following or self.queue.get()) is not None:
            batch, following = self._collect(first)
            if batch := [each for each in batch if self._in_time(each)]:
                self._answer(batch)

    def _collect(self, first: Waiting) -> tuple[list[Waiting], Waiting | None]:
        """Return the waiting requests that fit into one batch, and the one that does not fit."""
        batch, size = [first], len(first.array)
        while self.step.merges and not self.queue.empty():
            following = self.queue.get()
            if following is None:  # stop, after this batch
                self.queue.put(None)
                break
            size += len(following.array)
            if size > self.largest:
                return batch, following
            batch.append(following)
        return batch, None

    def _in_time(self, waiting: Waiting) -> bool:
        """Return whether a request is still to be computed; if not, answer it."""
        waited = time.monotonic() - waiting.since
        self.waited.increment(1e6 * waited)
        if waited <= self.longest_wait:
            return True
        self.refused.increment(1)
        message = (
            f"the server is busy: this request waited {waited:.2f} s, and "
            f"{self.longest_wait:g} s is the limit; send it again later"
        )
        self._refuse(waiting.sender, message, self.triton.TritonError.UNAVAILABLE)
        return False

    def _answer(self, batch: Sequence[Waiting]) -> None:
        """Compute requests as one batch, and answer each."""
        try:
            arrays = [waiting.array for waiting in batch]
            results = self.step.run(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
        except Exception as error:  # whatever went wrong, its senders wait for an answer
            kind = self.triton.TritonError
            code = kind.INVALID_ARG if isinstance(error, RequestError) else kind.INTERNAL
            for waiting in batch:
                self._refuse(waiting.sender, str(error), code)
            return
        start = 0
        for waiting in batch:
            end = start + len(waiting.array)
            tensors = [
                self.triton.Tensor(name, np.ascontiguousarray(result[start:end]))
                for name, result in zip(self.outputs, results, strict=True)
            ]
            self._send(waiting.sender, self.triton.InferenceResponse(tensors))
            start = end

    def _refuse(self, sender: Any, message: str, code: int) -> None:
        error = self.triton.TritonError(message, code)
        self._send(sender, self.triton.InferenceResponse(error=error))

    def _send(self, sender: Any, response: Any) -> None:
        sender.send(response, flags=self.triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
