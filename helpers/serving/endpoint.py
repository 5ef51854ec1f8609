"""A model on a running inference server, asked by tritonclient without waiting in between.

The protocol is KServe's v2, over gRPC or HTTP; NVIDIA Triton and many other servers speak it.
Used in `09_serve_with_triton.ipynb`.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpers.errors import HelpersError, InputError, UnavailableError, first_line

Tensors = Mapping[str, np.ndarray]  # by the names of a model's inputs or outputs
Send = Callable[[int], Awaitable[Tensors]]  # sends one of some prepared requests, by its number

PORTS = {"grpc": 8001, "http": 8000}  # Triton's own
LARGEST_MESSAGE = 2**31 - 1  # bytes; gRPC's limit
HTTP_CONNECTIONS = 512  # a loop that waits to the microsecond takes below 1024 files
NO_CONNECTION = "no connection"
# gRPC reports a broken connection with the status of a server that refuses; its words differ.
BROKEN = re.compile(r"failed to connect|socket closed|connection re(set|fused)|broken pipe|recvmsg")
HTTP_KINDS = {
    "400": "invalid argument",
    "404": "not found",
    "429": "unavailable",
    "500": "internal",
    "503": "unavailable",
    "504": "deadline exceeded",
}


class RequestError(HelpersError, RuntimeError):
    """A request got no answer.

    Attributes:
        kind: gRPC's name of the status, such as `unavailable`, over HTTP too; or `no connection`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Endpoint:
    """A model on a server.

    Args:
        model: its name there.
        protocol: `grpc` or `http`.
        url: host and port, without `http://`; Triton's own port on this machine unless given.

    Raises:
        InputError: the protocol is unknown, or the URL has a scheme.
    """

    model: str
    protocol: str = "grpc"
    url: str = ""

    def __post_init__(self) -> None:
        if self.protocol not in PORTS:
            raise InputError(f"There is no protocol {self.protocol!r}; use grpc or http.")
        if "://" in self.url:
            raise InputError(f"Give {self.url} as host and port alone, such as localhost:8001.")

    @property
    def address(self) -> str:
        """Host and port."""
        return self.url or f"localhost:{PORTS[self.protocol]}"


@dataclass(frozen=True)
class ModelInput:
    """An input as the server declares it."""

    name: str
    datatype: str  # such as FP32
    shape: tuple[int, ...]  # with the batch; -1 where any size fits


def _open_client(endpoint: Endpoint, connections: int) -> Any:
    """Return a client of tritonclient, to be used inside a running event loop.

    Raises:
        UnavailableError: tritonclient is not installed.
    """
    try:
        if endpoint.protocol == "http":
            from tritonclient.http.aio import InferenceServerClient

            return InferenceServerClient(
                endpoint.address, conn_limit=min(connections, HTTP_CONNECTIONS)
            )
        from tritonclient.grpc.aio import InferenceServerClient
    except (ImportError, RuntimeError) as error:  # RuntimeError: without its gRPC or HTTP part
        raise UnavailableError(
            f"tritonclient is not installed for {endpoint.protocol} ({first_line(error)}). "
            "Install it with pip install '.[serving]'."
        ) from error
    options = [
        ("grpc.max_send_message_length", LARGEST_MESSAGE),
        ("grpc.max_receive_message_length", LARGEST_MESSAGE),
        # Else a client waits up to two minutes before it tries a restarted server again.
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    return InferenceServerClient(endpoint.address, channel_args=options)


def error_kind(status: str | None, message: str) -> str:
    """Return in a word or two why there was no answer.

    Args:
        status: as tritonclient gives it, such as `StatusCode.UNAVAILABLE` or `503`; None if no
            server answered.
        message: what came with it.
    """
    if status is None:
        return NO_CONNECTION
    if status in HTTP_KINDS:
        return HTTP_KINDS[status]
    kind = status.removeprefix("StatusCode.").replace("_", " ").lower()
    is_broken = kind == "unavailable" and BROKEN.search(message.lower())
    return NO_CONNECTION if is_broken else kind


@contextmanager
def _reporting(protocol: str) -> Iterator[None]:
    """Raise what tritonclient raises as a RequestError."""
    from tritonclient.utils import InferenceServerException

    no_answer: list[type[Exception]] = [OSError]
    if protocol == "http":
        import aiohttp

        no_answer.append(aiohttp.ClientError)
    try:
        yield
    except TimeoutError:  # an OSError too
        raise
    except InferenceServerException as error:
        status = None if error.status() is None else str(error.status())
        raise RequestError(error_kind(status, str(error)), first_line(error)) from error
    except tuple(no_answer) as error:
        raise RequestError(error_kind(None, ""), first_line(error)) from error


@asynccontextmanager
async def connect(
    endpoint: Endpoint, requests: Sequence[Tensors], connections: int = 256
) -> AsyncIterator[Send]:
    """Connect to a server, and yield what sends one of these requests and returns the outputs.

    Args:
        endpoint: the model.
        requests: each with an array for each input; the first dimension is the batch.
        connections: how many HTTP requests may be under way at a time, at most 512, beyond which
            they wait for each other; gRPC needs one.

    Raises:
        UnavailableError: tritonclient is not installed.
        RequestError: raised by what is yielded: there was no answer.
    """
    client = _open_client(endpoint, connections)
    if endpoint.protocol == "http":
        from tritonclient.http import InferInput
    else:
        from tritonclient.grpc import InferInput
    from tritonclient.utils import np_to_triton_dtype

    def prepare(name: str, array: np.ndarray) -> Any:
        prepared = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        prepared.set_data_from_numpy(array)
        return prepared

    prepared = [[prepare(*each) for each in request.items()] for request in requests]

    async def send(number: int) -> Tensors:
        with _reporting(endpoint.protocol):
            result = await client.infer(endpoint.model, prepared[number])
        return _outputs(result.get_response(), result.as_numpy)

    async with client:
        yield send


def _outputs(response: Any, as_numpy: Callable[[str], np.ndarray | None]) -> Tensors:
    """Return the outputs of a response; one that has no bytes is left out."""
    outputs = response["outputs"] if isinstance(response, dict) else response.outputs
    names = [each["name"] if isinstance(each, dict) else each.name for each in outputs]
    arrays = {name: as_numpy(name) for name in names}
    return {name: array for name, array in arrays.items() if array is not None}


async def model_inputs(endpoint: Endpoint, timeout: float = 10.0) -> list[ModelInput]:
    """Return the inputs of a model, as its server declares them.

    Args:
        endpoint: the model.
        timeout: seconds to wait for the server.

    Raises:
        UnavailableError: there is no server, no such model, or no tritonclient.
    """
    options = {"as_json": True} if endpoint.protocol == "grpc" else {}
    try:
        async with _open_client(endpoint, 1) as client, asyncio.timeout(timeout):
            with _reporting(endpoint.protocol):
                metadata = await client.get_model_metadata(endpoint.model, **options)
    except (RequestError, TimeoutError) as error:
        raise UnavailableError(
            f"The server at {endpoint.address} did not describe the model {endpoint.model} over "
            f"{endpoint.protocol} ({first_line(error)}). Start a server, or check the address and "
            "the name of the model."
        ) from error
    return [
        ModelInput(each["name"], each["datatype"], tuple(int(size) for size in each["shape"]))
        for each in metadata["inputs"]
    ]
