import types
from dataclasses import replace

import pytest
import torch

from helpers.errors import InputError
from helpers.inference import engine, sparse_torch
from helpers.inference.dense_cpu import DenseCpuRunner
from helpers.inference.engine import Builder
from helpers.inference.errors import EngineError, RunnerError
from helpers.inference.runners import OnnxRunner
from helpers.inference.sparse_cpu import SparseCpuRunner
from helpers.inference.sparse_torch import SparseTorchRunner
from helpers.sparsity import prune_2to4_
from helpers.training.networks import create_model, load_checkpoint, save_checkpoint
from helpers.tutorial import backends
from helpers.tutorial.artifacts import ArtifactError, Artifacts
from helpers.tutorial.backends import (
    BACKENDS,
    backend_status,
    find_controls,
    find_runner,
    find_runners,
    network_files,
)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def put(artifacts: Artifacts, name: str, content: bytes) -> None:
    with artifacts.writing(name) as path:
        path.write_bytes(content)


def build_with(name: str, monkeypatch) -> None:
    """Let a GPU and PyCUDA be here, and a builder of that name."""
    builder = Builder(name, types.SimpleNamespace(), "1.0", "the test says so")
    monkeypatch.setattr(backends, "why_no_engine", str)
    monkeypatch.setattr(engine, "find_builder", lambda: builder)


def save_checkpoints(artifacts: Artifacts) -> None:
    """Leave the dense and the sparse checkpoint."""
    torch.manual_seed(0)
    model = create_model("resnext14_8x1d", 10)
    for name in ("01_dense", "03_retrained"):
        with artifacts.writing(f"{name}.safetensors") as path:
            save_checkpoint(model, path, "resnext14_8x1d")
        prune_2to4_(model)


def test_on_a_cpu_the_sparse_network_runs_beside_the_fastest_dense_runner(no_gpu, tiny_settings):
    artifacts = Artifacts(tiny_settings)
    save_checkpoints(artifacts)
    found = find_runners(artifacts)
    assert list(found) == ["dense", "sparse"]
    dense, sparse = found.values()
    assert isinstance(dense, DenseCpuRunner)
    assert isinstance(sparse, SparseCpuRunner)
    twin = find_runner(artifacts, "twin")
    assert isinstance(twin, SparseCpuRunner)
    assert (sparse.kernels, twin.kernels) == ("sparse", "twin")
    assert network_files() == {
        "dense": "01_dense.safetensors", "sparse": "03_retrained.safetensors",
    }  # fmt: skip
    for runner, file in ((dense, "01_dense"), (sparse, "03_retrained"), (twin, "03_retrained")):
        expected = load_checkpoint(artifacts.require(f"{file}.safetensors"))
        images = torch.randn(2, 1, 28, 28)
        with torch.inference_mode():
            assert torch.allclose(runner.model(images), expected(images), atol=1e-5)


def test_the_controls_on_a_cpu_are_the_twin_and_another_copy_of_the_dense_network(
    no_gpu, tiny_settings
):
    artifacts = Artifacts(tiny_settings)
    save_checkpoints(artifacts)
    dense, controls = find_runner(artifacts, "dense"), find_controls(artifacts)
    assert list(controls) == ["twin", "dense again"]
    assert controls["twin"].kernels == "twin"
    assert type(controls["dense again"]) is type(dense)
    assert controls["dense again"] is not dense
    caches = {runner.cache.path for runner in (dense, controls["dense again"])}
    assert caches == {artifacts.folder / "06_kernels.json"}, "both measure once"


def test_without_cpu_kernels_the_control_is_another_copy_of_the_dense_network(
    no_gpu, tiny_settings, exported
):
    artifacts = Artifacts(tiny_settings)
    put(artifacts, "04_dense_fp32.onnx", exported[1]["fp32"].read_bytes())
    controls = find_controls(artifacts, "ONNX Runtime")
    assert list(controls) == ["dense again"]
    assert isinstance(controls["dense again"], OnnxRunner)


def test_only_the_cpu_kernels_have_a_twin(no_gpu, tiny_settings):
    with pytest.raises(RunnerError, match=r"no network .twin. on this backend; .* dense, sparse"):
        find_runner(Artifacts(tiny_settings), "twin", "ONNX Runtime")


def test_without_a_checkpoint_the_notebook_is_named(no_gpu, tiny_settings):
    with pytest.raises(ArtifactError, match=r"01_dense\.safetensors is missing\. Run 01_"):
        find_runners(Artifacts(tiny_settings))


def test_onnx_runtime_runs_both_networks_in_fp32(no_gpu, tiny_settings, exported):
    artifacts = Artifacts(tiny_settings)
    for name in ("dense", "sparse"):
        put(artifacts, f"04_{name}_fp32.onnx", exported[1]["fp32"].read_bytes())
    found = find_runners(artifacts, "ONNX Runtime")
    assert list(found) == ["dense", "sparse"]
    assert all(isinstance(runner, OnnxRunner) for runner in found.values())
    assert found["dense"].name == found["sparse"].name
    assert "FP32" in found["dense"].name


@pytest.mark.parametrize("there", [[], ["dense"], ["sparse"]])
def test_a_missing_onnx_file_names_its_notebook(no_gpu, tiny_settings, exported, there):
    artifacts = Artifacts(tiny_settings)
    for name in there:
        put(artifacts, f"04_{name}_fp32.onnx", exported[1]["fp32"].read_bytes())
    missing = "sparse" if there == ["dense"] else "dense"
    with pytest.raises(
        ArtifactError, match=rf"04_{missing}_fp32\.onnx is missing\. Run 04_export_onnx\.ipynb"
    ):
        find_runners(artifacts, "ONNX Runtime")


def test_without_a_gpu_each_backend_that_needs_one_says_so(no_gpu):
    reasons = backend_status()
    gpu, cpu = ["TensorRT", "cuSPARSELt", "TensorRT-RTX"], ["2:4 CPU kernels", "ONNX Runtime"]
    assert list(reasons) == gpu + cpu
    for name in cpu:
        assert reasons.pop(name) == ""
    for reason in reasons.values():
        assert reason.startswith("No NVIDIA GPU was found")
        assert "\n" not in reason


def test_tensorrt_comes_first_where_it_builds(monkeypatch, tiny_settings):
    build_with("TensorRT", monkeypatch)
    assert backend_status()["TensorRT"] == ""
    assert backend_status()["TensorRT-RTX"] == "Engines are TensorRT's here: the test says so."
    assert network_files() == {"dense": "05_dense.engine", "sparse": "05_sparse.engine"}
    with pytest.raises(ArtifactError, match=r"05_dense\.engine is missing\. Run 05_build_engine"):
        find_runners(Artifacts(tiny_settings))


@pytest.mark.parametrize("cusparselt", ["", "PyTorch was built without it."])
def test_tensorrt_rtx_which_ignores_sparsity_comes_after_cusparselt(monkeypatch, cusparselt):
    build_with("TensorRT-RTX", monkeypatch)
    backend = replace(BACKENDS["cuSPARSELt"], why_not=lambda: cusparselt)
    monkeypatch.setitem(BACKENDS, "cuSPARSELt", backend)
    files = network_files()
    assert files["sparse"] == ("05_sparse.engine" if cusparselt else "03_retrained.safetensors")


def test_without_any_builder_the_reason_is_the_builders(monkeypatch):
    def none() -> Builder:
        raise EngineError("No engine builder loads here.")

    build_with("TensorRT", monkeypatch)
    monkeypatch.setattr(engine, "find_builder", none)
    assert backend_status()["TensorRT"] == "No engine builder loads here."


def test_cusparselt_runs_the_checkpoints_of_both_networks(monkeypatch, no_gpu, tiny_settings):
    artifacts = Artifacts(tiny_settings)
    save_checkpoints(artifacts)
    monkeypatch.setattr(sparse_torch, "_require_cusparselt", lambda *_: None)
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight)
    monkeypatch.setitem(BACKENDS, "cuSPARSELt", replace(BACKENDS["cuSPARSELt"], why_not=str))
    dense, sparse = find_runners(artifacts, "cuSPARSELt").values()
    assert type(dense) is type(sparse) is SparseTorchRunner
    dense_kernels = [list(layer.kernels) for layer in dense.layers]
    assert dense_kernels == [list(layer.kernels)[:-1] for layer in sparse.layers]
    assert all(list(layer.kernels)[-1] == "sparse GEMM" for layer in sparse.layers)


def test_a_backend_that_is_asked_for_must_run_here(no_gpu, tiny_settings):
    with pytest.raises(RunnerError, match="No NVIDIA GPU was found, so cuSPARSELt's"):
        find_runners(Artifacts(tiny_settings), "cuSPARSELt")
    with pytest.raises(RunnerError, match=r"^There is no backend .ORT.; there are TensorRT, "):
        find_runners(Artifacts(tiny_settings), "ORT")


def test_one_network_is_made_without_the_other(no_gpu, tiny_settings, exported):
    artifacts = Artifacts(tiny_settings)
    put(artifacts, "04_dense_fp32.onnx", exported[1]["fp32"].read_bytes())
    first, second = (find_runner(artifacts, "dense", "ONNX Runtime") for _ in range(2))
    assert first is not second
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(first(images), second(images))


def test_a_file_that_does_not_run_names_the_notebook_that_makes_it(no_gpu, tiny_settings):
    artifacts = Artifacts(tiny_settings)
    put(artifacts, "04_dense_fp32.onnx", b"not an ONNX file")
    with pytest.raises(RunnerError) as raised:
        find_runner(artifacts, "dense", "ONNX Runtime")
    message = str(raised.value)
    assert "04_dense_fp32.onnx cannot be loaded" in message
    assert message.endswith(" Run 04_export_onnx.ipynb again.")


@pytest.mark.parametrize("error", [EngineError, RunnerError, InputError])
def test_an_engine_of_another_gpu_names_the_notebook_that_builds_it(
    monkeypatch, tiny_settings, error
):
    def refuse(_: object) -> None:
        raise error("This engine is of another GPU.")

    build_with("TensorRT", monkeypatch)
    monkeypatch.setattr(backends, "TensorRTRunner", refuse)
    artifacts = Artifacts(tiny_settings)
    put(artifacts, "05_sparse.engine", b"an engine")
    with pytest.raises(
        RunnerError, match=r"^This engine is of another GPU\. Run 05_build_engine\.ipynb again\.$"
    ):
        find_runner(artifacts, "sparse", "TensorRT")
