import pickle
from collections import OrderedDict

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from helpers.errors import HelpersError, InputError
from helpers.sparsity import (
    is_2to4,
    mask_2to4,
    prune_2to4_,
    save_compressed,
    verify_checkpoint,
    verify_file,
    verify_model,
    verify_onnx,
)
from helpers.sparsity.compressed import Checkpoint
from helpers.training.networks import create_model, create_on_meta, save_checkpoint

COLUMNS = [
    "layer", "type", "weight", "shape", "groups", "eligible", "is_2to4", "zeros", "reason",
    "judged",
]  # fmt: skip


class OwnConv(nn.Conv2d):
    """A reader's own kind of convolution."""


def mixed_net():
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 8, 3, bias=False),
            norm=nn.BatchNorm2d(8),
            own=OwnConv(8, 8, 1),
            grouped=nn.Conv2d(8, 8, 3, groups=2),
            up=nn.ConvTranspose2d(8, 8, 2),
            table=nn.Embedding(4, 8),
            fc=nn.Linear(8, 4),
        )
    )


def test_every_weight_of_a_network_has_its_row():
    table = verify_model(mixed_net())
    assert list(table.columns) == COLUMNS
    assert table.layer.tolist() == ["stem", "own", "grouped", "up", "fc"]
    assert table.weight.tolist() == [f"{name}.weight" for name in table.layer]
    assert table.type[1] == "OwnConv"
    assert table["shape"][0] == (8, 3, 3, 3)
    assert table.groups.tolist() == [1, 1, 2, 1, 1]
    assert table.eligible.tolist() == [False, True, False, False, True]
    assert (table.eligible == (table.reason == "")).all()
    assert not table.is_2to4.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_pruned_network_is_2to4_where_it_is_eligible(dtype):
    net = mixed_net()
    prune_2to4_(net)
    table = verify_model(net.to(dtype))
    assert table.is_2to4.tolist() == table.eligible.tolist()
    assert table.zeros[table.eligible].tolist() == [50, 50]


def test_one_value_too_many_is_found_in_a_network():
    net = mixed_net()
    prune_2to4_(net)
    with torch.no_grad():
        net.fc.weight[2, 4:8] = torch.tensor([1.0, 0, 1e-30, 1])
    assert verify_model(net).set_index("layer").is_2to4.to_dict()["fc"] is False


def test_a_network_and_its_onnx_file_have_the_same_verdicts(exported):
    model, files = exported
    columns = ["shape", "groups", "eligible", "is_2to4", "zeros", "reason"]
    ours = verify_model(model)[columns]
    assert ours.to_dict("records") == verify_onnx(files["fp32"])[columns].to_dict("records")


def resnet(sparse):
    torch.manual_seed(0)
    net = create_model("resnext14_8x1d", 10)
    if sparse:
        prune_2to4_(net)
    return net


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("compressed", [True, False])
def test_a_checkpoint_has_the_table_of_its_network(tmp_path, compressed, sparse):
    net, path = resnet(sparse), tmp_path / "net.safetensors"
    if compressed:
        save_compressed(net, path, network="resnext14_8x1d")
    else:
        save_checkpoint(net, path, "resnext14_8x1d")
    table = verify_file(path, create_on_meta("resnext14_8x1d", 10))
    pd.testing.assert_frame_equal(table, verify_model(net))
    assert table[table.eligible].is_2to4.tolist() == [sparse] * int(table.eligible.sum())


def test_a_checkpoint_that_names_no_network_is_judged_by_shapes(tmp_path):
    net, path = resnet(sparse=True), tmp_path / "net.safetensors"
    save_file(net.state_dict(), path)
    table = verify_checkpoint(path)
    assert list(table.columns) == COLUMNS[2:]
    dense = table[table.eligible & ~table.is_2to4]
    # Grouped convolutions with four channels and more: the file does not tell them from others.
    assert len(dense) == 3
    known = verify_checkpoint(path, create_on_meta("resnext14_8x1d", 10))
    assert known[known.eligible].is_2to4.all()


@pytest.mark.parametrize("compressed", [True, False])
def test_a_checkpoint_that_names_its_network_asks_for_the_model(tmp_path, compressed):
    net, path = resnet(sparse=True), tmp_path / "net.safetensors"
    if compressed:
        save_compressed(net, path, network="resnext14_8x1d")
    else:
        save_checkpoint(net, path, "resnext14_8x1d")
    for verify in (verify_file, verify_checkpoint):
        with pytest.raises(InputError) as error:
            verify(path)
        message = str(error.value)
        assert message.startswith(f"{path} is a checkpoint of resnext14_8x1d")
        assert "give the model, for example create_model('resnext14_8x1d', num_" in message


def difference(state, model, path):
    """Return how a file with the weights `state` is said to differ from `model`."""
    save_file(state, path)
    with pytest.raises(InputError) as error:
        verify_checkpoint(path, model)
    start, _, end = str(error.value).partition(": ")
    assert start == f"{path} does not hold the weights of this {type(model).__name__}"
    assert end.endswith(". Give the model that it was saved from.")
    return end.removesuffix(". Give the model that it was saved from.")


def state_of(name, classes=10):
    model = create_on_meta(name, classes)
    return {key: torch.zeros(value.shape) for key, value in model.state_dict().items()}


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    path, resnet50 = tmp_path / "net.safetensors", state_of("resnet50")
    other = create_on_meta("vgg11", 10)
    assert difference(resnet50, other, path) == "features.0.weight is missing in the file"
    # The same names, and grouped convolutions that would not be eligible.
    other = create_on_meta("resnext50_32x4d", 10)
    assert difference(resnet50, other, path) == (
        "layer1.0.conv1.weight is 64x64x1x1 in the file and 128x64x1x1 in the model"
    )


def test_a_checkpoint_of_a_deeper_network_is_refused(monkeypatch):
    """Of ResNet-152 it has every weight of ResNet-101, and more that would not be verified."""
    state = create_on_meta("resnet152", 10).state_dict()
    monkeypatch.setattr(
        "helpers.sparsity.verify.read_checkpoint", lambda _: Checkpoint(state, None, False)
    )
    with pytest.raises(InputError, match=r"layer2\.4\.conv1\.weight is not in the model"):
        verify_checkpoint("net.safetensors", create_on_meta("resnet101", 10))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1"])
def test_the_number_of_classes_may_differ(tmp_path, name):
    path = tmp_path / "net.safetensors"
    save_file(state_of(name, classes=7), path)
    table = verify_checkpoint(path, create_on_meta(name, 1000))
    assert table["shape"].iloc[-1][0] == 7


@pytest.mark.parametrize("name", ["2.weight", "2.bias"])
def test_only_the_outputs_of_the_last_layer_may_differ(tmp_path, name):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    state = model.state_dict() | {name: torch.zeros(4, 1)}
    assert f"{name} is 4x1 in the file" in difference(state, model, tmp_path / "net.safetensors")
    state = model.state_dict() | {"0.bias": torch.zeros(4)}
    assert "0.bias is 4 in the file" in difference(state, model, tmp_path / "net.safetensors")


def test_regnets_are_verified(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "net.safetensors"
    net = create_model("regnet_y_400mf", 10)
    prune_2to4_(net)
    save_checkpoint(net, path, "regnet_y_400mf")
    table = verify_checkpoint(path, create_on_meta("regnet_y_400mf", 1000))
    pd.testing.assert_frame_equal(table, verify_model(net))
    assert table[table.eligible].is_2to4.all()


def test_a_computed_weight_is_judged_as_it_is_multiplied_by(tmp_path):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), nn.Linear(4, 4))
    path = tmp_path / "net.safetensors"
    save_file(model.state_dict(), path)
    dense = verify_model(model)
    assert dense.weight.tolist() == ["0.parametrizations.weight.original1", "1.weight"]
    assert dense.reason.tolist() == ["", ""]
    assert dense["shape"].tolist() == [(4, 8), (4, 4)]
    assert dense.is_2to4.tolist() == [False, False]
    prune_2to4_(model)
    assert is_2to4(model[0].weight)
    assert verify_model(model).is_2to4.tolist() == [True, True]
    pd.testing.assert_frame_equal(verify_checkpoint(path, model), dense)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


def test_a_weight_that_is_2to4_only_where_it_is_stored_is_dense(tmp_path):
    model = nn.Sequential(Standardised(8, 4, 3))
    with torch.no_grad():
        model[0].weight.mul_(mask_2to4(model[0].weight))
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    for table in (verify_model(model), verify_checkpoint(tmp_path / "net.safetensors", model)):
        assert table[["eligible", "is_2to4"]].to_numpy().tolist() == [[False, False]]
        assert table.reason.tolist() == ["computed before each product: zeros do not stay zero"]
        assert table.zeros.tolist() == [0]


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
        self.head.weight = self.emb.weight


@pytest.mark.parametrize("stored", ["emb.weight", "head.weight"])
def test_a_tied_weight_is_verified_by_any_of_its_names(stored, tmp_path):
    model = LanguageModel()
    prune_2to4_(model)
    table = verify_model(model)
    assert table.weight.tolist() == ["head.weight"]
    assert table[["eligible", "is_2to4"]].to_numpy().tolist() == [[True, True]]
    save_file({stored: model.head.weight.detach()}, tmp_path / "net.safetensors")
    pd.testing.assert_frame_equal(verify_checkpoint(tmp_path / "net.safetensors", model), table)


def test_a_model_without_numbers_is_refused():
    with pytest.raises(InputError, match="on the device `meta`"):
        verify_model(create_on_meta("resnet18", 10))


def test_a_model_is_refused_for_an_onnx_file(tmp_path):
    with pytest.raises(InputError, match=r"net\.onnx is not a safetensors checkpoint.*Leave"):
        verify_file(tmp_path / "net.onnx", nn.Linear(4, 4))


def test_a_pickle_is_never_opened(tmp_path):
    path = tmp_path / "net.pt"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(HelpersError, match=r"/net\.pt may be a pickle"):
        verify_file(path)
    path = path.rename(tmp_path / "net.safetensors")
    with pytest.raises(HelpersError, match=r"/net\.safetensors is not a readable safetensors"):
        verify_file(path)
    path = path.rename(tmp_path / "net.onnx")
    with pytest.raises(HelpersError, match=r"/net\.onnx is not a valid ONNX model"):
        verify_file(path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))
