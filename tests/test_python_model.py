"""The program that Triton runs for a model, with a stand-in for Triton's own module."""

import io
import json
import sys
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import FashionMNIST
from torchvision.models import ResNeXt101_32X8D_Weights

from helpers.inference.runners import OnnxRunner
from helpers.serving import python_model
from helpers.training import data

TRITON = "triton_python_backend_utils"


class TritonError:
    INTERNAL, INVALID_ARG, UNAVAILABLE = range(3)

    def __init__(self, message: str, code: int) -> None:
        self.message, self.code = message, code


@dataclass
class Response:
    output_tensors: list = field(default_factory=list)
    error: TritonError | None = None


class Request:
    """One request, which keeps its answer."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.answered = array, threading.Event()

    def get_response_sender(self):
        return self

    def send(self, response: Response, flags: int) -> None:
        assert flags == 1
        assert not self.answered.is_set(), "answered twice"
        self.response = response
        self.answered.set()

    def arrays(self) -> list[np.ndarray]:
        assert self.answered.wait(60)
        assert self.response.error is None, self.response.error.message
        return [array for _, array in self.response.output_tensors]

    def error(self) -> TritonError:
        assert self.answered.wait(60)
        assert self.response.error is not None
        return self.response.error


class Counter:
    def __init__(self) -> None:
        self.value = 0.0

    def increment(self, by: float) -> None:
        self.value += by


class MetricFamily:
    COUNTER = 0

    def __init__(self, name: str, description: str, kind: int) -> None:
        assert description

    def Metric(self, labels: dict) -> Counter:  # noqa: N802 (Triton's name)
        assert set(labels) == {"model", "version"}
        return Counter()


@pytest.fixture
def triton(monkeypatch):
    module = SimpleNamespace(
        MetricFamily=MetricFamily,
        TritonError=TritonError,
        InferenceResponse=Response,
        Tensor=lambda name, array: (name, array),
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        get_input_tensor_by_name=lambda request, _: SimpleNamespace(as_numpy=lambda: request.array),
    )
    monkeypatch.setitem(sys.modules, TRITON, module)
    return module


@pytest.fixture
def start(triton, tmp_path, resnext_files):
    """Return a function that starts a model; it is stopped at the end."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.onnx").write_bytes(resnext_files["fp32"].read_bytes())
    started = []

    def make(step: str, outputs: tuple[str, ...] = ("logits",), **parameters: object):
        values = {"step": step, "longest_wait_ms": 60_000, **parameters}
        config = {
            "max_batch_size": 8,
            "input": [{"name": "in"}],
            "output": [{"name": name} for name in outputs],
            "parameters": {key: {"string_value": str(value)} for key, value in values.items()},
        }
        model = python_model.TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps(config),
                "model_repository": str(tmp_path),
                "model_version": "1",
                "model_name": "any",
            }
        )
        started.append(model)
        return model

    yield make
    for model in started:
        model.finalize()


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 1, 28, 28), dtype=np.float32)


def jpeg(width: int, height: int, mode: str = "L", **options) -> bytes:
    channels = {"L": (), "RGB": (3,)}[mode]
    shape = (height, width, *channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


# --- the queue ---


def test_each_request_gets_its_own_answer_and_it_is_the_runners(start, resnext_files):
    model, runner = start("classify"), OnnxRunner(resnext_files["fp32"])
    requests = [Request(images(1 + number % 5, seed=number)) for number in range(40)]
    model.execute(requests)
    for request in requests:
        (logits,) = request.arrays()
        assert np.array_equal(logits, runner(torch.from_numpy(request.array)).numpy())


def test_waiting_requests_become_batches_of_at_most_the_largest(start, monkeypatch):
    model, sizes, go = start("classify"), [], threading.Event()
    inner = model.step.run

    def run(array: np.ndarray) -> list[np.ndarray]:
        sizes.append(len(array))
        assert go.wait(60)
        return inner(array)

    monkeypatch.setattr(model.step, "run", run)
    first = Request(images(1))
    model.execute([first])
    while not sizes:  # until it is computed, so that the others wait
        time.sleep(0.001)
    others = [Request(images(count)) for count in (3, 3, 3, 8, 1, 1)]
    model.execute(others)
    go.set()
    for request in [first, *others]:
        assert len(request.arrays()[0]) == len(request.array)
    assert sizes == [1, 6, 3, 8, 2]


def test_a_request_that_has_waited_too_long_is_refused_and_counted(start):
    model = start("classify", longest_wait_ms=-1)  # whatever it waits is too long
    requests = [Request(images(1)) for _ in range(3)]
    model.execute(requests)
    for request in requests:
        assert request.error().code == TritonError.UNAVAILABLE
        assert "the server is busy" in request.error().message
    assert model.refused.value == 3


def test_a_request_with_nan_is_refused_and_its_neighbours_are_not(start):
    model, bad = start("classify"), images(2)
    bad[1, 0, 3, 4] = np.nan
    requests = [Request(images(2)), Request(bad), Request(images(1))]
    model.execute(requests)
    assert requests[1].error().code == TritonError.INVALID_ARG
    assert "NaN or infinite" in requests[1].error().message
    assert len(requests[0].arrays()[0]) == 2
    assert len(requests[2].arrays()[0]) == 1


def test_an_error_of_the_model_is_answered_and_the_next_request_is_served(start, monkeypatch):
    model = start("classify")
    with monkeypatch.context() as patch:
        patch.setattr(model.step, "run", lambda _: 1 / 0)
        request = Request(images(1))
        model.execute([request])
        assert request.error().code == TritonError.INTERNAL
    model.execute([after := Request(images(1))])
    assert after.arrays()[0].shape == (1, 10)


# --- JPEG files ---

GREY = {"mean": [0.5], "std": [0.25], "resize": 28, "crop": 28}


def test_a_damaged_jpeg_is_named_and_spoils_no_other_request(start):
    model = start("decode_jpeg", ("images",), preprocessing=json.dumps(GREY), dtype="float32")
    whole = jpeg(28, 28)
    good = Request(np.array([[whole]], dtype=object))
    bad = Request(np.array([[whole], [whole[:100]]], dtype=object))
    model.execute([bad, good])
    assert bad.error().code == TritonError.INVALID_ARG
    assert bad.error().message.startswith("jpeg 1: ")
    assert good.arrays()[0].shape == (1, 1, 28, 28)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (28, 28)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        (b"", "no JPEG file"),
        (b"garbage", "no JPEG file"),
        (png(), "no JPEG file"),
        (jpeg(28, 28)[:40], "no JPEG file"),
        (jpeg(280, 280)[:-2000], "damaged"),
    ],
)
def test_what_is_no_whole_jpeg_is_refused(file, complaint):
    with pytest.raises(python_model.RequestError, match=complaint):
        python_model.decode_jpeg(file, **GREY)


@pytest.mark.parametrize("size", [(10_000, 8_000), (20_000, 20_000)])  # Pillow has a limit too
def test_a_giant_jpeg_is_refused_before_it_is_decoded(monkeypatch, size):
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, "JPEG")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(python_model.RequestError, match="too many pixels"):
        python_model.decode_jpeg(buffer.getvalue(), **GREY)


@pytest.mark.parametrize(("width", "height"), [(300, 400), (401, 333), (256, 256), (97, 130)])
def test_photos_are_prepared_as_torchvision_prepares_them(width, height):
    file = jpeg(width, height, "RGB")
    prepare = ResNeXt101_32X8D_Weights.IMAGENET1K_V1.transforms()
    expected = prepare(Image.open(io.BytesIO(file))).numpy()
    found = python_model.decode_jpeg(file, data.IMAGENET_MEAN, data.IMAGENET_STD, 256, 224)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_grey_images_are_normalised_as_the_training_images_are(monkeypatch, tmp_path):
    file = jpeg(28, 28, quality=95)
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(file))))
    part = SimpleNamespace(data=pixels[None], targets=torch.zeros(1), classes=FashionMNIST.classes)
    monkeypatch.setattr(data.datasets.FashionMNIST, "__new__", lambda *_, **__: part)
    *_, test, _ = data._fashion_mnist(tmp_path)
    found = python_model.decode_jpeg(file, [data.FASHION_MEAN], [data.FASHION_STD], 28, 28)
    assert np.array_equal(found, test.images[0].numpy())


# --- names ---


def test_the_likeliest_classes_come_first_with_their_probabilities(start):
    names = ["shirt", "Kleid", "スカート", "bag"]
    model = start(
        "name_classes", ("classes", "scores"), classes=json.dumps(names), best=2
    )  # fmt: skip
    logits = np.array([[0, 1, 3, 2], [5, 5, -700, 4]], dtype=np.float32)
    model.execute([request := Request(logits)])
    classes, scores = request.arrays()
    assert [[name.decode() for name in row] for row in classes] == [
        ["スカート", "bag"],
        ["shirt", "Kleid"],
    ]
    expected = torch.from_numpy(logits).softmax(1).sort(descending=True, stable=True).values[:, :2]
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-6)
    assert scores.dtype == np.float32
