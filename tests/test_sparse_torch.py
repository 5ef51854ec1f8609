import copy
import json
import shutil
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from inference_cases import (
    GAP,
    fill_free_memory_with_nan,
    linear_network,
    prepared,
    random,
    the_fastest_is,
)
from torch import nn

from helpers.errors import InputError
from helpers.inference import cuda_graphs, sparse_torch
from helpers.inference.autotune import NOISE, Autotuner
from helpers.inference.cusparselt import why_no_sparse_gemms
from helpers.inference.errors import RunnerError
from helpers.inference.fold import fold_batch_norm
from helpers.inference.runners import TorchRunner
from helpers.inference.sparse_torch import SparseTorchRunner, use_gemms_
from helpers.measurement.benchmark import check_outputs
from helpers.metrics import max_relative_error

needs_cusparselt = pytest.mark.skipif(
    bool(why_no_sparse_gemms()), reason=why_no_sparse_gemms() or "it is here"
)


def test_the_model_that_was_given_is_not_changed(pruned):
    model, images = pruned
    model = copy.deepcopy(model).train()
    before = copy.deepcopy(model.state_dict())
    kinds = [type(layer) for layer in model.modules()]
    runner = SparseTorchRunner(model, "dense", torch.float32)
    runner(images)
    assert model.training
    assert [type(layer) for layer in model.modules()] == kinds
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_model_without_any_layer_for_the_kernels_is_refused(cusparselt):
    unpruned = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(InputError, match=r"No layer .* a sparse GEMM.*with prune_2to4_"):
        use_gemms_(fold_batch_norm(unpruned), "cusparselt")
    with pytest.raises(InputError, match=r"No layer .* a dense GEMM"):
        use_gemms_(fold_batch_norm(nn.Sequential(nn.Linear(10, 10))), "dense")
    with pytest.raises(InputError, match="no kernels 'cutlass'; choose from dense, cusparselt"):
        use_gemms_(fold_batch_norm(unpruned), "cutlass")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_loading_running_and_fetching_are_three_steps(no_gpu, pruned):
    model, images = pruned
    with torch.inference_mode():
        expected = model(images)
    runner = SparseTorchRunner(model, "dense")
    runner.load(images)
    runner.run()
    first = runner.fetch()
    runner.load(images[:1])
    assert torch.equal(runner.fetch(), first), "loading alone changes no result"
    runner.run()
    assert max_relative_error(first, expected) < GAP
    assert max_relative_error(runner.fetch(), expected[:1]) < GAP
    assert (first.dtype, first.device.type) == (torch.float32, "cpu")


def test_the_table_tells_the_kernel_of_every_layer_and_shape(no_gpu):
    runner = SparseTorchRunner(linear_network(), "dense")
    assert runner.kernel_choices().empty
    runner(random(3, 48))
    runner(random(2, 48))
    table = runner.kernel_choices()
    assert list(table.layer) == ["0", "0", "2", "2", "4", "4"]
    assert list(table.input) == ["3x48", "2x48", "3x64", "2x64", "3x32", "2x32"]
    assert set(table.kernel) == {"dense GEMM"}


def test_without_a_gpu_cusparselt_is_refused_in_one_sentence(no_gpu):
    with pytest.raises(RunnerError, match=r"No NVIDIA GPU was found.*kernels='dense'"):
        SparseTorchRunner(linear_network())
    assert why_no_sparse_gemms().count(".") == 1


def fake_gpu(monkeypatch, capability: tuple[int, int], built: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake GPU")
    monkeypatch.setattr(torch.backends, "cusparselt", SimpleNamespace(is_available=lambda: built))


def test_a_gpu_without_sparse_tensor_cores_or_cusparselt_is_refused(monkeypatch):
    fake_gpu(monkeypatch, (7, 5), built=True)
    with pytest.raises(RunnerError, match="a fake GPU has no Sparse Tensor Cores"):
        SparseTorchRunner(linear_network())
    fake_gpu(monkeypatch, (8, 0), built=False)
    with pytest.raises(RunnerError, match="built without cuSPARSELt"):
        SparseTorchRunner(linear_network())
    fake_gpu(monkeypatch, (8, 0), built=True)
    with pytest.raises(InputError, match=r"torch\.float32 .*use torch\.float16"):
        SparseTorchRunner(linear_network(), dtype=torch.float32)


def test_it_is_right_on_fresh_images_with_its_results_invalidated(no_gpu, pruned):
    model, images = pruned
    assert check_outputs(SparseTorchRunner(model, "dense"), model, images.shape[1:], 4) < GAP


def on_a_fake_gpu(model: nn.Module, kernels: str = "dense", **options: Any) -> SparseTorchRunner:
    """Return a runner that prepares and replays graphs, though on the CPU."""
    runner = SparseTorchRunner(model, kernels, **options)
    runner.on_gpu = True
    runner.start = runner.end = MagicMock()
    return runner


def test_each_shape_is_captured_once_and_replayed_on_the_images_that_are_loaded(
    no_gpu, captured, gpu_clock, pruned
):
    model, images = pruned
    runner = on_a_fake_gpu(model)
    with torch.inference_mode():
        expected = model(images)
    for part in (slice(0, 1), slice(1, 2), slice(0, 3), slice(2, 3)):
        own = images[part].clone()
        runner.load(own)
        own.fill_(float("nan"))  # the runner has a copy
        runner.run()
        assert max_relative_error(runner.fetch(), expected[part]) < GAP
    assert len(captured) == 2 * 2  # for each shape the layers and the products
    before = runner.fetch()
    runner.load(images)
    assert torch.equal(runner.fetch(), before), "loading alone changes no result"


def test_a_run_writes_all_that_was_invalidated(no_gpu, captured, gpu_clock, pruned):
    model, images = pruned
    runner = on_a_fake_gpu(model)
    expected = runner(images)
    runner.invalidate_output()
    assert runner.fetch().isnan().all()
    runner.run()
    assert torch.equal(runner.fetch(), expected)


def test_cudnn_looks_for_its_fastest_kernel_whenever_a_layer_meets_a_shape(
    no_gpu, captured, gpu_clock, pruned
):
    model, images = pruned
    runner, seen = on_a_fake_gpu(model), []
    for network in runner.networks.values():
        network.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.benchmark))
    before = torch.backends.cudnn.benchmark
    runner.load(images)
    assert len(seen) > 3
    assert all(seen)
    assert torch.backends.cudnn.benchmark == before


@pytest.mark.parametrize("kernels", ["cusparselt", "cusparselt without search"])
@pytest.mark.parametrize("fastest", ["layers", "dense", "cusparselt"])
def test_the_fastest_of_the_whole_networks_runs(
    no_gpu, captured, gpu_clock, cusparselt, monkeypatch, fastest, kernels
):
    """What wins layer by layer can lose as a network."""
    monkeypatch.setattr(sparse_torch, "_require_cusparselt", lambda *_: None)
    model = prepared(linear_network(), random(4, 48))
    runner = on_a_fake_gpu(model, kernels)
    assert list(runner.networks) == ["layers", "dense", kernels]
    fastest = kernels if fastest == "cusparselt" else fastest
    for name, network in runner.networks.items():
        milliseconds = 1.0 if name == fastest else 2.0
        network.register_forward_hook(
            lambda *_, own=milliseconds: gpu_clock.__setitem__(0, gpu_clock[0] + own)
        )
    images = random(3, 48)
    with torch.inference_mode():
        assert max_relative_error(runner(images), model(images)) < GAP
    (row,) = runner.network_times().to_dict("records")
    times = dict.fromkeys(runner.networks, 2.0) | {fastest: 1.0}
    assert row == {"input": "3x48", **times, "runs": fastest}
    gpu_clock[0] = 0.0
    runner.run()
    assert gpu_clock[0] == 1.0


INT8_ERROR = 0.05  # of the largest logit


def test_in_int8_the_model_computes_the_same_up_to_rounding(no_gpu, pruned):
    model, images = pruned
    calibration = random(32, *images.shape[1:], seed=3)
    runner = SparseTorchRunner(model, "dense_int8", calibration=calibration)
    with torch.inference_mode():
        assert 1e-4 < max_relative_error(runner(images), model(images)) < INT8_ERROR
    table = runner.kernel_choices()
    assert "dense INT8 GEMM" in set(table.kernel)
    assert list(runner.networks) == ["layers", "dense", "dense_int8"]


def test_a_layer_that_int8_does_not_fit_runs_in_another_kernel_and_the_table_says_why(no_gpu):
    calibration = random(32, 48)
    runner = SparseTorchRunner(linear_network(), "dense_int8", calibration=calibration)
    runner(random(3, 48))
    first, second, third = runner.kernel_choices().to_dict("records")
    assert [first["kernel"], second["kernel"]] == ["dense GEMM", "dense INT8 GEMM"]
    assert first["refused"] == {"dense INT8 GEMM": "64 rows, 48 columns: not multiples of 32"}
    assert third["refused"] == {"dense INT8 GEMM": "16 rows, 32 columns: not multiples of 32"}


def test_a_layer_that_int8_would_change_too_much_keeps_its_floating_point(no_gpu):
    calibration = random(32, 64)
    calibration[0, 0] = 1e4  # an outlier: the other inputs are rounded to zero
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[:, 0] = 0
    runner = SparseTorchRunner(model, "dense_int8", calibration=calibration)
    runner(random(3, 64))
    first, second = runner.kernel_choices().to_dict("records")
    assert first["kernel"] == "dense GEMM"
    assert "INT8 changes" in first["refused"]["dense INT8 GEMM"]
    assert second["kernel"] == "dense INT8 GEMM"


def test_int8_needs_calibration_images(no_gpu):
    with pytest.raises(InputError, match="'dense_int8' need calibration images"):
        SparseTorchRunner(linear_network(), "dense_int8")
    with pytest.raises(RunnerError, match=r"kernels='dense_int8' the model runs in dense"):
        SparseTorchRunner(linear_network(), "cusparselt_int8")
    narrow = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(InputError, match=r"No layer .* dense INT8 GEMM.* multiples of 32"):
        SparseTorchRunner(narrow, "dense_int8", calibration=random(8, 16))


def test_each_layer_runs_in_int8_where_that_is_the_fastest(
    no_gpu, captured, gpu_clock, cusparselt, monkeypatch
):
    """On the CPU, in FP16, with an integer product in the place of cuSPARSELt's."""
    monkeypatch.setattr(sparse_torch, "_require_cusparselt", lambda *_: None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU())
    prepared(model, random(4, 64))
    runner = on_a_fake_gpu(
        model, "cusparselt_int8", dtype=torch.float16, calibration=random(32, 64)
    )
    assert list(runner.networks) == ["layers", "dense", "cusparselt", "cusparselt_int8"]
    # The second layer's fastest kernel is in FP16.
    for layer, fastest in zip(runner.layers, ("sparse INT8 GEMM", "sparse GEMM"), strict=True):
        layer.autotuner = Autotuner(the_fastest_is(fastest))
    images = random(3, 64, seed=4)
    with torch.inference_mode():
        assert max_relative_error(runner(images), model(images)) < INT8_ERROR
    table = runner.kernel_choices()
    assert list(table.kernel) == ["sparse INT8 GEMM", "sparse GEMM"]
    kernels = ["dense layer", "dense GEMM", "sparse GEMM", "dense INT8 GEMM", "sparse INT8 GEMM"]
    assert set(kernels) <= set(table.columns)
    assert {"alg_id": 5, "split_k": 2, "split_k_mode": 1} in cusparselt.calls


def test_a_model_that_cannot_be_captured_is_refused_in_one_sentence(
    no_gpu, captured, gpu_clock, monkeypatch
):
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    runner = on_a_fake_gpu(prepared(linear_network(), random(4, 48)))
    monkeypatch.setattr(cuda_graphs, "capture", out_of_memory)
    with pytest.raises(RunnerError, match=r"cannot be prepared for 3 images of shape \(48,\)"):
        runner.load(random(3, 48))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_computes_the_same(no_gpu):
    model = prepared(linear_network(), random(4, 48))
    with torch.inference_mode():
        for runner in (
            TorchRunner(model, compile=True), SparseTorchRunner(model, "dense", compile=True),
        ):  # fmt: skip
            assert "compiled" in runner.name
            for images in (random(3, 48), random(5, 48, seed=1)):
                assert max_relative_error(runner(images), model(images)) < GAP


@pytest.mark.gpu
@needs_cusparselt
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["FP16", "BF16"])
def test_the_runner_gives_the_outputs_of_the_masked_network_on_the_gpu(pruned, dtype, tmp_path):
    model, images = pruned
    runner = SparseTorchRunner(model, dtype=dtype, cache=tmp_path / "kernels.json")
    tolerance = 1e-2 if dtype == torch.float16 else 5e-2  # BF16 has three bits fewer
    for seed in range(3):
        fresh = random(*images.shape, seed=10 + seed)
        fill_free_memory_with_nan()
        with torch.inference_mode():
            expected = model(fresh)
        assert max_relative_error(runner(fresh), expected) < tolerance
    assert len(json.loads((tmp_path / "kernels.json").read_text())) > 1


@pytest.mark.gpu
@needs_cusparselt
def test_the_int8_runner_gives_the_outputs_of_the_masked_network_on_the_gpu(pruned, tmp_path):
    model, images = pruned
    runner = SparseTorchRunner(
        model,
        "cusparselt_int8",
        cache=tmp_path / "kernels.json",
        calibration=random(32, *images.shape[1:], seed=3),
    )
    fill_free_memory_with_nan()
    with torch.inference_mode():
        assert max_relative_error(runner(images), model(images)) < INT8_ERROR


@pytest.mark.gpu
@needs_cusparselt
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["FP16", "BF16"])
def test_every_layer_keeps_the_kernel_that_was_measured_to_be_the_fastest(pruned, dtype):
    model, images = pruned
    runner = SparseTorchRunner(model, dtype=dtype)
    runner(images)
    for row in runner.kernel_choices().to_dict("records"):
        times = [row[kernel] for kernel in ("dense layer", "dense GEMM", "sparse GEMM")]
        assert row[row["kernel"]] <= min(times) / (1 - NOISE)
