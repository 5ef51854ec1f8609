from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from helpers.errors import InputError
from helpers.sparsity.onnx_inputs import OnnxInput, complete_shapes, onnx_inputs, parse_shapes

FILE = Path("net.onnx")
F32 = np.dtype(np.float32)
IMAGES = OnnxInput("images", F32, ("batch", 3, "height", "width"))
FIXED = OnnxInput("scale", F32, (1,))
TOKENS = OnnxInput("input:0", np.dtype(np.int64), ("batch", ""))


@pytest.mark.parametrize(
    ("texts", "shapes"),
    [
        (["x:1x3x224x224"], {"x": (1, 3, 224, 224)}),  # trtexec
        (["x:1x3,y:2"], {"x": (1, 3), "y": (2,)}),
        (["x:[1,3,224,224]"], {"x": (1, 3, 224, 224)}),  # Polygraphy
        (["x:[1, 3], y:[2]"], {"x": (1, 3), "y": (2,)}),
        (["x:1", "y:2x2"], {"x": (1,), "y": (2, 2)}),
        (["input:0:1x3"], {"input:0": (1, 3)}),  # TensorFlow's names
        (["1x3"], {"": (1, 3)}),
        ([], {}),
    ],
)
def test_shapes_are_read_as_both_tools_write_them(texts, shapes):
    assert parse_shapes(texts) == shapes


@pytest.mark.parametrize("text", ["", "x", "x:", "x:1x", "x:ax3", "x:1x3,", "x:-1x3", "x:1.5"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(InputError, match=r"is not a shape\. Write the name of an input and"):
        parse_shapes([text])


def test_a_shape_is_given_once():
    with pytest.raises(InputError, match="The shape of x was given twice"):
        parse_shapes(["x:1", "x:2"])


def test_shapes_come_from_the_file_and_from_the_user():
    inputs = [IMAGES, FIXED]
    complete = complete_shapes(inputs, {"images": (2, 3, 8, 8)}, FILE)
    assert complete == {"images": (2, 3, 8, 8), "scale": (1,)}
    assert complete_shapes([FIXED], {}, FILE) == {"scale": (1,)}
    assert complete_shapes([FIXED], {"": (1,)}, FILE) == {"scale": (1,)}


def test_a_named_dimension_has_one_size_in_all_inputs():
    mask = OnnxInput("mask", F32, ("batch", "height"))
    complete = complete_shapes([IMAGES, mask], {"images": (2, 3, 8, 9)}, FILE)
    assert complete["mask"] == (2, 8)
    with pytest.raises(InputError, match=r"share the dimension batch, .* as 2 and as 4"):
        complete_shapes([IMAGES, mask], {"images": (2, 3, 8, 9), "mask": (4, 8)}, FILE)


def test_only_an_open_first_dimension_is_the_batch():
    assert complete_shapes([OnnxInput("x", F32, ("", 4))], {}, FILE, batch=5) == {"x": (5, 4)}
    with pytest.raises(InputError, match="leaves the shape of its input images"):
        complete_shapes([IMAGES], {}, FILE, batch=5)
    with pytest.raises(InputError, match=r"leaves the shape of its input input:0 \(batchx\?\)"):
        complete_shapes([TOKENS], {}, FILE, batch=5)


@pytest.mark.parametrize(
    ("inputs", "given", "message"),
    [
        ([IMAGES], {}, r"open\. Give the whole shape, for example images:1x3x224x224"),
        ([IMAGES], {"image": (1, 3, 8, 8)}, r"has no input image; its inputs are images \(batchx3"),
        ([IMAGES], {"images": (1, 4, 8, 8)}, "cannot have the shape 1x4x8x8"),
        ([IMAGES], {"images": (1, 3, 8)}, "cannot have the shape 1x3x8"),
        ([IMAGES, FIXED], {"": (1,)}, "has several inputs: name each shape"),
        ([], {"x": (1,)}, "has no input x; its inputs are none"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(inputs, given, message):
    with pytest.raises(InputError, match=message):
        complete_shapes(inputs, given, FILE)


def model_with(*inputs, initializers=()):
    graph = helper.make_graph([], "g", list(inputs), [], list(initializers))
    return helper.make_model(graph)


def test_inputs_have_their_types_and_open_dimensions():
    model = model_with(
        helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["n", 3, None, 0]),
        helper.make_tensor_value_info("t", TensorProto.INT64, []),
        helper.make_tensor_value_info("w", TensorProto.FLOAT, [2]),
        initializers=[numpy_helper.from_array(np.zeros(2, np.float32), "w")],
    )
    x, t = onnx_inputs(model, FILE)
    assert (x.name, x.dtype.name, x.dims) == ("x", "bfloat16", ("n", 3, "", 0))
    assert x.is_open
    assert not t.is_open
    assert (str(x), str(t)) == ("x (nx3x?x0)", "t (a number)")


def test_inputs_that_are_no_tensors_are_refused():
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [1])
    without_rank = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    for item in (sequence, without_rank):
        with pytest.raises(InputError, match=f"The input {item.name} of net.onnx is not a tensor"):
            onnx_inputs(model_with(item), FILE)
