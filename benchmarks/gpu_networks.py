"""Whole networks on a GPU: dense and sparse in turns, the advice for them, and their kernels."""

import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from gpu_run import Run, earlier, network_file
from helpers.errors import HelpersError, InputError, UnavailableError, first_line
from helpers.files import write_json
from helpers.inference import cuda_graphs
from helpers.inference.cusparselt import why_no_sparse_gemms
from helpers.inference.runners import Runner
from helpers.inference.sparse_torch import SparseTorchRunner
from helpers.measurement import roofline
from helpers.measurement.advice import advise
from helpers.measurement.benchmark import check_outputs, sweep, time_in_turns
from helpers.measurement.energy import EnergyCounter, EnergyError, idle_watts
from helpers.measurement.rates import Rates
from helpers.sparsity.eligibility import eligible_weights
from helpers.training.networks import create_on_meta

ENERGY_BATCH_SIZES = [256]  # where energy is measured too, for half a minute each
# The largest maximum relative error; BF16 has three bits fewer.
TOLERANCES = {"FP16": 1e-2, "BF16": 5e-2}
INT8_TOLERANCE = 1e-1
CALIBRATION_IMAGES = 64  # random, as the weights are


def network(run: Run) -> None:
    """Measure a network over the batch sizes, dense and sparse in turns."""
    (name,) = run.job.networks
    # Before any load: later the GPU is warm, and its clocks are raised.
    if run.record.get("idle_watts") is None:
        run.record["idle_watts"] = idle_power(run)
    run.begin(f"{name}: the model")
    runners = run.runners(name)
    run.record |= {
        "what": f"{name}, random weights, dense and sparse in turns; see docs/helpers.md",
        "network": name,
        "eligible": len(eligible_weights(run.models(name)["sparse"], "cusparselt")),
    }
    measure(run, runners)


def idle_power(run: Run) -> float | None:
    """Return the power of the GPU in watts while nothing runs; None if it is not measured."""
    if not torch.cuda.is_available() or not set(run.job.batch_sizes) & set(ENERGY_BATCH_SIZES):
        return None
    run.begin("the power of the idle GPU")
    try:
        return idle_watts(EnergyCounter())
    except EnergyError as error:
        print(error)
        return None


def compiled(run: Run) -> None:
    """Measure a network with and without `torch.compile`, all in turns.

    The compiled dense model is the best dense one in PyTorch, and so the fair control.
    """
    (name,) = run.job.networks
    run.begin(f"{name}: the model")
    plain, runners = run.runners(name), run.runners(name, compile=True)
    runners["dense, not compiled"] = plain["dense"]
    runners["sparse, not compiled"] = plain["sparse"]
    run.record |= {
        "what": f"{name}, random weights: with and without torch.compile, in turns",
        "network": name,
    }
    measure(run, runners)


def int8(run: Run) -> None:
    """Measure a network in INT8 and in FP16 or BF16, dense and sparse, all in turns.

    Raises:
        UnavailableError: cuSPARSELt may not search, and there are no INT8 kernels without.
    """
    (name,) = run.job.networks
    if not run.job.search:
        raise UnavailableError("The INT8 kernels take cuSPARSELt's search, which breaks CUDA here.")
    run.begin(f"{name}: the model")
    runners = run.runners(name)
    images = torch.randn(CALIBRATION_IMAGES, *run.shape(name))
    sparse = "dense_int8" if why_no_sparse_gemms() else "cusparselt_int8"
    for label, kernels in (("dense", "dense_int8"), ("sparse", sparse)):
        runners[f"{label}, INT8"] = SparseTorchRunner(
            run.models(name)[label], kernels, runners[label].dtype,
            run.cache / "kernels.json", calibration=images,
        )  # fmt: skip
    run.record |= {
        "what": f"{name}, random weights: dense and sparse, with and without INT8 products, in "
        "turns",
        "network": name,
    }
    measure(run, runners, "sparse, INT8")


def measure(run: Run, runners: Mapping[str, SparseTorchRunner], explained: str = "sparse") -> None:
    """Check and time runners over the batch sizes while there is time, and write each at once.

    A batch size that the record has already is left out. Of one of the runners, the kernels and
    the times of whole networks are written too.
    """
    record, sparse = run.record, runners[explained]
    record |= {"runner": sparse.name, "datatype": run.job.datatype}
    record["image_shape"] = list(run.shape(record["network"]))
    for key in ("max_relative_errors", "rows", "network_times", "kernel_choices"):
        record.setdefault(key, [])
    record["failed"] = []
    record.pop("missing", None)
    done = {row["batch"] for row in record["rows"]}
    took: list[float] = []  # seconds for each batch size so far
    for batch in run.job.batch_sizes:
        if batch in done:
            continue
        if run.left < min(took, default=0):
            record["missing"] = f"no time was left from batch {batch} on"
            break
        began = time.monotonic()
        try:
            measure_batch(run, runners, batch)
        except (HelpersError, RuntimeError) as error:  # such as too little memory for this batch
            step = run.record["begun"]
            cuda_graphs.raise_if_context_is_broken(error, step)
            record["failed"].append({"batch": batch, "reason": f"{step}: {first_line(error)}"})
        add_rows(record["network_times"], sparse.network_times())
        add_rows(record["kernel_choices"], sparse.kernel_choices())
        run.write()
        took.append(time.monotonic() - began)


def add_rows(kept: list[dict[str, Any]], table: pd.DataFrame) -> None:
    """Add the rows of layers and inputs that are not among the kept ones yet."""
    known = {(row.get("layer"), row["input"]) for row in kept}
    rows = table.to_dict("records")
    kept += [row for row in rows if (row.get("layer"), row["input"]) not in known]


def measure_batch(run: Run, runners: Mapping[str, SparseTorchRunner], batch: int) -> None:
    """Check and time runners at one batch size, and add the results to the record."""
    record = run.record
    name, errors = record["network"], []
    for label, runner in runners.items():
        run.begin(f"{name}, {label}, batch {batch} in {run.job.datatype}: kernels and outputs")
        model = run.models(name)[label.partition(",")[0]]
        tolerance = INT8_TOLERANCE if "INT8" in label else TOLERANCES[run.job.datatype]
        error = check_outputs(runner, model, run.shape(name), batch, tolerance)
        errors.append({"network": label, "batch": batch, "max_relative_error": error})
    run.begin(f"{name}, batch {batch} in {run.job.datatype}: times")
    rounds = 3 if batch in ENERGY_BATCH_SIZES and run.left > 20 + 20 * len(runners) else 0
    table = sweep(
        runners, run.shape(name), [batch], run.job.seconds, energy_rounds=rounds,
        idle=record.get("idle_watts"),
    )  # fmt: skip
    record["rows"] += table.assign(search=run.job.search).to_dict("records")
    record["max_relative_errors"] += errors


def advice(run: Run) -> None:
    """Compare the times predicted from the measured products with those of the networks.

    A network that was not measured has nothing to compare. The result is `checked` in the
    products' record.

    Raises:
        InputError: a network was measured on another GPU than the products.
    """
    run.record["what"] = "nothing of its own: the comparison is `checked` in products.json"
    run.begin("the advice")
    rates = Rates.from_record(run.path("products"))
    record = json.loads(run.path("products").read_text())  # keeps its own date
    checked = []
    for name in run.job.networks:
        for datatype in TOLERANCES:
            file = network_file(name, datatype)
            measured = earlier(run.path(file))
            rows = [row for row in measured.get("rows", []) if row["network"] == "sparse"]
            if rows and measured["machine"].get("gpu") != record["machine"]["gpu"]:
                raise InputError(
                    f"{file}.json and products.json were not measured on the same GPU; measure "
                    "both into one folder."
                )
            checked += [checked_row(rates, measured, row, datatype) for row in rows]
    done = {(row["network"], row["datatype"]) for row in checked}
    before = record.get("checked", [])
    checked += [row for row in before if (row["network"], row["datatype"]) not in done]
    write_json(run.path("products"), record | {"checked": checked})


def checked_row(
    rates: Rates, measured: dict[str, Any], row: dict[str, Any], datatype: str
) -> dict[str, Any]:
    """Return what was predicted for a network at one batch size beside what was measured."""
    name, batch = measured["network"], row["batch"]
    predicted = advise(
        create_on_meta(name, 1000), rates, tuple(measured["image_shape"]), batch=batch,
        datatype=datatype,
    )  # fmt: skip
    return {
        "network": name,
        "datatype": datatype,
        "batch": batch,
        "predicted": predicted.speedup,
        "measured": row["speedup"],
        "predicted_sparse_ms": predicted.sparse_ms,
        "measured_sparse_ms": row["gpu_p50"],
    }


def profile(run: Run) -> None:
    """Record the kernels that take the most time; for the sparse model its products' floors too.

    One model in each process: the profiler may see nothing the second time.
    """
    (name,), batch, label = run.job.networks, max(run.job.batch_sizes), run.job.model
    images = torch.randn(batch, *run.shape(name))
    run.begin(f"{name}: the model")
    runner = run.runners(name)[label]
    run.record |= {
        "what": f"{name} at batch {batch}: the time in each kernel, and the products' floors; "
        "overhead compares a run's median by the host's and the GPU's clock with the sum of its "
        "kernels, in ms; if that is far below the GPU's, the profiler missed some",
        "datatype": run.job.datatype,
    }
    run.begin(f"{name}, {label}, batch {batch}: times")
    latency, *_ = time_in_turns([runner], images, run.job.seconds)
    run.begin(f"{name}, {label}, batch {batch}: the profiler")
    kernels = kernel_times(runner)
    total = sum(kernel["ms"] for kernel in kernels)
    gpu = None if latency.gpu is None else float(np.median(latency.gpu))
    run.record.setdefault("kernels", {})[label] = kernels
    overhead = run.record.setdefault("overhead", {})
    overhead[label] = {"p50": latency.p50, "gpu_p50": gpu, "kernels": total}
    if label == "sparse":
        run.begin("the floors of the slowest products")
        run.record["products"] = slowest_products(run, name, batch, runner.kernel_choices())


def kernel_times(runner: Runner, runs: int = 5) -> list[dict[str, Any]]:
    """Return the time of each kernel (on a CPU: operator) in a run, the longest first.

    Raises:
        UnavailableError: the profiler saw nothing, as happens to the second profile of a process.
    """
    on_gpu = torch.cuda.is_available()
    activity = (
        torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    )
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(runs):
            runner.run()
    kernels = [
        (event, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in profiler.key_averages()
    ]
    total = sum(microseconds for _, microseconds in kernels)
    if not total:
        raise UnavailableError("The profiler saw no kernel; run this part alone, in a new process.")
    return [
        {
            "kernel": event.key,
            "calls": event.count / runs,
            "ms": microseconds / runs / 1000,
            "share": 100 * microseconds / total,
        }
        for event, microseconds in sorted(kernels, key=lambda kernel: -kernel[1])
    ]


def slowest_products(
    run: Run, name: str, batch: int, choices: pd.DataFrame
) -> list[dict[str, Any]]:
    """Return the products that take the most time, with their floors by this GPU's best rates.

    They are of the layers that have kernels to choose from, without projections of attention,
    which have other names in the runner.
    """
    datatype = run.job.datatype
    rates = Rates.from_record(run.path("products"))
    if datatype not in rates.best:
        raise UnavailableError(
            f"No {datatype} product ran, so there are no rates to compute floors from."
        )
    dense, sparse = rates.best[datatype]
    advised = advise(
        run.models(name)["dense"], rates, run.shape(name), batch=batch, datatype=datatype
    )
    layers = choices.merge(advised.layers[["layer", "m", "n", "k"]], on="layer")
    layers["ms"] = [row[row["kernel"]] for row in layers.to_dict("records")]
    rows = layers.nlargest(15, "ms").to_dict("records")
    for row in rows:
        m, n, k = row["m"], row["n"], row["k"]
        row["dense_floor_ms"] = roofline.floor_ms(m, n, k, datatype, dense, rates.bandwidth, False)
        row["sparse_floor_ms"] = roofline.floor_ms(m, n, k, datatype, sparse, rates.bandwidth, True)
        row["operations_per_byte"] = roofline.intensity(m, n, k, datatype, sparse=True)
    return rows
