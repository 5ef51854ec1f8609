"""Write a model repository, the folder that Triton serves.

Each model has a folder with its configuration, `config.pbtxt`, and its files in the folder of
their version. The configuration is made of the classes that Triton's own schema defines, so a
field that does not exist is an error here and not on the server.
Explained in `09_serve_with_triton.ipynb`.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from helpers.errors import InputError, WriteError
from helpers.files import sha256, shown, write_json
from helpers.inference.export import INPUT, OUTPUT
from helpers.inference.runners import OnnxRunner
from helpers.machine import provenance
from helpers.serving import python_model
from helpers.serving.errors import ServingError

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

BACKENDS = {
    "python": "ONNX Runtime on the CPU, in the python backend, which every Triton has",
    "onnxruntime": "ONNX Runtime on the GPU, with TensorRT building engines with sparse kernels",
    "tensorrt": "engines that TensorRT has built, one for each compute capability",
}
RECORD = "repository.json"  # beside the models: what was written, and with which versions
SELF_TEST = "self_test.safetensors"  # in the folder of a model: images, and their logits
DECODE, NAME = "decode_jpeg", "name_classes"  # the models that every ensemble uses
JPEG, CLASSES, SCORES = "jpeg", "classes", "scores"  # an ensemble's input and outputs
TYPES = {np.dtype(np.float32): "TYPE_FP32", np.dtype(np.float16): "TYPE_FP16"}


@dataclass(frozen=True)
class ServedModel:
    """A model and what runs it on the server.

    Args:
        name: as clients ask for it.
        files: an ONNX file; for `tensorrt` engines by compute capability, such as `9.0`.
        backend: `python`, `onnxruntime` or `tensorrt`; `BACKENDS` says what each is. The server
            of `helpers.serving.server` has the first alone, NVIDIA's container has all of them.
        dtype: of the images and logits of an engine; an ONNX file says it itself.
    """

    name: str
    files: Path | Mapping[str, Path]
    backend: str = "python"
    dtype: str = "float16"


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of a JPEG file: the shorter side resized, the middle cut out, normalised."""

    mean: Sequence[float]  # of each channel: one for grey images, three for RGB
    std: Sequence[float]
    resize: int  # length of the shorter side, in pixels
    crop: int  # height and width of the middle part


@dataclass(frozen=True)
class Batching:
    """How requests become batches, and how long they may wait."""

    sizes: Sequence[int] = (1, 8, 32, 128)  # prepared by the GPU's backends; the last is the limit
    delay_us: int = 500  # how long the GPU's backends wait for further requests
    longest_wait_ms: int = 500  # in the python backend; then a request is answered with an error
    instances: int = 1  # copies of each model
    threads: int | None = None  # of each copy in the python backend; else one for each core

    @property
    def largest(self) -> int:
        """The largest batch, of one request or of several."""
        return max(self.sizes)


@dataclass(frozen=True)
class _Plan:
    """What all models of a repository share."""

    image_shape: tuple[int, int, int]
    classes: Sequence[str]
    preprocessing: Preprocessing
    batching: Batching
    best: int
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float32))


def write_repository(
    folder: Path,
    models: Sequence[ServedModel],
    image_shape: tuple[int, int, int],
    classes: Sequence[str],
    preprocessing: Preprocessing,
    batching: Batching | None = None,
    best: int = 3,
    overwrite: bool = False,
) -> Path:
    """Write a model repository, and return its folder.

    Each model takes `images` (N, C, H, W) and returns `logits` (N, classes). Beside it, the
    ensemble NAME_jpeg takes `jpeg`, (N, 1) files as bytes, and returns the names of the likeliest
    `classes` (N, best) and their probabilities `scores`.

    Args:
        folder: to write; it appears in one piece or not at all.
        models: at least one. All take images of the same type.
        image_shape: channels, height and width.
        classes: their names, in the order of the logits.
        preprocessing: of JPEG files; its result must have the image's shape.
        batching: the sizes of batches and how long requests may wait.
        best: how many classes an ensemble returns.
        overwrite: replace the folder if it is an earlier model repository.

    Raises:
        InputError: the models do not fit together, a file is missing or damaged, or there is a
            folder of that name.
        ServingError: tritonclient, which has Triton's schema, is not installed.
        WriteError: the folder cannot be written.
    """
    batching = batching or Batching()
    folder = Path(folder)
    _check(folder, models, image_shape, classes, preprocessing, batching, best, overwrite)
    (dtype,) = {_dtype(model) for model in models}
    plan = _Plan(image_shape, classes, preprocessing, batching, best, dtype)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
            part = Path(name) / "new"
            for model in models:
                _write_model(part, model, plan)
                _write_config(part, _ensemble_config(model.name, plan))
            _write_step(part, _decode_config(plan))
            _write_step(part, _name_config(plan))
            write_json(part / RECORD, _record(part, models, plan))
            if folder.exists():
                folder.rename(Path(name) / "old")
            part.rename(folder)
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise WriteError(
            f"{shown(folder)} could not be written ({error.strerror}). Free some space or choose "
            "another folder."
        ) from error
    return folder


def _check(
    folder: Path,
    models: Sequence[ServedModel],
    image_shape: tuple[int, int, int],
    classes: Sequence[str],
    preprocessing: Preprocessing,
    batching: Batching,
    best: int,
    overwrite: bool,
) -> None:
    names = [model.name for model in models]
    reserved = {DECODE, NAME, *(f"{name}_jpeg" for name in names)}
    if not names or len(set(names)) < len(names) or reserved & set(names):
        raise InputError(
            f"The models are named {names}: give each one model a name of its own, other than "
            f"{', '.join(sorted(reserved))}."
        )
    for model in models:
        if model.backend not in BACKENDS:
            raise InputError(
                f"There is no backend {model.backend!r}; choose from {', '.join(BACKENDS)}."
            )
        if isinstance(model.files, Mapping) != (model.backend == "tensorrt"):
            raise InputError(
                f"{model.name}: give {model.backend} "
                + (
                    "engines by compute capability, such as {'9.0': path}."
                    if model.backend == "tensorrt"
                    else "one ONNX file."
                )
            )
    if len({_dtype(model) for model in models}) > 1:
        raise InputError(
            "The models take images of different types, so one ensemble cannot serve them: write "
            "FP16 and FP32 models into repositories of their own."
        )
    side = preprocessing.crop
    if image_shape != (len(preprocessing.mean), side, side) or preprocessing.resize < side:
        raise InputError(
            f"The preprocessing makes images of {len(preprocessing.mean)} channels and {side} x "
            f"{side} pixels, but the models take {image_shape}."
        )
    if not 1 <= best <= len(classes) or batching.largest < 1:
        raise InputError(f"best is {best}; there are {len(classes)} classes.")
    if folder.exists() and not (overwrite and (folder / RECORD).exists()):
        raise InputError(
            f"{shown(folder)} exists and is not overwritten. Remove it or choose another folder."
        )


def _dtype(model: ServedModel) -> np.dtype:
    """Return the type of a model's images and logits."""
    if isinstance(model.files, Mapping):
        return np.dtype(model.dtype)
    return np.dtype(OnnxRunner(model.files).dtype)


def _write_model(folder: Path, model: ServedModel, plan: _Plan) -> None:
    """Write the files of a model, its configuration and its self-test."""
    version = folder / model.name / "1"
    version.mkdir(parents=True)
    (version.parent / "labels.txt").write_text("".join(f"{name}\n" for name in plan.classes))
    if isinstance(model.files, Mapping):
        for capability, path in model.files.items():
            _copy(path, version / _engine_name(capability))
        _write_config(folder, _tensorrt_config(model, plan))
        return
    _copy(model.files, version / "model.onnx")
    if model.backend == "onnxruntime":
        _write_config(folder, _onnxruntime_config(model, plan))
        return
    _write_step(folder, _classify_config(model, plan))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *plan.image_shape, generator=generator)
    logits = OnnxRunner(model.files)(images)
    if logits.shape != (2, len(plan.classes)):
        raise InputError(
            f"{shown(model.files)} returns logits of shape {tuple(logits.shape[1:])}, but there "
            f"are {len(plan.classes)} classes. Give the classes that it was trained on."
        )
    save_file({INPUT: images, OUTPUT: logits}, version.parent / SELF_TEST)


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError as error:
        raise InputError(f"{shown(source)} is missing. Build or export the model first.") from error


def _engine_name(capability: str) -> str:
    return f"model_{capability.replace('.', '_')}.plan"


def _write_step(folder: Path, config: "ModelConfig") -> None:
    """Write a model that runs in Python: its configuration and its program."""
    version = folder / config.name / "1"
    version.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(python_model.__file__, version / "model.py")
    _write_config(folder, config)


def _write_config(folder: Path, config: "ModelConfig") -> None:
    from google.protobuf import text_format

    (folder / config.name / "1").mkdir(parents=True, exist_ok=True)
    text = text_format.MessageToString(config, as_utf8=True)
    (folder / config.name / "config.pbtxt").write_text(text)


def read_config(path: Path) -> "ModelConfig":
    """Return a `config.pbtxt` as a message of Triton's schema.

    Raises:
        InputError: the file is missing, is no protobuf text, or has a field that Triton lacks.
        ServingError: tritonclient is not installed.
    """
    from google.protobuf import text_format

    try:
        return text_format.Parse(Path(path).read_text(), _model_config())
    except (OSError, text_format.ParseError) as error:
        raise InputError(f"{shown(path)} is no configuration of a model: {error}") from error


def _model_config() -> "ModelConfig":
    try:
        from tritonclient.grpc.model_config_pb2 import ModelConfig
    except ImportError as error:
        raise ServingError(
            f"Triton's client does not load ({error}); it has the schema of configurations. "
            "Install it with pip install '.[serving]'."
        ) from error
    return ModelConfig()


def _config(fields: Mapping[str, Any]) -> "ModelConfig":
    """Return a configuration; a field or value that Triton's schema lacks is an error."""
    from google.protobuf import json_format

    return json_format.ParseDict(dict(fields), _model_config())


def _tensor(name: str, type_name: str, dims: Sequence[int], **more: str) -> dict[str, Any]:
    return {"name": name, "data_type": type_name, "dims": list(dims), **more}


def _network(name: str, plan: _Plan) -> dict[str, Any]:
    """Return what the configurations of all networks have in common."""
    kind = TYPES[plan.dtype]
    return {
        "name": name,
        "max_batch_size": plan.batching.largest,
        "input": [_tensor(INPUT, kind, plan.image_shape)],
        # With the labels a client can ask for the best classes by their names.
        "output": [_tensor(OUTPUT, kind, [len(plan.classes)], label_filename="labels.txt")],
    }


def _in_python(step: str, plan: _Plan, **parameters: object) -> dict[str, Any]:
    """Return the part of a configuration that is for `python_model`."""
    batching = plan.batching
    values = {"step": step, "longest_wait_ms": batching.longest_wait_ms, **parameters}
    return {
        "backend": "python",
        "instance_group": [{"count": batching.instances, "kind": "KIND_CPU"}],
        # Requests that arrive together are handed over together; they wait in the model's queue.
        "dynamic_batching": {},
        "parameters": {key: {"string_value": str(value)} for key, value in values.items()},
    }


def _classify_config(model: ServedModel, plan: _Plan) -> "ModelConfig":
    threads = {} if plan.batching.threads is None else {"threads": plan.batching.threads}
    return _config(_network(model.name, plan) | _in_python("classify", plan, **threads))


def _decode_config(plan: _Plan) -> "ModelConfig":
    preprocessing = json.dumps(asdict(plan.preprocessing))
    return _config(
        {
            "name": DECODE,
            "max_batch_size": plan.batching.largest,
            "input": [_tensor(JPEG, "TYPE_STRING", [1])],
            "output": [_tensor(INPUT, TYPES[plan.dtype], plan.image_shape)],
        }
        | _in_python("decode_jpeg", plan, preprocessing=preprocessing, dtype=plan.dtype.name)
    )


def _name_config(plan: _Plan) -> "ModelConfig":
    return _config(
        {
            "name": NAME,
            "max_batch_size": plan.batching.largest,
            "input": [_tensor(OUTPUT, TYPES[plan.dtype], [len(plan.classes)])],
            "output": [
                _tensor(CLASSES, "TYPE_STRING", [plan.best]),
                _tensor(SCORES, "TYPE_FP32", [plan.best]),
            ],
        }
        | _in_python("name_classes", plan, classes=json.dumps(list(plan.classes)), best=plan.best)
    )


def _ensemble_config(name: str, plan: _Plan) -> "ModelConfig":
    """Return the configuration of a model that runs others: decode, classify, name."""
    steps = [
        (DECODE, {JPEG: JPEG}, {INPUT: INPUT}),
        (name, {INPUT: INPUT}, {OUTPUT: OUTPUT}),
        (NAME, {OUTPUT: OUTPUT}, {CLASSES: CLASSES, SCORES: SCORES}),
    ]
    return _config(
        {
            "name": f"{name}_jpeg",
            "platform": "ensemble",
            "max_batch_size": plan.batching.largest,
            "input": [_tensor(JPEG, "TYPE_STRING", [1])],
            "output": [
                _tensor(CLASSES, "TYPE_STRING", [plan.best]),
                _tensor(SCORES, "TYPE_FP32", [plan.best]),
            ],
            "ensemble_scheduling": {
                "step": [
                    {"model_name": model, "model_version": -1, "input_map": i, "output_map": o}
                    for model, i, o in steps
                ]
            },
        }
    )


def _on_gpu(plan: _Plan) -> dict[str, Any]:
    """Return what the two backends for a GPU have in common."""
    batching = plan.batching
    images = {"data_type": TYPES[plan.dtype], "dims": list(plan.image_shape), "random_data": True}
    return {
        "instance_group": [{"count": batching.instances, "kind": "KIND_GPU"}],
        "dynamic_batching": {
            "preferred_batch_size": [size for size in batching.sizes if size > 1],
            "max_queue_delay_microseconds": batching.delay_us,
        },
        # Before a model is ready it has run each batch size once.
        "model_warmup": [
            {"name": f"batch_{size}", "batch_size": size, "inputs": {INPUT: images}}
            for size in batching.sizes
        ],
    }


def _tensorrt_config(model: ServedModel, plan: _Plan) -> "ModelConfig":
    assert isinstance(model.files, Mapping)
    names = {capability: _engine_name(capability) for capability in model.files}
    return _config(
        _network(model.name, plan)
        | _on_gpu(plan)
        | {
            "platform": "tensorrt_plan",
            "default_model_filename": next(iter(names.values())),
            "cc_model_filenames": names,
            "optimization": {
                "cuda": {
                    "graphs": True,
                    "graph_spec": [
                        {"batch_size": size, "input": {INPUT: {"dim": list(plan.image_shape)}}}
                        for size in plan.batching.sizes
                    ],
                }
            },
        }
    )


def _onnxruntime_config(model: ServedModel, plan: _Plan) -> "ModelConfig":
    options = {
        "precision_mode": "FP16" if plan.dtype == np.float16 else "FP32",
        "trt_sparsity_enable": "1",
        "trt_engine_cache_enable": "1",
    }
    accelerator = {"name": "tensorrt", "parameters": options}
    return _config(
        _network(model.name, plan)
        | _on_gpu(plan)
        | {
            "backend": "onnxruntime",
            "optimization": {
                "execution_accelerators": {"gpu_execution_accelerator": [accelerator]}
            },
        }
    )


def _record(folder: Path, models: Sequence[ServedModel], plan: _Plan) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "models": {model.name: model.backend for model in models},
        "image_shape": plan.image_shape,
        "classes": list(plan.classes),
        "batching": plan.batching,
        "sha256": {str(path.relative_to(folder)): sha256(path) for path in files},
        **provenance(),
    }
