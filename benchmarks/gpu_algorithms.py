"""Try each of cuSPARSELt's algorithms, in processes of their own; `gpu.py` starts this.

    python benchmarks/gpu_algorithms.py algorithms.json FP16

Some algorithms leave CUDA unusable for their process. So this one never touches CUDA before all
of them have been tried: it forks a process for each, which starts in a second.
"""

import multiprocessing
from collections.abc import Callable
from functools import partial
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any

import torch
import typer

from helpers import machine
from helpers.errors import first_line
from helpers.files import write_json
from helpers.inference import cuda_graphs
from helpers.inference.errors import DeadContextError
from helpers.measurement.gemm import PRODUCTS
from helpers.measurement.roofline import datatype_named
from helpers.metrics import max_relative_error
from helpers.sparsity import mask_nm

SIDE = 1024  # of the product
MOST = 64  # numbers to try; version 0.8.1 has up to 52 algorithms, and refuses larger numbers
PROCESSES = 8
SECONDS = 30  # after which a process hangs
RIGHT = "right"


def outcome(datatype: str, algorithm: int) -> str:
    """Return what becomes of a product by one algorithm: `RIGHT`, or what is wrong."""
    torch.manual_seed(0)
    products = PRODUCTS[datatype]
    x, values = (torch.randn(SIDE, SIDE, device=machine.device()) for _ in range(2))
    kept = mask_nm(values, *datatype_named(datatype).pattern)
    weight = products.operand(values.masked_fill(~kept, 0))
    x = products.operand(x)
    expected = products.dense(x, weight)()
    try:
        product = partial(products.sparse(x, weight, search=False), alg_id=algorithm)
        error = max_relative_error(product(), expected)
    except RuntimeError as refusal:
        try:
            cuda_graphs.raise_if_context_is_broken(refusal, "it")
        except DeadContextError as dead:
            return f"dies: {first_line(dead.__cause__ or dead)}"
        return f"refused: {first_line(refusal)}"
    return RIGHT if error <= products.tolerance else f"wrong by {error:.1e} of the largest number"


def all_outcomes(datatype: str, tried: Callable[[str, int], str] = outcome) -> dict[int, str]:
    """Return the outcome of every algorithm, by its number.

    Args:
        datatype: a name in `DATATYPES`.
        tried: returns the outcome of one algorithm; runs in a process of its own.
    """

    def awaited(result: "AsyncResult[str]") -> str:
        try:
            return result.get(SECONDS)
        except multiprocessing.TimeoutError:
            return f"does not end within {SECONDS} s"

    context = multiprocessing.get_context("fork")
    with context.Pool(PROCESSES, maxtasksperchild=1) as pool:
        results = [pool.apply_async(tried, (datatype, number)) for number in range(MOST)]
        return {number: awaited(result) for number, result in enumerate(results)}


def main(out: Path, datatypes: list[str]) -> None:
    """Try every algorithm in some datatypes, and write the outcomes to a JSON file."""
    rows: list[dict[str, Any]] = []
    for datatype in datatypes:
        outcomes = all_outcomes(datatype)
        rows += [{"datatype": datatype, "alg_id": n, "outcome": how} for n, how in outcomes.items()]
        sound = [number for number, how in outcomes.items() if how == RIGHT]
        print(f"{datatype}: {len(sound)} algorithms are right: {sound}", flush=True)
    what = f"a product of {SIDE}x{SIDE}x{SIDE} by each of cuSPARSELt's algorithms"
    write_json(out, {"what": what, "rows": rows, **machine.provenance()})


if __name__ == "__main__":
    typer.run(main)
