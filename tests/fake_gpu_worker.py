"""What `gpu_worker.py` does as far as `gpu.py` sees it, on GPUs whose kernels die as told.

`FAKE_GPU` is JSON: `machine`, what is `missing` here, and by the beginning of a step how it ends:
`die` (by a signal), `hang`, `dead` (CUDA is), or `half` (dies and leaves half a record).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

job, fake = json.loads(sys.argv[1]), json.loads(os.environ["FAKE_GPU"])
part, datatype = job["part"], job["datatype"]
way = "searched" if job["search"] else "default"
here = {"machine": fake["machine"], "versions": {"cusparselt": "0.8.1"}}
name = part
if part == "network":
    name = job["networks"][0] + ("" if datatype == "FP16" else f"_{datatype.lower()}")
elif part == "probe":
    name = f"probe_{datatype}_{job['squares'][0]}"
file = Path(job["out"]) / f"{name}.json"
try:
    record = json.loads(file.read_text())
except (FileNotFoundError, ValueError):
    record = {}
record = {"stopped": {}} | record | here
record["stopped"].pop(datatype, None)


def do(step: str) -> None:
    """Do one step, or end as told."""
    record["begun"] = step
    file.write_text(json.dumps(record))
    print(f"begun: {step}", flush=True)
    how = next((how for start, how in fake["ends"].items() if step.startswith(start)), "")
    if how == "half":
        file.write_text(json.dumps(record)[:-20])
    if how in ("die", "half"):
        os.kill(os.getpid(), signal.SIGILL)
    if how == "hang":
        time.sleep(600)
    if how == "dead":
        record["stopped"][datatype] = f"CUDA no longer works, since {record.pop('begun')} failed"
        record.setdefault("fatal", []).append(step)
        file.write_text(json.dumps(record))
        sys.exit(3)
    record.setdefault("rows", []).append({"datatype": datatype, "p50": 1.0, "step": step})


if part == "probe":
    for key in ("default", "searched"):
        do(f"{datatype} {key} {job['squares'][0]}")
        record[key] = "right"
elif part == "machine":
    record["missing"] = fake["missing"]
else:
    names = {"products": job["squares"], "network": job["batch_sizes"]}.get(part, [0])
    for number in names:
        step = f"{part} {datatype} {way} {number}"
        if step not in record.get("fatal", []):
            do(step)
record.pop("begun", None)
file.write_text(json.dumps(record))
