import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from helpers.errors import InputError
from helpers.sparsity import verify_onnx
from helpers.sparsity.onnx_file import OnnxFile, load_onnx

LARGE = 64 * 64 * 4  # bytes; more than what is read with the graph


def weight(sparse=True):
    values = np.ones((64, 64, 1, 1), np.float32)
    if sparse:
        values[:, ::2] = 0
    return values


def model_of(*tensors, nodes=(), opsets=(("", 21),)):
    """Return a convolution with the weight `w`, after any other nodes."""
    graph = helper.make_graph(
        [*nodes, helper.make_node("Conv", ["x", "w"], ["y"], name="conv")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "c", "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],  # without a shape
        tensors,
    )
    imports = [helper.make_opsetid(*opset) for opset in opsets]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def save(path, sparse=True, location=None, **options):
    """Write a model whose weight lies in the file `location`, or in the model's own."""
    path.parent.mkdir(exist_ok=True, parents=True)
    model = model_of(numpy_helper.from_array(weight(sparse), "w"), **options)
    if location is None:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def external(path, location, content, **entries):
    """Write a model that says where its weight's bytes are, and these bytes."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[64, 64, 1, 1])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    path.parent.mkdir(exist_ok=True, parents=True)
    onnx.save(model_of(tensor), path)
    (path.parent / location).write_bytes(content)
    return path


def refusal(path):
    with pytest.raises(InputError) as error:
        verify_onnx(path)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("sparse", [True, False])
def test_a_large_tensor_is_read_from_where_it_lies_in_the_file(tmp_path, sparse):
    path = save(tmp_path / "net.onnx", sparse)
    file = OnnxFile(path)
    (stored,) = file.model.graph.initializer
    assert not stored.raw_data
    assert len(file.model.SerializeToString()) < LARGE
    assert np.array_equal(file.array(stored), weight(sparse))
    assert not file.array(stored).flags.writeable
    assert np.array_equal(
        numpy_helper.to_array(load_onnx(path).graph.initializer[0]), weight(sparse)
    )
    assert verify_onnx(path).is_2to4.tolist() == [sparse]


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("kind", [
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT4,
    TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN, TensorProto.INT64,
], ids=TensorProto.DataType.Name)  # fmt: skip
def test_a_tensor_of_any_type_is_what_onnx_reads(tmp_path, kind, raw):
    values = np.tile(np.float32([0, 1, -1, 2]), 5000).reshape(100, 200)
    values = values.astype(helper.tensor_dtype_to_np_dtype(kind))
    tensor = numpy_helper.from_array(values, "other")
    if not raw:
        tensor = helper.make_tensor("other", kind, values.shape, values.ravel().tolist())
    path = tmp_path / "net.onnx"
    onnx.save(model_of(tensor), path)
    file = OnnxFile(path)
    assert np.array_equal(file.array(file.model.graph.initializer[0]), values)


# Files that the runtimes load.


def test_a_plugin_without_an_opset_of_its_own_is_loaded(tmp_path):
    nodes = [helper.make_node("Swish_TRT", ["x"], ["z"], domain="nobodys")]
    nodes.append(helper.make_node("EfficientNMS_TRT", ["z"], ["b"]))  # in ONNX's own domain
    path = save(tmp_path / "net.onnx", nodes=nodes)
    table = verify_onnx(path)
    assert (table.node.tolist(), table.judged.tolist()) == (["conv"], [True])


@pytest.mark.parametrize("sparse", [True, False])
def test_external_data_may_be_a_link(tmp_path, sparse):
    path = save(tmp_path / "net.onnx", sparse, location="weights.bin")
    data = (tmp_path / "weights.bin").rename(tmp_path / "blob")
    (tmp_path / "weights.bin").symlink_to(data)
    assert verify_onnx(path).is_2to4.tolist() == [sparse]


def test_a_link_to_a_model_finds_the_data_beside_either(tmp_path):
    save(tmp_path / "store" / "blob", location="weights.bin")
    link = tmp_path / "net.onnx"
    link.symlink_to(tmp_path / "store" / "blob")
    assert verify_onnx(link).is_2to4.tolist() == [True]
    dense = weight(sparse=False).tobytes()
    (tmp_path / "weights.bin").write_bytes(dense)  # beside the link, it comes first
    assert verify_onnx(link).is_2to4.tolist() == [False]


def test_external_data_may_be_in_another_folder(tmp_path):
    (tmp_path / "data").mkdir()
    content = weight().tobytes()
    path = external(tmp_path / "models" / "net.onnx", "../data/w.bin", content)
    assert verify_onnx(path).is_2to4.tolist() == [True]
    path = external(tmp_path / "models" / "offset.onnx", "w.bin", b"1234" + content, offset=4)
    assert verify_onnx(path).is_2to4.tolist() == [True]


# Files that they do not load.


@pytest.mark.parametrize(
    ("content", "entries", "reason"),
    [
        (b"\1" * 100, {}, "its shape needs 16384 bytes and there are 100 in w.bin"),
        (b"", {}, "its shape needs 16384 bytes and there are 0 in w.bin"),
        (b"\1" * LARGE, {"offset": 4}, "needs 16384 bytes and there are 16380 in w.bin"),
        (b"\1" * LARGE, {"length": 8}, "needs 16384 bytes and there are 8 in w.bin"),
        (b"\1" * LARGE, {"offset": -4}, "bytes and there are"),
        (b"\1" * LARGE, {"offset": "four"}, "in its external data"),
    ],
)
def test_external_data_that_do_not_fit_are_refused(tmp_path, content, entries, reason):
    path = external(tmp_path / "net.onnx", "w.bin", content, **entries)
    message = refusal(path)
    assert message.startswith("The tensor w cannot be read: ")
    assert reason in message


def test_external_data_that_are_no_file_are_refused(tmp_path):
    path = external(tmp_path / "net.onnx", "w.bin", b"")
    (tmp_path / "w.bin").unlink()
    assert f"{tmp_path / 'w.bin'} cannot be read (No such file" in refusal(path)
    (tmp_path / "w.bin").mkdir()
    assert "w.bin cannot be read (not a file)" in refusal(path)
    (tmp_path / "w.bin").rmdir()
    os.mkfifo(tmp_path / "w.bin")  # reading it would never end
    assert "w.bin cannot be read (not a file)" in refusal(path)


def test_messages_show_the_path_that_was_given(tmp_path, monkeypatch):
    (tmp_path / "blob").write_bytes(b"no model")
    link = tmp_path / "folder" / "net.onnx"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "blob")
    assert refusal(link).startswith(f"{link} is not a valid ONNX model: ")
    monkeypatch.chdir(tmp_path)
    assert refusal("folder/net.onnx").startswith("folder/net.onnx is not a valid ONNX model: ")


@pytest.mark.parametrize("large", [True, False])
def test_a_file_that_ends_too_early_is_refused_wherever_it_ends(tmp_path, large):
    path = save(tmp_path / "net.onnx")
    if not large:
        small = numpy_helper.from_array(weight()[:4, :4], "w")
        onnx.save(model_of(small), path)
    content = path.read_bytes()
    header = len(OnnxFile(path).model.SerializeToString())
    for size in {*range(1, header, 7), *range(len(content) - 40, len(content) - 6)}:
        path.write_bytes(content[: min(size, len(content) - 1)])
        assert refusal(path).startswith(f"{path} is not a valid ONNX model: ")


def test_a_file_with_wrong_bytes_is_judged_or_refused_in_one_sentence(tmp_path):
    """Whatever byte is wrong, no error of another kind comes out."""
    nodes = [
        helper.make_node("Reshape", ["v", "shape"], ["u"]),
        helper.make_node("Transpose", ["u"], ["w"], perm=[0, 1, 3, 2]),
        helper.make_node("Unpack", ["x", "v"], ["z"], domain="acme", bits=4),
    ]
    tensors = [
        numpy_helper.from_array(weight()[:4, :4, 0, 0], "v"),
        numpy_helper.from_array(np.int64([4, 4, 1, 1]), "shape"),
    ]
    path = tmp_path / "net.onnx"
    content = model_of(*tensors, nodes=nodes).SerializeToString()
    numbers = np.random.default_rng(0)
    refused = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] = numbers.integers(256)
        path.write_bytes(damaged)
        try:
            verify_onnx(path)
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > len(content) // 3  # the others are letters of names, sizes and the like


def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_named(tmp_path):
    tensor = numpy_helper.from_array(weight(), "w")
    tensor.dims[0] = 63
    path = tmp_path / "net.onnx"
    onnx.save(model_of(tensor), path)
    assert "The tensor w cannot be read: its shape needs 16128 bytes" in refusal(path)
    small = numpy_helper.from_array(weight()[:2, :4], "w")
    small.dims[0] = 3
    onnx.save(model_of(small), path)
    assert refusal(path).startswith("The tensor w cannot be read: ")


def test_a_name_that_nothing_computes_is_reported(tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(model_of(), path)
    assert "it uses the tensor 'w', which nothing in it computes" in refusal(path)
