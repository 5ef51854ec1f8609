"""Serve the models of the case study: `python -m helpers repository` and `serve`.

Explained in `09_serve_with_triton.ipynb`.
"""

import io
import re
import signal
import threading
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import FashionMNIST
from torchvision.transforms.functional import to_pil_image

from helpers.serving.repository import Batching, Preprocessing, ServedModel, write_repository
from helpers.serving.server import TritonServer
from helpers.training.data import FASHION_MEAN, FASHION_STD, IMAGENET_MEAN, IMAGENET_STD
from helpers.tutorial.artifacts import NETWORKS, Artifacts
from helpers.tutorial.checks import TutorialError
from helpers.tutorial.inputs import load_splits
from helpers.tutorial.settings import Settings, relative

FOLDER = "09_repository"  # among the artifacts
# By backend: the artifact that it serves.
FILES = {
    "python": "04_{}_fp32.onnx",
    "onnxruntime": "04_{}_fp16.onnx",
    "tensorrt": "05_{}.engine",
}


def preprocessing(settings: Settings) -> Preprocessing:
    """Return what becomes of the JPEG files of a preset: what notebook 01 does with its images."""
    if settings.dataset == "FashionMNIST":
        return Preprocessing([FASHION_MEAN], [FASHION_STD], resize=28, crop=28)
    return Preprocessing(IMAGENET_MEAN, IMAGENET_STD, resize=256, crop=224)


def as_jpeg(image: Tensor, preprocessing: Preprocessing) -> bytes:
    """Return a normalised image (C, H, W) as the bytes of a JPEG file."""
    mean, std = (
        torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std)
    )
    pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    buffer = io.BytesIO()
    to_pil_image(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def class_names(settings: Settings) -> list[str]:
    """Return the names of the classes of a preset."""
    if settings.dataset == "FashionMNIST":
        return list(FashionMNIST.classes)
    return load_splits(settings).classes


def write_case_study(
    settings: Settings, folder: Path | None = None, backend: str = "python"
) -> Path:
    """Write the dense and the sparse model of a preset as a model repository; return its folder.

    Args:
        settings: the preset.
        folder: to write, or to write again; among the artifacts unless given.
        backend: `python`, `onnxruntime` or `tensorrt`, as `ServedModel` takes it.

    Raises:
        TutorialError: there is no such backend, a model is missing, or its engine is not of
            TensorRT.
    """
    if backend not in FILES:
        raise TutorialError(f"There is no backend {backend!r}; choose from {', '.join(FILES)}.")
    artifacts = Artifacts(settings)
    models = []
    for network in NETWORKS:
        file = FILES[backend].format(network)
        path = artifacts.require(file)
        if backend == "tensorrt":
            capability = _compute_capability(artifacts.facts(file))
            models.append(ServedModel(network, {capability: path}, backend))
        else:
            models.append(ServedModel(network, path, backend))
    return write_repository(
        folder or artifacts.path(FOLDER),
        models,
        settings.image_shape,
        class_names(settings),
        preprocessing(settings),
        Batching(sizes=settings.batch_sizes),
        overwrite=True,
    )


def _compute_capability(facts: dict) -> str:
    """Return the compute capability of the GPU that an engine was built for."""
    if facts["builder"] != "TensorRT":
        raise TutorialError(
            f"The engines of this preset are {facts['builder']}'s, which Triton does not run. Run "
            "notebook 05 on a machine with TensorRT, in the version of the container that is to "
            "serve them, or choose another backend."
        )
    if found := re.fullmatch(r"compute capability (\d+\.\d+)", facts["built_for"]):
        return found[1]
    # TensorRT builds for the GPU of this machine.
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def write(settings: Settings, folder: Path | None, backend: str) -> None:
    """Write a model repository and say where it is."""
    print(f"{relative(write_case_study(settings, folder, backend))} is written.")


def serve(settings: Settings, ports: tuple[int, int, int], log: Path | None) -> None:
    """Write the model repository, and serve it until Ctrl-C or SIGTERM."""
    repository = write_case_study(settings)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with TritonServer(repository, ports, log) as server:
        print(
            f"Serving {relative(repository)}: HTTP {server.http_address}, gRPC "
            f"{server.grpc_address}, metrics http://{server.metrics_address}/metrics. "
            "Ctrl-C stops it.",
            flush=True,
        )
        while not stop.wait(0.5):
            server.require_alive()
    print("The server has stopped.")
