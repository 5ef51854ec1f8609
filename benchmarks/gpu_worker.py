"""Measure one part on the GPU; `gpu.py` starts this in a process of its own.

    python benchmarks/gpu_worker.py '{"part": "products", "out": "...", "cache": "...", ...}'

The exit status tells `gpu.py` how it went: 0 if the part was measured or its record says why not,
`DEAD` if CUDA no longer works in this process, which may have been the fault of one kernel.
"""

import json
import sys
import traceback
from collections.abc import Callable

from gpu_engines import engines
from gpu_networks import advice, compiled, int8, network, profile
from gpu_products import probe, products
from gpu_run import Job, Run, network_file
from helpers.errors import HelpersError
from helpers.inference import cuda_graphs
from helpers.inference.cusparselt import why_no_sparse_gemms
from helpers.inference.errors import DeadContextError

DEAD = 3
STOPPED = 4  # the record says why


def machine_facts(run: Run) -> None:
    """Record the machine and the versions, and why it has nothing to measure if that is so."""
    run.record["missing"] = why_no_sparse_gemms()


PARTS: dict[str, Callable[[Run], None]] = {
    "machine": machine_facts,
    "probe": probe,
    "products": products,
    "network": network,
    "advice": advice,
    "int8": int8,
    "profile": profile,
    "engines": engines,
    "compiled": compiled,
}


def record_of(job: Job) -> str:
    """Return the name of a job's record."""
    if job.part == "network":
        return network_file(job.networks[0], job.datatype)
    if job.part == "probe":
        return f"probe_{job.datatype}_{job.squares[0]}"
    return job.part


def work(job: Job) -> int:
    """Do a job, and return the exit status."""
    run = Run(job, record_of(job))
    try:
        with cuda_graphs.named(f"the part {job.part}"):
            PARTS[job.part](run)
    except DeadContextError as error:
        status, reason = DEAD, str(error)
    except Exception as error:  # whatever it is, the record has to tell it
        if not isinstance(error, HelpersError):
            traceback.print_exc()
        status, reason = STOPPED, f"{type(error).__name__}: {error}"
    else:
        run.finish()
        return 0
    run.finish(reason, fatal=status == DEAD)
    print(f"stopped: {reason}")
    return status


if __name__ == "__main__":
    sys.exit(work(Job(**json.loads(sys.argv[1]))))
