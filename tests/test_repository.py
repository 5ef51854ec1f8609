"""The model repository: what is written, and that Triton's schema accepts it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("tritonclient.grpc", reason="tritonclient is missing", exc_type=ImportError)

from helpers.errors import InputError, WriteError
from helpers.files import sha256
from helpers.inference.runners import OnnxRunner
from helpers.serving import repository
from helpers.serving.repository import (
    Batching,
    Preprocessing,
    ServedModel,
    read_config,
    write_repository,
)

GREY = Preprocessing([0.286], [0.353], resize=28, crop=28)
NAMES = [f"class {number}" for number in range(10)]
SHAPE = (1, 28, 28)


@pytest.fixture
def files(exported, resnext_files):
    return {"dense": exported[1], "sparse": resnext_files}


@pytest.fixture
def write(files, tmp_path):
    def write(backend: str = "python", precision: str = "fp32", **changed):
        models = [
            ServedModel(name, {"9.0": own[precision]} if backend == "tensorrt" else own[precision])
            for name, own in files.items()
        ]
        arguments = {
            "folder": tmp_path / "repository",
            "models": [replace(model, backend=backend) for model in models],
            "image_shape": SHAPE,
            "classes": NAMES,
            "preprocessing": GREY,
        }
        return write_repository(**{**arguments, **changed})

    return write


def test_each_network_and_its_ensemble_are_there_with_a_valid_configuration(write):
    folder = write()
    found = {path.parent.name: read_config(path) for path in folder.glob("*/config.pbtxt")}
    assert set(found) == {
        "dense", "sparse", "dense_jpeg", "sparse_jpeg", "decode_jpeg", "name_classes",
    }  # fmt: skip
    for name, config in found.items():
        assert config.name == name
        assert config.max_batch_size == 128
        assert (folder / name / "1").is_dir()
    assert [step.model_name for step in found["sparse_jpeg"].ensemble_scheduling.step] == [
        "decode_jpeg", "sparse", "name_classes",
    ]  # fmt: skip


def test_the_steps_of_an_ensemble_fit_together(write):
    folder = write()
    ensemble = read_config(folder / "dense_jpeg" / "config.pbtxt")
    tensors = {tensor.name: (tensor.data_type, tensor.dims) for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        config = read_config(folder / step.model_name / "config.pbtxt")
        for tensor in config.input:
            assert tensors[step.input_map[tensor.name]] == (tensor.data_type, tensor.dims)
        for tensor in config.output:
            tensors[step.output_map[tensor.name]] = (tensor.data_type, tensor.dims)
    for tensor in ensemble.output:
        assert tensors[tensor.name] == (tensor.data_type, tensor.dims)


def test_no_queue_is_bounded_by_triton_which_would_stall(write):
    for path in write().glob("*/config.pbtxt"):
        policy = read_config(path).dynamic_batching.default_queue_policy
        assert policy.max_queue_size == 0
        assert policy.default_timeout_microseconds == 0


def test_the_self_test_holds_the_runners_own_answers(write, files):
    folder = write()
    for name, own in files.items():
        stored = load_file(folder / name / repository.SELF_TEST)
        assert torch.equal(stored["logits"], OnnxRunner(own["fp32"])(stored["images"]))


def test_engines_are_served_by_compute_capability_in_cuda_graphs_after_a_warm_up(write, files):
    engines = {"8.0": files["dense"]["fp16"], "9.0": files["sparse"]["fp16"]}
    sizes = (1, 8, 32)
    folder = write(
        models=[ServedModel("sparse", engines, "tensorrt")],
        batching=Batching(sizes=sizes, instances=2),
    )
    config = read_config(folder / "sparse" / "config.pbtxt")
    assert config.platform == "tensorrt_plan"
    assert set(config.cc_model_filenames) == set(engines)
    for capability, name in config.cc_model_filenames.items():
        assert sha256(folder / "sparse" / "1" / name) == sha256(engines[capability])
    assert (folder / "sparse" / "1" / config.default_model_filename).exists()
    assert config.optimization.cuda.graphs
    assert [each.batch_size for each in config.optimization.cuda.graph_spec] == list(sizes)
    assert [each.batch_size for each in config.model_warmup] == list(sizes)
    assert [group.count for group in config.instance_group] == [2]
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 32]
    assert config.input[0].data_type == config.output[0].data_type
    assert read_config(folder / "decode_jpeg" / "config.pbtxt").output[0].data_type == (
        config.input[0].data_type
    )


def test_onnx_runtime_asks_tensorrt_for_sparse_kernels(write):
    folder = write(backend="onnxruntime", precision="fp16")
    config = read_config(folder / "sparse" / "config.pbtxt")
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert accelerator.parameters["trt_sparsity_enable"] == "1"
    assert accelerator.parameters["precision_mode"] == "FP16"
    assert not (folder / "sparse" / "1" / "model.py").exists()


def test_what_was_written_is_recorded(write):
    folder = write()
    record = json.loads((folder / repository.RECORD).read_text())
    assert record["models"] == {"dense": "python", "sparse": "python"}
    files = {path for path in folder.rglob("*") if path.is_file()} - {folder / repository.RECORD}
    assert {folder / name for name in record["sha256"]} == files
    assert all(sha256(folder / name) == digest for name, digest in record["sha256"].items())


def test_a_repository_is_replaced_only_on_request(write, tmp_path):
    folder = write()
    with pytest.raises(InputError, match="exists and is not overwritten"):
        write()
    (folder / "dense" / "old").touch()
    write(overwrite=True)
    assert not (folder / "dense" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


def test_another_folder_is_never_replaced(write, tmp_path):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "precious").touch()
    with pytest.raises(InputError, match="exists"):
        write(overwrite=True)
    assert (tmp_path / "repository" / "precious").exists()


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"models": []}, "give each one model a name"),
        ({"classes": NAMES[:9]}, "9 classes"),
        ({"image_shape": (3, 28, 28)}, "preprocessing makes images of 1 channels"),
        ({"preprocessing": replace(GREY, crop=32)}, "32 x 32 pixels"),
        ({"best": 11}, "best is 11"),
        ({"backend": "tensorflow"}, "no backend 'tensorflow'"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(write, tmp_path, changed, complaint):
    with pytest.raises(InputError, match=complaint):
        write(**changed)
    assert not list(tmp_path.iterdir())


def test_models_of_two_types_are_refused(write, files):
    models = [
        ServedModel("dense", files["dense"]["fp32"]),
        ServedModel("sparse", files["sparse"]["fp16"]),
    ]
    with pytest.raises(InputError, match="different types"):
        write(models=models)


@pytest.mark.parametrize("name", ["decode_jpeg", "name_classes"])
def test_the_names_of_the_steps_are_taken(write, files, name):
    with pytest.raises(InputError, match="a name of its own"):
        write(models=[ServedModel(name, files["dense"]["fp32"])])


def test_a_missing_engine_is_named(write, tmp_path):
    with pytest.raises(InputError, match=r"none\.engine is missing"):
        write(models=[ServedModel("a", {"9.0": tmp_path / "none.engine"}, "tensorrt")])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(write, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="could not be written"):
        write(folder=tmp_path / "file" / "repository")


@pytest.mark.parametrize("text", ["nam: 'x'", "max_batch_size: 'x'", "input {"])
def test_a_field_that_triton_lacks_is_an_error(tmp_path, text):
    path = tmp_path / "config.pbtxt"
    path.write_text(text)
    with pytest.raises(InputError, match="no configuration"):
        read_config(path)


def test_the_program_of_the_models_is_this_packages(write):
    folder = write()
    own = sha256(repository.python_model.__file__)
    for name in ("dense", "sparse", "decode_jpeg", "name_classes"):
        assert sha256(folder / name / "1" / "model.py") == own
