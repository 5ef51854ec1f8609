"""Time the verifier of ONNX files and the compressed form against their peers.

The file is ResNeXt-101 32x8d in FP16, random weights pruned 2:4. The peer of the
verifier is `polygraphy inspect sparsity` (PyPI: polygraphy), stopped after `LIMIT`
seconds; that of the compressed form is PyTorch's conversion for CUTLASS, on the
weights that it accepts. The dense file in FP32 is verified and pruned too. Writes
`benchmarks/results/verify_cpu.json`.
"""

import os
import signal
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import onnx
import torch
from polygraphy.tools.sparse import SparsityPruner
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from helpers import machine
from helpers.files import write_json
from helpers.inference import export
from helpers.sparsity import (
    compress_2to4,
    decompress_2to4,
    prune_2to4_,
    save_compressed,
    verify_model,
    verify_onnx,
)
from helpers.sparsity.onnx_prune import prune_onnx
from helpers.training import networks
from turns import medians

LIMIT = 600  # seconds for polygraphy
ROUNDS = 5
RESULT = Path(__file__).parent / "results" / "verify_cpu.json"


def time_polygraphy(path: Path) -> dict[str, float | bool]:
    """Return polygraphy's wall-clock and CPU seconds, and whether it finished."""

    def stop(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    start, cpu = time.perf_counter(), time.process_time()
    finished = True
    try:
        SparsityPruner(onnx.load(path)).check()
    except TimeoutError:
        finished = False
    signal.alarm(0)
    clock, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": round(clock, 1), "cpu_seconds": round(cpu, 1), "finished": finished}


def seconds(way: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of a call: the median by wall clock, the mean of the CPU."""
    cpu = time.process_time()
    clock = medians({"way": way}, ROUNDS)["way"]
    return {
        "seconds": round(clock, 3),
        "cpu_seconds": round((time.process_time() - cpu) / (ROUNDS + 1), 3),
    }


def as_matrix(weight: Tensor) -> Tensor:
    """Return a convolution as (out, kernel positions * in), which PyTorch's conversion accepts."""
    return weight.movedim(1, -1).reshape(len(weight), -1).contiguous()


def torch_accepts(weight: Tensor) -> bool:
    """Return whether PyTorch's conversion works for a weight."""
    try:
        sparse_semi_structured_from_dense_cutlass(as_matrix(weight))
    except (RuntimeError, IndexError):
        return False
    return True


def measure_compressed_form(weights: list[Tensor]) -> dict:
    """Return the seconds to compress and decompress all weights that both sides accept."""
    common = [weight for weight in weights if torch_accepts(weight)]
    matrices = [as_matrix(weight) for weight in common]
    ours = [compress_2to4(weight) for weight in common]
    theirs = [sparse_semi_structured_from_dense_cutlass(matrix) for matrix in matrices]
    median = medians(
        {
            "compress": lambda: [compress_2to4(weight) for weight in common],
            "torch_compress": lambda: [
                sparse_semi_structured_from_dense_cutlass(matrix) for matrix in matrices
            ],
            "decompress": lambda: [decompress_2to4(item) for item in ours],
            "torch_decompress": lambda: [
                sparse_semi_structured_to_dense_cutlass(*item) for item in theirs
            ],
        },
        ROUNDS,
    )
    return {
        "weights": len(weights),
        "weights_that_torch_takes": len(common),
        "seconds": {name: round(value, 3) for name, value in median.items()},
        "ratio_compress": round(median["torch_compress"] / median["compress"], 1),
        "ratio_decompress": round(median["torch_decompress"] / median["decompress"], 1),
    }


def main() -> None:
    """Measure and write the result."""
    torch.manual_seed(0)
    model = networks.create_model("resnext101_32x8d", num_classes=1000)
    with tempfile.TemporaryDirectory() as folder:
        large = export.export_onnx(model, Path(folder) / "dense.onnx", (3, 224, 224))
        large_file = {
            "megabytes": round(large.stat().st_size / 1e6, 1),
            "verify": seconds(lambda: verify_onnx(large)),
            "prune": seconds(lambda: prune_onnx(large, Path(folder) / "pruned.onnx")),
        }
        print("dense, FP32", large_file)

        prune_2to4_(model)
        path = export.export_onnx(model, Path(folder) / "sparse.onnx", (3, 224, 224), True)
        table = verify_onnx(path)
        ours = seconds(lambda: verify_onnx(path))
        print("verify_onnx", ours)

        model.half()
        parameters = dict(model.named_parameters())
        verdicts = verify_model(model)
        weights = [parameters[name].detach() for name in verdicts[verdicts.eligible].weight]
        compressed = measure_compressed_form(weights)
        print(compressed)
        file = Path(folder) / "sparse.safetensors"
        save_compressed(model, file)
        dense = sum(value.nbytes for value in model.state_dict().values())
        size = {"dense": dense / 1e6, "compressed": file.stat().st_size / 1e6}

        peer = time_polygraphy(path)
        print("polygraphy", peer)

    result = {
        "what": "ResNeXt-101 32x8d, FP16, random weights pruned 2:4; medians after a warm-up, "
        "polygraphy once",
        "command": "python benchmarks/verify.py",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "verify": ours,
        "polygraphy": peer,
        "ratio": round(peer["seconds"] / ours["seconds"], 1),
        "ratio_of_cpu_seconds": round(peer["cpu_seconds"] / ours["cpu_seconds"], 1),
        "eligible_weights": int(table.eligible.sum()),
        "all_eligible_2to4": bool(table[table.eligible].is_2to4.all()),
        "dense_fp32_file": large_file,
        "compressed": compressed,
        "megabytes": {name: round(value, 1) for name, value in size.items()},
        "polygraphy_version": metadata.version("polygraphy"),
        **machine.provenance(),
    }
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
