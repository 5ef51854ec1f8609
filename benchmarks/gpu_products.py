"""Matrix products on a GPU: a probe of each datatype, and their times, dense and sparse."""

from typing import Any

import torch

from gpu_run import Run
from helpers.inference.cusparselt import SparseGemm, may_search
from helpers.measurement import gemm, roofline
from helpers.measurement.advice import advise
from helpers.measurement.rates import Rates
from helpers.training.networks import create_on_meta


def probe(run: Run) -> None:
    """Try a product of one size in one datatype: first by the default algorithm, then by all.

    Some versions of cuSPARSELt have algorithms that leave CUDA unusable, and the search for the
    fastest runs every one of them.
    """
    datatype, (side,) = run.job.datatype, run.job.squares
    for search, how in ((False, "default"), (True, "searched")):
        if search and not searches(datatype):
            break  # it is known to break CUDA
        run.begin(f"the {how} {datatype} product of {side}")
        row = gemm.measure_gemm((side, side, side), datatype, rounds=1, search=search)
        run.record[how] = row["reason"] or "right"


def products(run: Run) -> None:
    """Measure one datatype: squares, then the products of the networks if they run in it."""
    job, record = run.job, run.record
    record["what"] = (
        "dense and sparse matrix products in turns; ms, and 10^12 operations a second; search "
        "tells whether cuSPARSELt tried all its algorithms"
    )
    rows: list[dict[str, Any]] = record.setdefault("rows", [])
    if not record.get("bandwidth_gbps"):
        run.begin("the bandwidth of the memory")
        record["bandwidth_gbps"] = gemm.measure_bandwidth() if torch.cuda.is_available() else None
    sizes = [(side, side, side) for side in job.squares]
    if not gemm.why_not(job.datatype):
        layers = {size for name in job.networks for size in product_sizes(run, name)}
        sizes += sorted(layers - set(sizes))
    # What was refused may run in this run, so it is tried again.
    rows[:] = [row for row in rows if row["datatype"] != job.datatype or not row["reason"]]
    done = {(row["m"], row["n"], row["k"]) for row in rows if row["datatype"] == job.datatype}
    missing: dict[str, str] = record.setdefault("missing", {})
    missing.pop(job.datatype, None)
    search = job.search and searches(job.datatype)
    how = job.datatype if search else f"{job.datatype} (default algorithm)"
    steps = {f"the {how} product of {'x'.join(map(str, size))}": size for size in sizes}
    fatal = record.get("fatal", [])
    todo = [step for step, size in steps.items() if size not in done and step not in fatal]
    for number, step in enumerate(todo):
        if run.left < 15 and torch.cuda.is_available():
            missing[job.datatype] = f"no time was left for {len(todo) - number} products"
            break
        run.begin(step)
        m, n, k = steps[step]
        rounds = 10 if m == n == k else 5
        row = gemm.measure_gemm((m, n, k), job.datatype, rounds=rounds, search=search)
        rows.append({**row, "search": search})


def searches(datatype: str) -> bool:
    """Return whether cuSPARSELt may try all its algorithms for a datatype on this machine."""
    return not torch.cuda.is_available() or may_search(gemm.PRODUCTS[datatype].dtype)


def product_sizes(run: Run, name: str) -> set[tuple[int, int, int]]:
    """Return the sizes (m, n, k) of a network's products at its largest and smallest batch size.

    As when the network runs, m is padded to what cuSPARSELt takes.
    """
    rates = Rates.from_datasheet(roofline.DATASHEETS["a100"])  # any rates give the same sizes
    sizes: set[tuple[int, int, int]] = set()
    for batch in (max(run.job.batch_sizes), min(run.job.batch_sizes)):
        model = create_on_meta(name, 1000)
        layers = advise(model, rates, run.shape(name), batch=batch).layers
        eligible = layers[layers.sparse_ms.notna()]
        eligible = eligible.assign(m=eligible.m + -eligible.m % SparseGemm.STEP)
        sizes |= set(eligible[["m", "n", "k"]].itertuples(index=False, name=None))
    return sizes
