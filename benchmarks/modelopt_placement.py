"""Compare where this project and NVIDIA's ModelOpt quantise a ResNet-50 for TensorRT.

Both quantise the same FP32 file (random 2:4 weights, the same calibration images), and each input
of each node is compared: does it arrive dequantised? Where it does in both files, so do the
scales. ModelOpt is not among the dependencies; it runs in an environment of its own:

    python -m venv modelopt
    modelopt/bin/pip install torch torchvision onnx onnxruntime
    modelopt/bin/pip install --no-deps nvidia-modelopt==0.47.0 omegaconf \
        antlr4-python3-runtime==4.9.3 pulp regex scipy ninja huggingface_hub httpx2 httpcore2 \
        truststore onnx-graphsurgeon onnxslim lief onnxconverter-common polygraphy cppimport \
        pybind11 mako
    python benchmarks/modelopt_placement.py modelopt/bin/python

Writes `benchmarks/results/modelopt_placement.json`.
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, numpy_helper

from helpers import machine
from helpers.files import write_json
from helpers.inference.export import export_onnx
from helpers.inference.int8_placement import tensorrt_int8_faults
from helpers.inference.quantization import quantize_for_tensorrt
from helpers.sparsity import prune_2to4_, verify_onnx
from helpers.training.networks import create_model

RESULT = Path(__file__).parent / "results" / "modelopt_placement.json"
SHAPE, IMAGES = (3, 224, 224), 16
BATCHES = {"modelopt": None, "modelopt_batch_16": 16}  # what ModelOpt is told
# Why the files differ, by the operator and the input at which they do.
ONE_ROW = (
    "ModelOpt leaves a product with one row in floating point, since Tensor Cores gain nothing "
    "there, and it measures the rows with one calibration image at a time, unless it is told "
    "another batch. quantize_for_tensorrt does not know the batch either and quantises the layer; "
    "last=False leaves it in floating point"
)
REASONS = {
    "ReduceMean input 0": "quantize_for_tensorrt quantises the result of every ReLU behind a "
    "product, so that the last convolution writes INT8 too, as sparse kernels need; ModelOpt does "
    "not quantise before this operator",
    "Gemm input 0": ONE_ROW,
    "Gemm input 1": ONE_ROW,
}


@dataclass(frozen=True)
class Placement:
    """Which inputs of which nodes arrive dequantised, and with which scale."""

    quantised: dict[tuple[str, int], bool]  # by the node's name and the number of the input
    scales: dict[tuple[str, int], np.ndarray]
    operators: dict[str, str]  # by the node's name


def placement(path: Path) -> Placement:
    """Read the placement of a quantised file."""
    graph = onnx.load(path).graph
    writers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    quantised: dict[tuple[str, int], bool] = {}
    scales: dict[tuple[str, int], np.ndarray] = {}
    operators: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Constant", "Cast"):
            continue
        operators[node.name] = node.op_type
        for place, name in enumerate(node.input):
            writer = _through_casts(writers, name)
            quantised[node.name, place] = False
            if writer is not None and writer.op_type == "DequantizeLinear":
                quantised[node.name, place] = True
                scales[node.name, place] = constants[writer.input[1]].astype(np.float64)
    return Placement(quantised, scales, operators)


def _through_casts(writers: dict[str, NodeProto], name: str) -> NodeProto | None:
    writer = writers.get(name)
    while writer is not None and writer.op_type == "Cast":
        writer = writers.get(writer.input[0])
    return writer


def quantize_with_modelopt(
    python: str, source: Path, target: Path, images: np.ndarray, batch: int | None
) -> None:
    """Quantise a file with ModelOpt in its own environment, for a batch size or its default."""
    data = source.with_suffix(".npz")
    np.savez(data, images=images)
    command = [
        python, "-m", "modelopt.onnx.quantization", f"--onnx_path={source}",
        f"--output_path={target}", "--quantize_mode=int8", "--calibration_method=max",
        f"--calibration_data={data}", "--high_precision_dtype=fp32", "--calibration_eps", "cpu",
    ]  # fmt: skip
    if batch is not None:
        command.append(f"--calibration_shapes=images:{'x'.join(map(str, (batch, *SHAPE)))}")
    subprocess.run(command, check=True)


def compare(ours: Placement, theirs: Placement) -> dict[str, Any]:
    """Return where two files differ, and by how much their scales do."""
    both = [key for key in ours.quantised if key in theirs.quantised]
    different = [key for key in both if ours.quantised[key] != theirs.quantised[key]]
    rows = []
    for node, place in different:
        kind = f"{ours.operators[node]} input {place}"
        rows.append(
            {
                "node": node,
                "input": kind,
                "ours": "INT8" if ours.quantised[node, place] else "floating point",
                "modelopt": "INT8" if theirs.quantised[node, place] else "floating point",
                "reason": REASONS.get(kind, "not known"),
            }
        )
    factors = [
        np.exp(np.abs(np.log(scale.ravel() / theirs.scales[key].ravel()))).max()
        for key, scale in ours.scales.items()
        if key in theirs.scales
    ]
    return {
        "only_ours": sorted(set(ours.operators) - set(theirs.operators)),
        "only_modelopt": sorted(set(theirs.operators) - set(ours.operators)),
        "inputs_compared": len(both),
        "inputs_alike": len(both) - len(different),
        "int8_inputs": {
            "ours": sum(ours.quantised.values()),
            "modelopt": sum(theirs.quantised.values()),
        },
        "differences": rows,
        "scales_compared": len(factors),
        "largest_factor_between_scales": float(max(factors)),
    }


def main(python: str) -> None:
    """Quantise ResNet-50 with both, compare the files, and write the result."""
    torch.manual_seed(0)
    model = create_model("resnet50", 1000).eval()
    prune_2to4_(model)
    images = np.random.default_rng(0).standard_normal((IMAGES, *SHAPE), np.float32)
    found, sparse, faults = {}, {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = export_onnx(model, folder / "fp32.onnx", SHAPE)
        files = {way: folder / f"{way}.onnx" for way in ("ours", *BATCHES)}
        quantize_for_tensorrt(source, files["ours"], images)
        for way, batch in BATCHES.items():
            quantize_with_modelopt(python, source, files[way], images, batch)
        for way, path in files.items():
            found[way], faults[way] = placement(path), tensorrt_int8_faults(path)
            table = verify_onnx(path)
            sparse[way] = f"{int(table.is_2to4.sum())} of {int(table.eligible.sum())} eligible"
    version = "from importlib.metadata import version; print(version('nvidia-modelopt'))"
    asked = subprocess.run([python, "-c", version], check=True, capture_output=True, text=True)
    result = {
        "what": "for each input of each node of ResNet-50 whether it arrives dequantised, in the "
        "file of quantize_for_tensorrt and in ModelOpt's; differences with their reasons. "
        "modelopt: by default; modelopt_batch_16: told the batch size. faults: what "
        "tensorrt_int8_faults says of each file. scales: of the inputs that are INT8 in both",
        "command": "python benchmarks/modelopt_placement.py MODELOPT_PYTHON",
        "modelopt_version": asked.stdout.strip(),
        "images": IMAGES,
        "nodes": Counter(found["ours"].operators.values()),
        **{way: compare(found["ours"], found[way]) for way in BATCHES},
        "weights_2to4": sparse,
        "faults": faults,
        **machine.provenance(),
    }
    write_json(RESULT, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
