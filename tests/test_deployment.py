"""The models of the case study in a model repository, and `python -m helpers serve`."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNeXt101_32X8D_Weights

pytest.importorskip("tritonclient.grpc", reason="tritonclient is missing", exc_type=ImportError)

import tritonclient.grpc

from helpers.serving.errors import ServingError
from helpers.serving.python_model import decode_jpeg
from helpers.serving.repository import read_config
from helpers.serving.server import free_ports
from helpers.serving.triton_binary import find_triton
from helpers.tutorial import deployment
from helpers.tutorial.artifacts import NETWORKS, ArtifactError, Artifacts
from helpers.tutorial.checks import TutorialError
from helpers.tutorial.settings import PRESETS, project_root


@pytest.fixture
def artifacts(settings, resnext_files):
    """The artifacts of notebooks 04 and 05, both networks the same."""
    artifacts = Artifacts(settings)
    for network in NETWORKS:
        for precision, source in resnext_files.items():
            with artifacts.writing(f"04_{network}_{precision}.onnx") as path:
                path.write_bytes(source.read_bytes())
        facts = {"builder": "TensorRT", "built_for": "compute capability 9.0"}
        with artifacts.writing(f"05_{network}.engine", facts=facts) as path:
            path.write_bytes(b"an engine")
    return artifacts


@pytest.mark.parametrize("backend", deployment.FILES)
def test_every_backend_gets_the_files_that_it_runs(settings, artifacts, backend):
    folder = deployment.write_case_study(settings, backend=backend)
    assert folder == artifacts.path("09_repository")
    for network in NETWORKS:
        config = read_config(folder / network / "config.pbtxt")
        assert config.max_batch_size == max(settings.batch_sizes)
        assert (config.backend or config.platform).startswith(backend)
        name = "model_9_0.plan" if backend == "tensorrt" else "model.onnx"
        source = artifacts.path(deployment.FILES[backend].format(network))
        assert (folder / network / "1" / name).read_bytes() == source.read_bytes()
    labels = (folder / "sparse" / "labels.txt").read_text().splitlines()
    assert (len(labels), labels[-1]) == (10, "Ankle boot")


def test_a_repository_can_be_written_again(settings, artifacts):
    for _ in range(2):
        deployment.write_case_study(settings)


def test_a_missing_model_names_its_notebook(settings):
    with pytest.raises(ArtifactError, match=r"04_dense_fp32\.onnx is missing\. Run 04_export"):
        deployment.write_case_study(settings)


def test_an_unknown_backend_is_one_sentence(settings, artifacts):
    with pytest.raises(TutorialError, match="no backend 'pytorch'; choose from python"):
        deployment.write_case_study(settings, backend="pytorch")


def test_an_engine_that_triton_does_not_run_is_refused(settings, artifacts):
    facts = {"builder": "TensorRT-RTX", "built_for": "compute capability 8.6"}
    with artifacts.writing("05_dense.engine", facts=facts) as path:
        path.write_bytes(b"an engine")
    with pytest.raises(TutorialError, match="TensorRT-RTX's, which Triton does not run"):
        deployment.write_case_study(settings, backend="tensorrt")


def test_an_engine_for_this_gpu_gets_its_compute_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    facts = {"builder": "TensorRT", "built_for": "NVIDIA H100"}
    assert deployment._compute_capability(facts) == "9.0"


@pytest.mark.parametrize("preset", PRESETS)
def test_jpeg_files_become_images_of_the_presets_shape(preset):
    settings = PRESETS[preset]
    preprocessing = deployment.preprocessing(settings)
    image = torch.zeros(settings.image_shape)
    file = deployment.as_jpeg(image, preprocessing)
    decoded = decode_jpeg(
        file, preprocessing.mean, preprocessing.std, preprocessing.resize, preprocessing.crop
    )
    assert decoded.shape == settings.image_shape
    # The mean colour, but for the rounding to pixels: two of 255 levels at most.
    assert np.abs(decoded).max() <= 2 / 255 / min(preprocessing.std)


def test_photos_are_normalised_as_for_the_published_weights():
    preprocessing = deployment.preprocessing(PRESETS["full"])
    prepare = ResNeXt101_32X8D_Weights.IMAGENET1K_V1.transforms()
    assert (preprocessing.resize, preprocessing.crop) == (*prepare.resize_size, *prepare.crop_size)
    assert list(preprocessing.mean) == prepare.mean
    assert list(preprocessing.std) == prepare.std


def test_a_picture_survives_the_way_through_a_jpeg_file(settings):
    preprocessing = deployment.preprocessing(settings)
    ramp = np.add.outer(np.arange(28), np.arange(28)).astype(np.float32) / 54
    image = torch.from_numpy((ramp[None] - preprocessing.mean[0]) / preprocessing.std[0])
    picture = Image.open(io.BytesIO(deployment.as_jpeg(image, preprocessing)))
    assert picture.size == (28, 28)
    assert np.abs(np.asarray(picture) / 255 - ramp).max() < 0.05


def test_serve_answers_until_it_is_told_to_stop(settings, artifacts, tmp_path):
    try:
        find_triton()
    except ServingError as error:
        pytest.skip(str(error))
    http, grpc, metrics = free_ports()
    options = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
    target = tmp_path / "served" / settings.preset
    shutil.copytree(settings.artifacts_dir, target)
    environment = os.environ | {"TUTORIAL_ARTIFACTS": str(target.parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "helpers", "serve", *options],
        cwd=project_root(),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        said = [process.stdout.readline() for _ in range(2)]
        assert re.match("Serving .*Ctrl-C stops it", said[1]), said
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc}") as client:
            assert client.is_model_ready("sparse_jpeg")
    finally:
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert rest == "The server has stopped.\n"
    record = json.loads((target / "09_repository" / "repository.json").read_text())
    assert set(record["models"]) == set(NETWORKS)
