"""The network of the case study itself, with random weights: ResNeXt-101 32x8d at 224x224."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torchvision.models import ResNeXt101_32X8D_Weights

from helpers import sparsity
from helpers.inference import engine, export
from helpers.training import networks
from helpers.training.networks import CheckpointError
from helpers.tutorial import inputs
from helpers.tutorial.settings import Settings

SHAPE = (3, 224, 224)
FILE = ResNeXt101_32X8D_Weights.IMAGENET1K_V1.url.rpartition("/")[2]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that goes at once: half a gigabyte is too much for pytest to keep."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return networks.create_model("resnext101_32x8d", num_classes=1000)


@pytest.fixture(scope="module")
def sparse_file(dense, folder) -> Path:
    sparsity.prune_2to4_(dense)
    return export.export_onnx(dense, folder / "sparse.onnx", SHAPE, half=True)


def test_imagenette_starts_from_torchvisions_weights_with_imagenettes_ten_classes(
    dense, folder, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    cache = folder / "torch" / "hub" / "checkpoints" / FILE
    cache.parent.mkdir(parents=True)
    torch.save(dense.state_dict(), cache)
    model = inputs.load_pretrained(Settings.load("imagenette"))
    cache.unlink()

    assert model.fc.out_features == 10
    ours = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]  # tench to parachute
    assert torch.equal(model.fc.weight, dense.fc.weight[ours])
    assert torch.equal(model.fc.bias, dense.fc.bias[ours])
    rest = {key: value for key, value in dense.state_dict().items() if not key.startswith("fc.")}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in rest.items())


@pytest.mark.parametrize(
    "content", [b"", b"cut off by a lost connection", b"PK\x03\x04 and no more"]
)
def test_a_damaged_file_of_torchvisions_weights_is_refused_in_one_sentence(
    monkeypatch, tmp_path, content
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / FILE).write_bytes(content)
    monkeypatch.setattr(networks, "create_model", lambda *_, **__: nn.Identity())  # saves seconds
    with pytest.raises(CheckpointError, match=FILE):
        inputs.load_pretrained(Settings.load("imagenette"))


def test_all_71_eligible_weights_of_the_exported_file_are_2to4(sparse_file):
    table = sparsity.verify_onnx(sparse_file)
    eligible = table[table.eligible]
    assert (len(eligible), len(table)) == (71, 105)
    assert eligible.is_2to4.all()
    assert (eligible.zeros == 50).all()
    assert (table[~table.eligible].zeros < 1).all(), "the others stay dense"


def test_the_exported_file_is_fp16_with_a_dynamic_batch(sparse_file):
    graph = onnx.load(sparse_file).graph
    batch, *shape = graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param
    assert tuple(size.dim_value for size in shape) == SHAPE
    kinds = {tensor.data_type for tensor in graph.initializer} - {onnx.TensorProto.INT64}
    assert kinds == {onnx.TensorProto.FLOAT16}


def test_an_engine_of_it_is_built_without_a_gpu(sparse_file):
    trt = pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT-RTX is not installed", exc_type=ImportError
    )
    builder = engine.Builder("TensorRT-RTX", trt, trt.__version__, "the test asks for it")
    plan = sparse_file.with_suffix(".engine")
    batches = (1, 256, 256)  # those of the presets imagenette and full
    report = engine.build_engine(
        sparse_file, plan, SHAPE, batches, compute_capability="8.6", builder=builder
    )
    weights = 88.8e6 * 2  # parameters of the network, two bytes each
    assert plan.stat().st_size > 0.9 * weights
    assert report.built_for == "compute capability 8.6"
