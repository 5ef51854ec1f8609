"""`benchmarks/networks.py` on two networks of torchvision, and its oracle on small ones."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import network_steps
import networks
from helpers.sparsity import prune_2to4_
from network_catalogue import Network
from network_steps import OK, STEPS, try_network
from product_oracle import file_weights, watch


def tried(make, name="small") -> dict[str, tuple[str, str]]:
    """Return the verdict on each step, and its reason."""
    rows = try_network(Network("tests", name, make))
    return {row["step"]: (row["verdict"], row["reason"]) for row in rows}


def small() -> tuple[nn.Module, tuple]:
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(256, 8)
    return nn.Sequential(*layers), (torch.randn(2, 3, 6, 6),)


def test_two_networks_pass_every_step_in_processes_of_their_own(tmp_path):
    app = networks.typer.Typer()
    app.command()(networks.main)
    out = tmp_path / "networks.json"
    arguments = ["--out", str(out), "--only", "torchvision/*"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    assert {"date", "machine", "versions", "what"} <= set(record)
    assert (record["networks"], record["faults"]) == ({"torchvision": 2}, 0)
    assert [row["step"] for row in record["rows"]] == 2 * list(STEPS)
    assert {row["verdict"] for row in record["rows"]} == {OK}, record["rows"]
    assert "2 networks, 0 faults" in result.output
    # What the file has is not tried again.
    assert "0 faults" in CliRunner().invoke(app, arguments).output
    assert json.loads(out.read_text()) == record
    out.write_text(json.dumps(record | {"versions": record["versions"] | {"timm": "0"}}))
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "another machine or of other versions" in " ".join(
        refused.output.replace("│", " ").split()
    )


def test_a_network_that_is_killed_leaves_the_steps_that_it_had_done():
    network = Network("torchvision", "no such network", small)
    rows = networks.try_apart(network, seconds=60, gib=3)
    assert rows[0]["verdict"] == "raw error"
    assert {row["verdict"] for row in rows[1:]} == {"skipped"}
    assert networks._why_stopped(-24, 60, [])[0] == "limit"


@pytest.mark.parametrize(
    ("step", "function", "wrong", "verdict"),
    [
        ("prune", "prune_2to4_", lambda model: {}, "wrong"),
        ("hold", "hold_masks", lambda *_: type("Held", (), {"remove": lambda self: 0})(), "wrong"),
        ("report", "sparsity_report", lambda *_, **__: 1 / 0, "raw error"),
    ],
)
def test_a_function_that_does_the_wrong_thing_is_found(monkeypatch, step, function, wrong, verdict):
    monkeypatch.setattr(network_steps, function, wrong)
    assert tried(small)[step][0] == verdict


def test_a_verifier_that_passes_everything_is_found(monkeypatch):
    for name in ("verify_model", "verify_onnx"):
        verify = getattr(network_steps, name)
        monkeypatch.setattr(network_steps, name, lambda x, v=verify: v(x).assign(is_2to4=True))
    found = tried(small)
    assert found["verify model"][0] == "false PASS"
    assert found["verify file"][0] == "false PASS"


def test_a_verifier_that_fails_everything_is_found(monkeypatch):
    for name in ("verify_model", "verify_onnx"):
        verify = getattr(network_steps, name)
        monkeypatch.setattr(network_steps, name, lambda x, v=verify: v(x).assign(is_2to4=False))
    found = tried(small)
    assert found["verify model"][0] == "false FAIL"
    assert found["verify file"][0] == "false FAIL"


def test_channels_moved_in_one_layer_only_are_found(monkeypatch):
    permute = network_steps.permute_channels_

    def half(model: nn.Module, *arguments, **options):
        before = model[0].weight.detach().clone()
        report = permute(model, *arguments, **options)
        with torch.no_grad():
            model[0].weight.copy_(before)
        return report

    monkeypatch.setattr(network_steps, "permute_channels_", half)
    assert tried(small)["permute"][0] == "wrong"


# --- the oracle ---


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class Transposed(nn.Module):  # as transformers' Conv1D
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        return torch.addmm(x.new_zeros(4), x, self.weight)


def test_the_oracle_sees_the_numbers_that_are_multiplied():
    model = nn.Sequential(Standardised(8, 8, 1), nn.Flatten(), nn.Linear(8, 8), Transposed())
    prune_2to4_(model, exclude=["0"])
    with torch.no_grad():
        model[0].weight[:, 2:4] = 0
        model[0].weight[:, 6:8] = 0
        model[3].weight[[1, 2, 5, 6]] = 0  # along its inputs, which are its first dimension
    products = watch(model, (torch.randn(1, 8, 1, 1),))
    assert [product.is_2to4 for product in products] == [False, True, True]
    assert [product.macs for product in products] == [64, 64, 32]
    assert [product.weight.stored for product in products] == [False, True, True]
    assert products[0].weight.parameters == {id(model[0].weight)}


def test_the_oracle_sees_all_products_of_attention_and_recurrent_layers():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 5, 8)
    products = watch(attention, (x, x, x))
    weights = [product for product in products if product.weight.parameters]
    assert sum(product.macs for product in weights) == 4 * 5 * 8 * 8
    assert sum(product.macs for product in products) == 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8
    assert sum(p.macs for p in watch(nn.LSTM(8, 4), (x,))) == 5 * 16 * (8 + 4)


def test_a_constant_that_a_product_has_computed_is_no_weight(tmp_path):
    rng = np.random.default_rng(0)
    stored = {name: rng.standard_normal((8, 8)).astype("f4") for name in ("w", "table", "project")}
    stored["w"][[0, 1, 4, 5]] = 0
    nodes = [
        helper.make_node("MatMul", ["table", "project"], ["positions"], "constants"),
        helper.make_node("MatMul", ["x", "positions"], ["scores"], "scores"),
        helper.make_node("Transpose", ["w"], ["turned"], "turn"),
        helper.make_node("Gemm", ["scores", "turned"], ["y"], "weights", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    found = {each.node: each for each in file_weights(path, {"x": np.ones((2, 8), "f4")})}
    assert found.keys() == {"scores", "weights"}
    assert found["scores"].computed
    assert not found["weights"].computed
    assert found["weights"].is_2to4


def test_a_table_that_queries_are_multiplied_by_takes_the_place_of_keys(tmp_path):
    rng = np.random.default_rng(0)
    stored = {name: rng.standard_normal((8, 8)).astype("f4") for name in ("q", "k", "table", "v")}
    nodes = [
        helper.make_node("MatMul", ["x", "q"], ["queries"], "queries"),
        helper.make_node("MatMul", ["x", "k"], ["keys"], "keys"),
        helper.make_node("Transpose", ["keys"], ["turned"], "turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["queries", "turned"], ["scores"], "scores"),
        helper.make_node("MatMul", ["queries", "table"], ["positions"], "positions"),
        helper.make_node("Add", ["scores", "positions"], ["sum"], "sum"),
        helper.make_node("Softmax", ["sum"], ["shares"], "softmax", axis=-1),
        helper.make_node("MatMul", ["shares", "v"], ["y"], "weights"),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 8])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    found = file_weights(path, {"x": np.ones((1, 8, 8), "f4")})
    assert {each.node: each.computed for each in found} == {
        "queries": False, "keys": False, "positions": True, "weights": False,
    }  # fmt: skip
