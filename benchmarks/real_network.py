"""Take ResNeXt-101 32x8d through prune, export, verify and build, and time each step.

The weights are random (the steps take as long with any), and no GPU is needed. Writes
`benchmarks/results/real_network_cpu.json`.
"""

import tempfile
import time
from pathlib import Path

import torch

from helpers import machine
from helpers.files import write_json
from helpers.inference import engine, export
from helpers.sparsity import prune_2to4_, sparsity_report, verify_onnx
from helpers.training import networks

IMAGE = (3, 224, 224)
RESULT = Path(__file__).parent / "results" / "real_network_cpu.json"


def main() -> None:
    """Measure each step once, after a warm-up of the masks, and write the result."""
    torch.manual_seed(0)
    model = networks.create_model("resnext101_32x8d", num_classes=1000)
    report = sparsity_report(model, IMAGE)
    prune_2to4_(model)  # a fresh process pays for its memory once
    seconds: dict[str, float] = {}

    def timed(step: str, start: float) -> None:
        seconds[step] = round(time.perf_counter() - start, 2)
        print(f"{step:8} {seconds[step]:6.2f} s")

    with tempfile.TemporaryDirectory() as folder:
        onnx_file, plan = Path(folder) / "sparse.onnx", Path(folder) / "sparse.engine"
        start = time.perf_counter()
        prune_2to4_(model)
        timed("prune", start)

        start = time.perf_counter()
        export.export_onnx(model, onnx_file, IMAGE, half=True)
        timed("export", start)

        start = time.perf_counter()
        table = verify_onnx(onnx_file)
        timed("verify", start)

        start = time.perf_counter()
        built = engine.build_engine(onnx_file, plan, IMAGE, (1, 32, 256))
        timed("build", start)
        megabytes = {"onnx": onnx_file.stat().st_size / 1e6, "engine": built.megabytes}

    result = {
        "what": "ResNeXt-101 32x8d at 224x224, random weights, FP16; seconds of one run",
        "command": "python benchmarks/real_network.py",
        "report": report.facts(),
        "eligible_in_onnx": int(table.eligible.sum()),
        "all_eligible_2to4": bool(table[table.eligible].is_2to4.all()),
        "seconds": seconds,
        "megabytes": {name: round(size, 1) for name, size in megabytes.items()},
        "builder": f"{built.builder} {built.version}, {built.built_for}",
        **machine.provenance(),
    }
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
