"""Load a server, and measure how it answers: latency, throughput and errors.

There are two kinds of load. In a closed loop, a fixed number of clients each send their next
request when their last one was answered. This finds what a server can do at most, but a server
that stalls is asked less, so its worst moments hardly count. In an open loop, requests arrive at
random times at a given rate, as those of many independent users do. Each has a time at which it
is due, and its latency counts from then, whether or not it could be sent on time.
Explained in `09_serve_with_triton.ipynb`.
"""

import asyncio
import itertools
import math
import selectors
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch

from helpers.errors import InputError, UnavailableError
from helpers.metrics import max_relative_error
from helpers.serving.endpoint import (
    Endpoint,
    ModelInput,
    RequestError,
    Send,
    Tensors,
    connect,
    model_inputs,
)

T = TypeVar("T")

WRONG, TIMED_OUT, NOT_SENT = "wrong answer", "timed out", "not sent"
# Seconds that a client of a closed loop waits after an error, lest clients of a server that has
# gone take all of the processor.
PAUSE = 0.01
NUMPY_TYPES: dict[str, Any] = {
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
}


@dataclass(frozen=True)
class ClosedLoop:
    """Clients that each send their next request when their last one was answered.

    Args:
        clients: how many.

    Raises:
        InputError: there are none.
    """

    clients: int

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise InputError(f"{self.clients} clients send nothing; give at least 1.")

    @property
    def connections(self) -> int:
        """How many requests may be under way at a time."""
        return self.clients

    def facts(self) -> dict[str, Any]:
        """Return the load as columns of a table."""
        return {"loop": "closed", "clients": self.clients, "rate": None}

    def __str__(self) -> str:
        return "1 client" if self.clients == 1 else f"{self.clients} clients"


@dataclass(frozen=True)
class OpenLoop:
    """Requests that arrive at random, whether or not earlier ones have been answered.

    Args:
        rate: requests per second on average; the arrivals are those of a Poisson process.
        seed: of the arrivals.
        in_flight: how many may be unanswered at a time. One that is due beyond that is not sent,
            and is counted as the error `not sent`.

    Raises:
        InputError: the rate or the number in flight is not positive.
    """

    rate: float
    seed: int = 0
    in_flight: int = 256

    def __post_init__(self) -> None:
        if not (0 < self.rate < math.inf and self.in_flight >= 1):
            raise InputError(
                f"{self.rate:g} requests per second, {self.in_flight} of them in flight, are no "
                "load; both must be positive."
            )

    @property
    def connections(self) -> int:
        """How many requests may be under way at a time."""
        return self.in_flight

    def facts(self) -> dict[str, Any]:
        """Return the load as columns of a table."""
        return {"loop": "open", "clients": None, "rate": self.rate}

    def __str__(self) -> str:
        return f"{self.rate:g} requests/s"

    def due_times(self, seconds: float) -> np.ndarray:
        """Return when each request of some seconds is due, in seconds from the start."""
        generator = np.random.default_rng(self.seed)
        # The arrivals of a Poisson process are uniform once their number is known.
        count = generator.poisson(self.rate * seconds)
        return np.sort(generator.uniform(0, seconds, count))


class Outcome(NamedTuple):
    """What became of one request; times are in seconds from the start of the load."""

    due: float
    sent: float
    done: float
    error: str  # its kind; empty if the answer was right


@dataclass(frozen=True, repr=False, eq=False)
class Load:
    """The outcomes of all requests of a load."""

    arrivals: ClosedLoop | OpenLoop
    batch: int  # images in each request
    seconds: float  # for which requests were sent
    outcomes: tuple[Outcome, ...]
    messages: Mapping[str, str]  # of each kind of error, the first message

    @property
    def errors(self) -> dict[str, int]:
        """How many requests ended in each kind of error."""
        return dict(Counter(each.error for each in self.outcomes if each.error))

    @property
    def answered(self) -> int:
        """How many requests got the right answer."""
        return sum(not each.error for each in self.outcomes)

    @property
    def times(self) -> np.ndarray:
        """Milliseconds from the time that each answered request was due until its answer."""
        return 1000 * np.array([each.done - each.due for each in self.outcomes if not each.error])

    def percentile(self, share: float) -> float:
        """Return the latency in ms that `share` per cent of the answers do not exceed."""
        times = self.times
        if not len(times):
            return math.nan
        return float(np.percentile(times, share, method="inverted_cdf"))

    @property
    def images_per_second(self) -> float:
        """Throughput: images of right answers, until the last request ended."""
        end = max((each.done for each in self.outcomes), default=0.0)
        return self.answered * self.batch / max(end, self.seconds)

    @property
    def sent_late_p99(self) -> float:
        """By how many ms 99 of 100 requests were sent late at most: how far the loader lagged."""
        late = [each.sent - each.due for each in self.outcomes if each.error != NOT_SENT]
        return 1000 * float(np.percentile(late, 99)) if late else math.nan

    def row(self) -> dict[str, Any]:
        """Return this load as a row of a table; times are in milliseconds."""
        return {
            **self.arrivals.facts(),
            "batch": self.batch,
            "requests": len(self.outcomes),
            "answered": self.answered,
            "images_per_second": self.images_per_second,
            "p50": self.percentile(50),
            "p95": self.percentile(95),
            "p99": self.percentile(99),
            "sent_late_p99": self.sent_late_p99,
            "errors": self.errors,
        }

    def __repr__(self) -> str:
        errors = ", ".join(f"{count} {kind}" for kind, count in self.errors.items()) or "no errors"
        return (
            f"{self.arrivals} of {self.batch} images: p50 {self.percentile(50):.2f} ms, "
            f"p95 {self.percentile(95):.2f} ms, p99 {self.percentile(99):.2f} ms, "
            f"{self.images_per_second:,.0f} images/s ({self.answered} answers, {errors})"
        )


def is_same(answer: Tensors, expected: Tensors, tolerance: float = 0.0) -> bool:
    """Return whether an answer has every expected output, with the expected numbers.

    Args:
        answer: by the names of the outputs.
        expected: by name too.
        tolerance: the largest maximum relative error of an output; with 0, numbers must be equal.
    """
    for name, numbers in expected.items():
        found = answer.get(name)
        if found is None or found.shape != numbers.shape:
            return False
        if np.array_equal(found, numbers):
            continue
        if tolerance <= 0 or not np.issubdtype(numbers.dtype, np.floating):
            return False
        error = max_relative_error(torch.from_numpy(found.copy()), torch.from_numpy(numbers.copy()))
        if not error <= tolerance:  # also refuses NaN
            return False
    return True


async def generate(
    send: Send,
    requests: Sequence[Tensors],
    arrivals: ClosedLoop | OpenLoop,
    seconds: float,
    expected: Sequence[Tensors] | None = None,
    tolerance: float = 0.0,
    timeout: float = 10.0,
) -> Load:
    """Send requests for some seconds, wait for the answers to all, and return what became of them.

    Args:
        send: sends one of the requests by its number, as `connect` yields it.
        requests: sent in turn; the first dimension of each array is the batch.
        arrivals: when they are sent.
        seconds: for how long.
        expected: the right answer to each request; unless given, answers are not checked.
        tolerance: as `is_same` takes it.
        timeout: seconds that a request may take once it is sent.

    Raises:
        InputError: there are no requests, not as many answers, or no time.
    """
    if not requests or not 0 < seconds < math.inf or not timeout > 0:
        raise InputError(
            f"{len(requests)} requests in {seconds:g} s, with {timeout:g} s for each, are no load: "
            "give at least one request and positive times."
        )
    if expected is not None and len(expected) != len(requests):
        raise InputError(f"There are {len(expected)} answers to {len(requests)} requests.")
    loop = asyncio.get_running_loop()
    outcomes: list[Outcome] = []
    messages: dict[str, str] = {}
    start = loop.time()

    async def ask(number: int, due: float) -> Outcome:
        which = number % len(requests)
        sent, answer, error = loop.time() - start, None, ""
        try:
            async with asyncio.timeout(timeout):
                answer = await send(which)
        except TimeoutError:
            error = TIMED_OUT
        except RequestError as refused:
            error = refused.kind
            messages.setdefault(error, str(refused))
        done = loop.time() - start
        if answer is not None and expected is not None:
            error = "" if is_same(answer, expected[which], tolerance) else WRONG
        outcomes.append(Outcome(due, sent, done, error))
        return outcomes[-1]

    async def client(first: int, clients: int) -> None:
        for number in itertools.count(first, clients):
            now = loop.time() - start
            if now >= seconds:
                return
            if (await ask(number, now)).error:
                await asyncio.sleep(PAUSE)

    async with asyncio.TaskGroup() as tasks:
        if isinstance(arrivals, ClosedLoop):
            for first in range(arrivals.clients):
                tasks.create_task(client(first, arrivals.clients))
        else:
            unanswered: set[asyncio.Task] = set()
            for number, due in enumerate(arrivals.due_times(seconds).tolist()):
                # Even if it is late: the requests before it are sent while this one waits.
                await asyncio.sleep(max(0.0, start + due - loop.time()))
                if len(unanswered) >= arrivals.in_flight:
                    now = loop.time() - start
                    outcomes.append(Outcome(due, now, now, NOT_SENT))
                    continue
                task = tasks.create_task(ask(number, due))
                unanswered.add(task)
                task.add_done_callback(unanswered.discard)
    batch = len(next(iter(requests[0].values())))
    return Load(arrivals, batch, seconds, tuple(outcomes), messages)


def load_server(
    endpoint: Endpoint,
    requests: Sequence[Tensors],
    arrivals: ClosedLoop | OpenLoop,
    seconds: float,
    expected: Sequence[Tensors] | None = None,
    tolerance: float = 0.0,
    timeout: float = 10.0,
) -> Load:
    """Load a model on a server, and return what became of the requests.

    Each request is first sent once, which is not counted.

    Args:
        endpoint: the model.
        requests: as `generate` takes them, and the arguments after it.
        arrivals: when they are sent.
        seconds: for how long.
        expected: the right answers; unless given, answers are not checked.
        tolerance: as `is_same` takes it.
        timeout: seconds that a request may take once it is sent.

    Raises:
        InputError: as `generate`.
        UnavailableError: tritonclient is not installed, or a first request gets no answer.
    """

    async def work() -> Load:
        async with connect(endpoint, requests, arrivals.connections) as send:
            await _ask_once(endpoint, send, len(requests), timeout)
            return await generate(send, requests, arrivals, seconds, expected, tolerance, timeout)

    return run(work())


async def _ask_once(endpoint: Endpoint, send: Send, count: int, timeout: float) -> list[Tensors]:
    """Return the answers to all requests, sent one after the other."""
    answers = []
    for number in range(count):
        try:
            async with asyncio.timeout(timeout):
                answers.append(await send(number))
        except (RequestError, TimeoutError) as error:
            raise UnavailableError(
                f"The model {endpoint.model} at {endpoint.address} did not answer a single "
                f"request: {str(error) or f'it took more than {timeout:g} s'}."
            ) from error
    return answers


def ask_idle_server(
    endpoint: Endpoint, requests: Sequence[Tensors], timeout: float = 10.0
) -> list[Tensors]:
    """Return a server's answers to requests that are sent one after the other.

    Args:
        endpoint: the model.
        requests: as `generate` takes them.
        timeout: seconds that a request may take.

    Raises:
        UnavailableError: tritonclient is not installed, or a request gets no answer.
    """

    async def work() -> list[Tensors]:
        async with connect(endpoint, requests, 1) as send:
            return await _ask_once(endpoint, send, len(requests), timeout)

    return run(work())


def random_requests(
    inputs: Sequence[ModelInput], batch: int, count: int = 16, seed: int = 0
) -> list[dict[str, np.ndarray]]:
    """Return requests with random numbers for the inputs of a model: integers are 0 or 1.

    Args:
        inputs: as `find_inputs` returns them.
        batch: images in each request.
        count: how many different ones.
        seed: of the random numbers.

    Raises:
        InputError: an input has a type or an open size for which no numbers can be chosen.
    """
    generator = np.random.default_rng(seed)
    return [{each.name: _random(each, batch, generator) for each in inputs} for _ in range(count)]


def _random(declared: ModelInput, batch: int, generator: np.random.Generator) -> np.ndarray:
    kind = NUMPY_TYPES.get(declared.datatype)
    if kind is None or not declared.shape or -1 in declared.shape[1:]:
        raise InputError(
            f"No random numbers suit the input {declared.name}, {declared.datatype} of shape "
            f"{list(declared.shape)}: only its first size may be open. Load the model from Python, "
            "with `load_server` and requests of your own."
        )
    if declared.shape[0] not in (-1, batch):
        raise InputError(
            f"The input {declared.name} takes {declared.shape[0]} images at a time, not {batch}."
        )
    shape = (batch, *declared.shape[1:])
    if np.issubdtype(kind, np.floating):
        return generator.standard_normal(shape).astype(kind)
    return generator.integers(0, 2, shape).astype(kind)


def find_inputs(endpoint: Endpoint) -> list[ModelInput]:
    """Return the inputs of a model, as its server declares them.

    Raises:
        UnavailableError: there is no server, no such model, or no tritonclient.
    """
    return run(model_inputs(endpoint))


def compare_loads(
    endpoints: Mapping[str, Endpoint],
    requests: Mapping[str, Sequence[Tensors]],
    arrivals: Sequence[ClosedLoop | OpenLoop],
    seconds: float,
    expected: Mapping[str, Sequence[Tensors]] | None = None,
    tolerance: float = 0.0,
    timeout: float = 10.0,
) -> pd.DataFrame:
    """Load several models in turn with each of several loads.

    Args:
        endpoints: the models, by their names in the table.
        requests: those of each model, by the same names, as `generate` takes them.
        arrivals: the loads; each is put on all models before the next.
        seconds: for each load of each model.
        expected: the right answers of each model; unless given, answers are not checked.
        tolerance: as `is_same` takes it.
        timeout: seconds that a request may take once it is sent.

    Returns:
        One row for each load and model, with `model`, `protocol` and what `Load.row` has.

    Raises:
        InputError: as `generate`.
        UnavailableError: as `load_server`.
    """
    rows = []
    for each in arrivals:
        for name, endpoint in endpoints.items():
            answers = expected[name] if expected else None
            load = load_server(endpoint, requests[name], each, seconds, answers, tolerance, timeout)
            rows.append({"model": name, "protocol": endpoint.protocol, **load.row()})
    return pd.DataFrame(rows)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_run, work).result()


def _run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=_precise_loop) as runner:
        return runner.run(work)


def _precise_loop() -> asyncio.AbstractEventLoop:
    # With its usual selector, asyncio waits to the millisecond; with this one to the microsecond.
    return asyncio.SelectorEventLoop(selectors.SelectSelector())
