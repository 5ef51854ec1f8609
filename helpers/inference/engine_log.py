"""What a build's log says about sparsity. Explained in `05_build_engine.ipynb`."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# TensorRT 10 and 11, then TensorRT 8.
ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics"
    r"|Layers eligible for sparse math)(?:: (?P<names>.*))?"
)
CHOSEN = re.compile(
    r"\(Sparsity\) (?:Chose (?P<count>\d+) layer\(s\) using sparse tactics"
    r"|TRT inference plan picked sparse implementation for layers)(?:: (?P<names>.*))?"
)
# NVIDIA's sparse kernels by their names. (HasSparseWeights, which the engine also reports,
# is also true of a 2:4 layer with a dense kernel: NVIDIA/TensorRT#4694.)
SPARSE_TACTIC = re.compile(r"spars|spmma|sptensor|sp_?gemm", re.IGNORECASE)
TIMED_LAYER = re.compile(r"Timing Runner: (?P<layer>.+) \(\w+(?:\[\w+\])?\)$")
TIMED_TACTIC = re.compile(r"Tactic Name: (?P<tactic>\S+) Tactic: \S+ Time: (?P<time>\d[\d.e+-]*)")
QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
FUSED = ("Add", "Relu", "Clip")  # what an INT8 kernel computes before it writes its result
WIDE = 256  # channels from which sparse kernels tend to win: NVIDIA/TensorRT#3849
# TensorRT takes a sparse INT8 kernel only where its result is INT8 too: README of
# NVIDIA/Model-Optimizer#1664.
LEAVES_INT8 = "its result is not quantised, and TensorRT's sparse INT8 kernels write INT8"


@dataclass(frozen=True)
class LoggedSparsity:
    """What the last pass of a build reported; None where it did not say."""

    eligible_count: int | None
    chosen_count: int | None
    eligible: tuple[str, ...] | None
    chosen: tuple[str, ...] | None

    @property
    def dense(self) -> tuple[str, ...]:
        """The eligible layers that were not chosen; empty where layers are not named."""
        if self.eligible is None or self.chosen is None:
            return ()
        return tuple(name for name in self.eligible if name not in self.chosen)


def read_sparsity(log: Sequence[str]) -> LoggedSparsity:
    """Return what a build's log says about sparsity."""
    report = last_report(log)
    return LoggedSparsity(
        eligible_count=sparse_count(report, ELIGIBLE),
        chosen_count=sparse_count(report, CHOSEN),
        eligible=sparse_layers(report, ELIGIBLE),
        chosen=sparse_layers(report, CHOSEN),
    )


def sparse_layers(log: Sequence[str], pattern: re.Pattern) -> tuple[str, ...] | None:
    """Return the layers that a builder's log lists for a pattern; None if it has no such list.

    Of several lists the last one counts. A list whose length is not the number before it is
    left out.
    """
    match = _last_match(log, pattern)
    if match is None:
        return None
    names = _split_names(match["names"] or "")
    return names if match["count"] in (None, str(len(names))) else None


def sparse_count(log: Sequence[str], pattern: re.Pattern) -> int | None:
    """Return how many layers a builder's log counts for a pattern; None if it says nothing."""
    match = _last_match(log, pattern)
    if match is None:
        return None
    return int(match["count"] or len(_split_names(match["names"] or "")))


def _last_match(log: Sequence[str], pattern: re.Pattern) -> re.Match | None:
    return next((match for line in reversed(log) if (match := pattern.search(line))), None)


def _split_names(names: str) -> tuple[str, ...]:
    """Split a list at its commas, but not at those inside a name such as `PWN(a, b)`."""
    parts, depth = [""], 0
    for character in names:
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return tuple(part.strip() for part in parts if part.strip())


def last_report(log: Sequence[str]) -> list[str]:
    """Return the part of a log that starts at its last list of eligible layers.

    The builder reports once for each pass of its search. A list of chosen layers before the
    last list of eligible ones belongs to an earlier pass.
    """
    starts = [index for index, line in enumerate(log) if ELIGIBLE.search(line)]
    return list(log[starts[-1] :]) if starts else []


def kernel_times(log: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return by layer how long each kernel took that was tried for it, in ms.

    Of several trials of a kernel, for example in different layouts, the fastest counts. Layers
    whose times came from a timing cache were not tried.
    """
    times: dict[str, dict[str, float]] = {}
    layer = ""
    for line in log:
        if match := TIMED_LAYER.search(line):
            layer = match["layer"]
        elif match := TIMED_TACTIC.search(line):
            kernels = times.setdefault(layer, {})
            kernel, time_ms = match["tactic"], float(match["time"])
            kernels[kernel] = min(time_ms, kernels.get(kernel, math.inf))
    return times


def read_tactics(information: str) -> dict[str, str]:
    """Return the kernel of each layer from the JSON of an EngineInspector.

    A layer without a tactic of its own, such as a copy, has an empty name.
    """
    layers = json.loads(information)["Layers"]
    return {layer["Name"]: layer.get("TacticName") or "" for layer in layers}


def onnx_nodes(layer: str) -> set[str]:
    """Return the names of the ONNX file's nodes that a layer is fused from."""
    return set(layer.split(" + "))


def is_sparse_tactic(tactic: str) -> bool:
    """Return whether a kernel is sparse by its name."""
    return SPARSE_TACTIC.search(tactic) is not None


def why_dense(
    layers: Sequence[str], times: dict[str, dict[str, float]], onnx_path: Path
) -> dict[str, str]:
    """Return why the builder chose a dense kernel for eligible layers, as far as it can be known.

    Args:
        layers: names as the builder logs them.
        times: as `kernel_times` returns them.
        onnx_path: the model; its shapes are the only clue where no times were logged.
    """
    reasons = {layer: _why_by_times(times.get(layer, {})) for layer in layers}
    if not all(reasons.values()):
        sizes = product_sizes(onnx_path)
        leaving = leaving_int8(onnx_path)
        for layer, reason in reasons.items():
            own = [sizes[node] for node in onnx_nodes(layer) if node in sizes]
            leaves = LEAVES_INT8 if onnx_nodes(layer) & leaving else ""
            reasons[layer] = reason or leaves or _why_by_size(own)
    return reasons


def product_sizes(onnx_path: Path) -> dict[str, tuple[int, int]]:
    """Return outputs and terms of each sum of a file's products, by the names of their nodes.

    Only shapes are read, and only of weights that are stored as the node takes them, as
    `export_onnx` and `rewrite_1x1_as_matmul` write them, quantised or not.
    """
    import onnx

    graph = onnx.load(onnx_path, load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    sizes: dict[str, tuple[int, int]] = {}
    for node in graph.node:
        if node.op_type in QUANTISERS and node.input[0] in shapes:
            shapes[node.output[0]] = shapes[node.input[0]]
            continue
        shape = shapes.get(node.input[1], ()) if len(node.input) > 1 else ()
        if node.op_type == "Conv" and len(shape) > 2:
            sizes[node.name] = (shape[0], math.prod(shape[1:]))
        elif node.op_type in ("Gemm", "MatMul") and len(shape) == 2:
            transposed = any(item.name == "transB" and item.i for item in node.attribute)
            first, second = shape
            sizes[node.name] = (first, second) if transposed else (second, first)
    return sizes


def leaving_int8(onnx_path: Path) -> set[str]:
    """Return the names of a file's INT8 products whose results are not quantised again.

    An addition and a ReLU may come first, which the kernel of the product computes too.
    """
    import onnx

    graph = onnx.load(onnx_path, load_external_data=False).graph
    writers = {name: node.op_type for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    leaving = set()
    for node in graph.node:
        inputs = [writers.get(name) for name in node.input[:2]]
        if node.op_type not in ("Conv", "Gemm", "MatMul") or inputs != ["DequantizeLinear"] * 2:
            continue
        following = readers.get(node.output[0], [])
        while len(following) == 1 and following[0].op_type in FUSED:
            following = readers.get(following[0].output[0], [])
        if not following or any(each.op_type != "QuantizeLinear" for each in following):
            leaving.add(node.name)
    return leaving


def _why_by_times(kernels: dict[str, float]) -> str:
    """Return what the trials of a layer's kernels show; nothing if too few were logged."""
    sparse = [time_ms for name, time_ms in kernels.items() if is_sparse_tactic(name)]
    dense = [time_ms for name, time_ms in kernels.items() if not is_sparse_tactic(name)]
    if not dense:
        return ""
    if not sparse:
        return "no sparse kernel was tried"
    times = f"{min(sparse):.4g} ms sparse, {min(dense):.4g} ms dense"
    if min(sparse) >= min(dense):
        return f"slower: {times}"
    return f"faster alone ({times}), so something around it decided, such as layouts"


def _why_by_size(sizes: Sequence[tuple[int, int]]) -> str:
    """Return what is likely for a layer with these outputs and terms of each sum."""
    for outputs, terms in sizes:
        if min(outputs, terms) < WIDE:
            return (
                f"small: {outputs} outputs, each a sum of {terms}; sparse kernels tend to win "
                f"from {WIDE} on"
            )
    return "the builder chose a dense kernel and logged no times"
