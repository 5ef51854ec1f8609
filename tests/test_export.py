import copy
import warnings

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn
from torch.nn import functional as F

from helpers import sparsity
from helpers.errors import HelpersError, InputError
from helpers.inference.export import export_onnx
from helpers.metrics import max_relative_error

SHAPE = (1, 28, 28)

TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}

GAPS = {"fp32": 1e-5, "fp16": 1e-2}


def images(count: int) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
class TestExportedFile:
    def test_takes_images_of_any_batch_and_gives_logits_in_its_type(self, exported, precision):
        path = exported[1][precision]
        graph = onnx.load(path).graph
        (taken,), (given,) = graph.input, graph.output
        assert (taken.name, given.name) == ("images", "logits")
        for tensor, sizes in ((taken, SHAPE), (given, (10,))):
            kind = tensor.type.tensor_type
            assert kind.elem_type == TYPES[precision]
            batch, *rest = kind.shape.dim
            assert batch.dim_param
            assert not batch.dim_value
            assert tuple(size.dim_value for size in rest) == sizes

    @pytest.mark.parametrize("batch", [1, 2, 5])
    def test_gives_the_logits_of_the_network(self, exported, precision, batch):
        model, files = exported
        session = onnxruntime.InferenceSession(files[precision])
        x = images(batch).numpy().astype("float16" if precision == "fp16" else "float32")
        (logits,) = session.run(["logits"], {"images": x})
        assert logits.shape == (batch, 10)
        with torch.inference_mode():
            reference = model(images(batch))
        assert max_relative_error(torch.from_numpy(logits), reference) < GAPS[precision]

    def test_is_one_file_with_all_weights_in_the_type(self, exported, precision):
        path = exported[1][precision]
        weights = onnx.load(path, load_external_data=False).graph.initializer
        assert {path.name for path in path.parent.iterdir()} == {"fp32.onnx", "fp16.onnx"}
        assert all(w.data_location == TensorProto.DEFAULT for w in weights)
        floats = {w.data_type for w in weights} - {TensorProto.INT64}
        assert floats == {TYPES[precision]}

    def test_holds_every_eligible_weight_2to4(self, pruned_resnext, resnext_files, precision):
        path = resnext_files[precision]
        graph = onnx.load(path).graph
        assert "BatchNormalization" not in {node.op_type for node in graph.node}
        weights = {w.name: torch.tensor(numpy_helper.to_array(w)) for w in graph.initializer}
        names = sparsity.eligible_weights(pruned_resnext)
        found = [weights[name] for name in names]
        assert len(found) == len(names) > 5
        assert all(map(sparsity.is_2to4, found))
        table = sparsity.verify_onnx(path)
        assert len(table[table.eligible]) == len(names)
        assert table[table.eligible].is_2to4.all()


def test_exporting_leaves_the_model_unchanged(tiny_net, tmp_path):
    before = copy.deepcopy(tiny_net.train().state_dict())
    export_onnx(tiny_net, tmp_path / "net.onnx", SHAPE, half=True)
    assert tiny_net.training
    for key, value in tiny_net.state_dict().items():
        assert torch.equal(before[key], value)
        assert before[key].dtype == value.dtype


def test_logits_of_another_shape_cannot_be_compared():
    with pytest.raises(HelpersError, match=r"shape \(2, 1\) cannot be compared .* \(2, 10\)"):
        max_relative_error(torch.ones(2, 1), torch.ones(2, 10))


def test_the_error_is_relative_to_the_largest_logit():
    reference = torch.tensor([[1.0, -4.0], [2.0, 0.0]])
    assert max_relative_error(reference, reference) == 0
    assert max_relative_error(reference + torch.tensor([0.0, 1.0]), reference) == 0.25


def test_deprecations_inside_the_exporter_are_hidden_and_other_warnings_are_not(
    tiny_net, tmp_path, monkeypatch
):
    real = torch.onnx.export

    def export(*args, **kwargs):
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.warn(f"a {category.__name__}", category, stacklevel=2)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", export)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        export_onnx(tiny_net, tmp_path / "net.onnx", SHAPE)
    assert [str(each.message) for each in seen] == ["a UserWarning"]


class Bessel(nn.Module):  # which ONNX does not have
    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_a_model_that_pytorch_cannot_export_is_refused_with_the_cause(tmp_path):
    with pytest.raises(InputError, match=r"cannot write Bessel as ONNX .*bessel_j0"):
        export_onnx(Bessel(), tmp_path / "model.onnx", SHAPE)
    assert not list(tmp_path.iterdir())


class BiasedAttention(nn.Module):  # as in BEiT and Swin
    def __init__(self):
        super().__init__()
        self.qkv, self.table = nn.Linear(28, 96), nn.Parameter(torch.randn(55, 4))
        places = torch.arange(28)
        self.register_buffer("index", places[:, None] - places + 27)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(-1, 28, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index].permute(2, 0, 1).unsqueeze(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x.transpose(1, 2).reshape(-1, 28, 32)


def test_attention_with_a_learned_bias_is_exported(tmp_path):
    model = BiasedAttention().eval()
    path = export_onnx(model, tmp_path / "model.onnx", SHAPE)
    (logits,) = onnxruntime.InferenceSession(path).run(None, {"images": images(3).numpy()})
    with torch.inference_mode():
        assert max_relative_error(torch.from_numpy(logits), model(images(3))) < 1e-5


class WindowedAttention(nn.Module):  # as in Hiera and Twins
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(28, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(-1, 4, 7, 3, 4, 8).permute(3, 0, 1, 4, 2, 5).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(-1, 28, 32)


def test_attention_with_five_dimensions_is_exported_with_any_batch(tmp_path):
    model = WindowedAttention().eval()
    path = export_onnx(model, tmp_path / "model.onnx", SHAPE)
    for batch in (1, 3):
        x = images(batch)
        (logits,) = onnxruntime.InferenceSession(path).run(None, {"images": x.numpy()})
        with torch.inference_mode():
            assert max_relative_error(torch.from_numpy(logits), model(x)) < 1e-5
