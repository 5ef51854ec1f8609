import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from helpers.errors import InputError
from helpers.sparsity.onnx_weights import node_weights


def macs(tmp_path, op, shapes, constants, shape_now=None, domain="", **attributes):
    """Return the MACs of each row of one node, by the input that is its weight.

    `shapes` are those of the inputs that come at run time, `shape_now` another one for the first.
    """
    names = [*shapes, *constants]
    graph = helper.make_graph(
        [helper.make_node(op, sorted(names), ["y"], domain=domain, **attributes)],
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, s) for name, s in shapes.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones(s, "f4"), name) for name, s in constants.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    given = None if shape_now is None else {next(iter(shapes)): shape_now}
    return {each.operand: each.macs for each in node_weights(path, given, with_macs=True)}


@pytest.mark.parametrize(("op", "shapes", "constants", "attributes", "expected"), [
    ("Conv", {"a": (2, 8, 7, 7)}, {"b": (16, 8, 3, 3)}, {}, {"b": 2 * 5 * 5 * 16 * 8 * 9}),
    ("Conv", {"a": (2, 8, 7, 7)}, {"b": (16, 4, 3, 3)}, {"group": 2},
     {"b": 2 * 5 * 5 * 16 * 4 * 9}),
    ("Gemm", {"a": (5, 8)}, {"b": (8, 6)}, {}, {"b": 5 * 8 * 6}),
    ("Gemm", {"b": (8, 5)}, {"a": (6, 8)}, {}, {"a": 5 * 8 * 6}),
    ("MatMul", {"a": (2, 5, 8)}, {"b": (8, 6)}, {}, {"b": 2 * 5 * 8 * 6}),
    ("MatMul", {"b": (2, 8, 5)}, {"a": (6, 8)}, {}, {"a": 2 * 5 * 8 * 6}),
    ("MatMul", {"a": (2, 5, 8)}, {"b": (2, 8, 6)}, {}, {"b": 2 * 5 * 8 * 6}),
    ("MatMul", {"a": (2, 5, 8), "b": (2, 8, 6)}, {}, {}, {"b": 2 * 5 * 8 * 6}),
    ("MatMul", {}, {"a": (5, 8), "b": (8, 6)}, {}, {"b": 0}),
    ("ConvTranspose", {"a": (2, 8, 7, 7)}, {"b": (8, 4, 2, 2)}, {}, {"b": 2 * 49 * 8 * 4 * 4}),
    ("Einsum", {"a": (2, 5, 8)}, {"b": (6, 8)}, {"equation": "bij, kj -> bik"},
     {"b": 2 * 5 * 8 * 6}),
    ("LSTM", {"a": (3, 2, 8)}, {"b": (1, 16, 8), "c": (1, 16, 4)}, {"hidden_size": 4},
     {"b": 3 * 2 * 16 * 8, "c": 3 * 2 * 16 * 4}),
    ("Acme", {"a": (5, 8)}, {"b": (8, 6)}, {"domain": "acme"}, {"b": None}),
])  # fmt: skip
def test_the_macs_of_a_product_follow_from_shapes(
    tmp_path, op, shapes, constants, attributes, expected
):
    assert macs(tmp_path, op, shapes, constants, **attributes) == expected


def test_a_size_that_the_file_leaves_open_can_be_given(tmp_path):
    arguments = ("MatMul", {"a": ("batch", 5, 8)}, {"b": (8, 6)})
    assert macs(tmp_path, *arguments) == {"b": None}
    assert macs(tmp_path, *arguments, shape_now=(3, 5, 8)) == {"b": 3 * 5 * 8 * 6}
    assert macs(tmp_path, "MatMul", {"a": (1, 5, 8)}, {"b": (8, 6)}, (3, 5, 8)) == {
        "b": 3 * 5 * 8 * 6
    }


def test_an_input_that_the_file_does_not_have_is_refused(tmp_path):
    macs(tmp_path, "MatMul", {"a": (1, 5, 8)}, {"b": (8, 6)})
    with pytest.raises(InputError, match=r"net\.onnx has no input 'image'\. It has a\.$"):
        list(node_weights(tmp_path / "net.onnx", {"image": (1, 5, 8)}, with_macs=True))


def test_shapes_that_do_not_fit_have_no_macs(tmp_path):
    arguments = ("MatMul", {"a": ("n", 5, 8)}, {"b": (8, 6)})
    assert macs(tmp_path, *arguments, shape_now=(3, 5, 7)) == {"b": None}


def test_a_plugin_in_onnx_s_own_domain_has_no_macs(tmp_path):
    assert macs(tmp_path, "CustomFC", {"a": (5, 8)}, {"b": (8, 6)}) == {"b": None}
