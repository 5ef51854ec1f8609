"""What a build's log tells about sparsity. Explained in `05_build_engine.ipynb`."""

import json
import math
import re
from pathlib import Path

from helpers.sparsity.verify import verify_onnx

# TensorRT 10 and 11, then TensorRT 8.
ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics"
    r"|Layers eligible for sparse math)(?:: (?P<names>.*))?"
)
CHOSEN = re.compile(
    r"\(Sparsity\) (?:Chose (?P<count>\d+) layer\(s\) using sparse tactics"
    r"|TRT inference plan picked sparse implementation for layers)(?:: (?P<names>.*))?"
)
# NVIDIA's sparse kernels by their names. (HasSparseWeights, which the engine also tells,
# is true of a 2:4 layer with a dense kernel too: NVIDIA/TensorRT#4694.)
SPARSE_TACTIC = re.compile(r"spars|spmma|sptensor|sp_?gemm", re.IGNORECASE)
TIMED_LAYER = re.compile(r"Timing Runner: (?P<layer>.+) \(\w+(?:\[\w+\])?\)$")
TIMED_TACTIC = re.compile(r"Tactic Name: (?P<tactic>\S+) Tactic: \S+ Time: (?P<time>\d[\d.e+-]*)")
WIDE = 256  # channels from which sparse kernels tend to win: NVIDIA/TensorRT#3849


def sparse_layers(log: list[str] | tuple[str, ...], pattern: re.Pattern) -> tuple[str, ...] | None:
    """Return the layers that a builder's log lists for a pattern; None if it lists none.

    Of several lists the last one counts. One that gives a number but not as many names is none.
    """
    match = _last(log, pattern)
    if match is None:
        return None
    names = _split(match["names"] or "")
    return names if match["count"] in (None, str(len(names))) else None


def sparse_count(log: list[str] | tuple[str, ...], pattern: re.Pattern) -> int | None:
    """Return how many layers a builder's log counts for a pattern; None if it says nothing."""
    match = _last(log, pattern)
    if match is None:
        return None
    return int(match["count"] or len(_split(match["names"] or "")))


def last_report(log: list[str] | tuple[str, ...]) -> list[str]:
    """Return a log from its last list of eligible layers on.

    The builder reports once for each pass of its search. A list of chosen layers that stands
    before the last list of eligible ones belongs to an earlier pass.
    """
    starts = [index for index, line in enumerate(log) if ELIGIBLE.search(line)]
    return list(log[starts[-1] :]) if starts else []


def kernel_times(log: list[str] | tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Return how long each kernel took that was tried for a layer, in ms.

    Of several trials of a kernel, in other layouts say, the fastest counts. Layers whose
    times came from a timing cache were not tried.
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
    """Return the kernel of each layer in what an EngineInspector tells as JSON.

    A layer without a tactic of its own, such as a copy, has an empty name.
    """
    layers = json.loads(information)["Layers"]
    return {layer["Name"]: layer.get("TacticName") or "" for layer in layers}


def _last(log: list[str] | tuple[str, ...], pattern: re.Pattern) -> re.Match | None:
    return next((match for line in reversed(log) if (match := pattern.search(line))), None)


def _split(names: str) -> tuple[str, ...]:
    """Split a list at its commas, but not at those inside a name such as `PWN(a, b)`."""
    parts, depth = [""], 0
    for character in names:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return tuple(part.strip() for part in parts if part.strip())


def _nodes(layer: str) -> set[str]:
    """Return the nodes of the ONNX file that a layer is fused from."""
    return set(layer.split(" + "))


def _is_sparse(tactic: str) -> bool:
    return SPARSE_TACTIC.search(tactic) is not None


def why_dense(
    layers: tuple[str, ...], times: dict[str, dict[str, float]], onnx_path: Path
) -> dict[str, str]:
    """Return why the builder chose a dense kernel for eligible layers, as far as it can be known.

    Args:
        layers: names as the builder logs them.
        times: as `kernel_times` returns them.
        onnx_path: the network; its shapes must do where no times were logged.
    """
    reasons = {layer: _by_times(times.get(layer, {})) for layer in layers}
    if not all(reasons.values()):
        sizes = _sizes(onnx_path)
        for layer, reason in reasons.items():
            reasons[layer] = reason or _by_size([sizes[n] for n in _nodes(layer) if n in sizes])
    return reasons


def _by_times(kernels: dict[str, float]) -> str:
    """Return what the trials of a layer's kernels tell; nothing if too few were logged."""
    sparse = [time_ms for name, time_ms in kernels.items() if _is_sparse(name)]
    dense = [time_ms for name, time_ms in kernels.items() if not _is_sparse(name)]
    if not dense:
        return ""
    if not sparse:
        return "no sparse kernel was tried"
    times = f"{min(sparse):.4g} ms sparse, {min(dense):.4g} ms dense"
    if min(sparse) >= min(dense):
        return f"slower: {times}"
    return f"faster alone ({times}), so something around it decided, such as layouts"


def _by_size(sizes: list[tuple[int, int]]) -> str:
    """Return what a layer's outputs and terms of each sum let expect."""
    for outputs, terms in sizes:
        if min(outputs, terms) < WIDE:
            return (
                f"small: {outputs} outputs, each a sum of {terms}; sparse kernels tend to win "
                f"from {WIDE} on"
            )
    return "the builder chose a dense kernel and logged no times"


def _sizes(onnx_path: Path) -> dict[str, tuple[int, int]]:
    """Return outputs and terms of each sum of a file's products, by the names of their nodes."""
    table = verify_onnx(onnx_path)
    rows = table[table.eligible]
    return {
        node: (shape[0], math.prod(shape[1:]))
        for node, shape in zip(rows.node, rows["shape"], strict=True)
    }
