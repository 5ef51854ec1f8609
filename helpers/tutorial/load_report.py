"""The command `load-test`: load the models of a running server, print and draw what they do.

Explained in `09_serve_with_triton.ipynb`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from helpers import machine
from helpers.serving.endpoint import Endpoint
from helpers.serving.load import (
    WRONG,
    ClosedLoop,
    OpenLoop,
    ask_idle_server,
    compare_loads,
    find_inputs,
    random_requests,
)
from helpers.tutorial.own_models import Result

CLIENTS = (1, 2, 4, 8, 16)  # unless a load is given


@dataclass(frozen=True)
class Endpoints:
    """The models to load, on one server."""

    models: Sequence[str]
    protocol: str
    url: str  # Triton's own if empty

    def by_name(self) -> dict[str, Endpoint]:
        """Return the endpoint of each model."""
        return {name: Endpoint(name, self.protocol, self.url) for name in self.models}


@dataclass(frozen=True)
class Loads:
    """The loads to put on each model."""

    batch: int
    clients: Sequence[int]
    rates: Sequence[float]  # requests per second
    seconds: float  # for each load
    timeout: float  # seconds for each request
    seed: int

    def arrivals(self) -> list[ClosedLoop | OpenLoop]:
        """Return the loads, in their order."""
        clients = self.clients or (() if self.rates else CLIENTS)
        closed = [ClosedLoop(number) for number in clients]
        return [*closed, *(OpenLoop(rate, self.seed) for rate in self.rates)]


def load_test(endpoints: Endpoints, loads: Loads, tolerance: float, picture: Path | None) -> Result:
    """Load each model in turn; passed if there were answers and none was wrong.

    Args:
        endpoints: the models.
        loads: the loads.
        tolerance: the largest maximum relative error of an answer, compared with what the idle
            server answers; 0 asks for equal numbers.
        picture: PNG file to draw latency against throughput into.

    Raises:
        InputError: the arguments do not fit the models.
        UnavailableError: there is no such server or model, or no tritonclient.
    """
    models = endpoints.by_name()
    requests = {
        name: random_requests(find_inputs(endpoint), loads.batch, seed=loads.seed)
        for name, endpoint in models.items()
    }
    expected = {
        name: ask_idle_server(endpoint, requests[name], loads.timeout)
        for name, endpoint in models.items()
    }
    table = compare_loads(
        models, requests, loads.arrivals(), loads.seconds, expected, tolerance, loads.timeout
    )
    if picture is not None:
        from helpers.tutorial import plots

        address = next(iter(models.values())).address
        title = f"batches of {loads.batch} images, {endpoints.protocol}, {address}"
        plots.save(plots.plot_load(table, title), picture)
    passed = bool((table.answered > 0).all()) and not any(WRONG in row for row in table.errors)
    facts = {
        "models": list(models),
        "protocol": endpoints.protocol,
        "seconds": loads.seconds,
        "seed": loads.seed,
        **machine.provenance(),
        "rows": table.to_dict("records"),
    }
    return Result(_text(table), facts, passed)


def _text(table: pd.DataFrame) -> str:
    """Return the table with its errors in words; columns without a value are left out."""
    words = table.errors.map(
        lambda errors: ", ".join(f"{count} {kind}" for kind, count in errors.items()) or "none"
    )
    shown = table.assign(errors=words).drop(columns="protocol").dropna(axis="columns", how="all")
    return shown.round(2).to_string(index=False, na_rep="")
