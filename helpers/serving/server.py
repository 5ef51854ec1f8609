"""Run a Triton server on this machine: check, start, watch, restart, stop.

Only programs on this machine reach the server, and they cannot load, unload or trace models. A
thread watches it: it is ready when it has answered its own test images rightly, and it is started
again if it dies. Explained in `09_serve_with_triton.ipynb`.
"""

import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors.torch import load_file

from helpers.errors import InputError, first_line
from helpers.files import shown
from helpers.inference.export import INPUT, OUTPUT
from helpers.metrics import max_relative_error
from helpers.serving.errors import ServingError
from helpers.serving.repository import RECORD, SELF_TEST
from helpers.serving.triton_binary import TritonBinary, find_triton

HOST = "127.0.0.1"
PORTS = (8000, 8001, 8002)  # HTTP, gRPC, metrics: those that Triton uses everywhere
CLOSED = "shared-memory,model-repository,trace,logging"
START_SECONDS = 120.0  # a server that is not ready by then is not going to be
STOP_SECONDS = 10.0
RESTARTS = 5  # in a row, without the server becoming ready
SAME_ANSWER = 1e-3  # the largest relative error of the self-test
# Runs a program that receives SIGTERM when the thread that started it ends, however it ends.
LAUNCH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execv(sys.argv[1], sys.argv[1:])
"""

_logger = logging.getLogger(__name__)


def free_ports() -> tuple[int, int, int]:
    """Return three ports on which nothing listens at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind((HOST, 0))
        first, second, third = (each.getsockname()[1] for each in sockets)
    return first, second, third


class TritonServer:
    """A Triton server with the models of a repository, for programs on this machine.

    `start`, or entering a `with` block, returns when the server is ready, after a few seconds. If
    it dies it is started again; in the meantime its clients get connection errors.

    Args:
        repository: a folder of `write_repository`, whose models all use the `python` backend.
        ports: of HTTP, gRPC and the page of metrics.
        log: file for what the server prints; a temporary one unless given.
        triton: the server's environment; made on first use unless given.

    Raises:
        InputError: the folder is no model repository.
        ServingError: later on, the server cannot run here, a port is in use, a model does not
            load, or a self-test fails; the message has the reason that the server logged.
    """

    def __init__(
        self,
        repository: Path,
        ports: tuple[int, int, int] = PORTS,
        log: Path | None = None,
        triton: TritonBinary | None = None,
    ) -> None:
        self.repository = Path(repository)
        if not (self.repository / RECORD).exists():
            raise InputError(
                f"{shown(self.repository)} is no model repository. Write one with "
                "helpers.serving.repository.write_repository."
            )
        self.ports, self.triton = ports, triton
        self.http_address, self.grpc_address, self.metrics_address = (
            f"{HOST}:{port}" for port in ports
        )
        self.starts = 0  # how often the server has become ready
        self._folder = tempfile.TemporaryDirectory(prefix="triton_")
        self.log = Path(log or Path(self._folder.name) / "server.log")
        self._shared = f"s2to4_{secrets.token_hex(6)}_"  # begins the names of its shared memory
        self._token = secrets.token_hex(16)  # opens what is closed; nobody is told
        self._process: subprocess.Popen | None = None
        self._stopping, self._settled = threading.Event(), threading.Event()
        self._ready = threading.Event()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """The server's process; None while it is not running."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def start(self) -> Self:
        """Start the server, and return when it is ready."""
        self.triton = self.triton or find_triton()
        _require_free(self.ports)
        self._stopping.clear()
        self._thread = threading.Thread(target=self._watch, name="triton", daemon=True)
        self._thread.start()
        self._settled.wait()
        if self._failure is not None:
            self.stop()
            raise self._failure
        return self

    def stop(self) -> None:
        """Stop the server, and wait until it has ended."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._folder.cleanup()

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        """Return when the server is ready, after a restart too.

        Raises:
            ServingError: it is not ready in time, or cannot be started again.
        """
        if not self._ready.wait(seconds) or self._failure is not None:
            reason = self._failure or f"it is not ready after {seconds:g} s"
            raise ServingError(f"The server is down: {reason}")

    def require_alive(self) -> None:
        """Check that the server runs, or is being started again.

        Raises:
            ServingError: it died, and could not be started again.
        """
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # --- the thread that watches ---

    def _watch(self) -> None:
        """Start the server, and again whenever it dies, until it is to stop."""
        failures = 0
        while not self._stopping.is_set():
            try:
                self._run_once()
                failures = 0
            except Exception as error:  # told by `start`, or by `require_alive`
                failures += 1
                if self.starts == 0 or failures == RESTARTS:
                    self._failure = error
                    break
                _logger.warning("the server did not start again: %s", error)
            finally:
                self._ready.clear()
                self._end_process()
            if not self._stopping.is_set():
                _logger.warning("the server has died and is started again")
        self._settled.set()

    def _run_once(self) -> None:
        """Start the server; return when it has ended or is to end."""
        process = self._process = self._launch()
        deadline = time.monotonic() + START_SECONDS
        while not self._is_up():
            if process.poll() is not None:
                raise ServingError(f"The Triton server did not start: {self._reason()}")
            if time.monotonic() > deadline:
                raise ServingError(f"The Triton server was not ready within {START_SECONDS:g} s.")
            if self._stopping.wait(0.1):
                return
        self._self_test()
        self.starts += 1
        _logger.info("the server is ready: HTTP %s, gRPC %s", self.http_address, self.grpc_address)
        self._ready.set()
        self._settled.set()
        while process.poll() is None and not self._stopping.wait(0.2):
            pass

    def _launch(self) -> subprocess.Popen:
        assert self.triton is not None
        http, grpc, metrics = self.ports
        arguments = [
            f"--model-repository={self.repository.resolve()}",
            f"--backend-directory={self.triton.backends}",
            f"--backend-config=python,shm-region-prefix-name={self._shared}",
            *(f"--{kind}-address={HOST}" for kind in ("http", "grpc", "metrics")),
            *(f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"),
            f"--http-restricted-api={CLOSED}:token={self._token}",
            f"--grpc-restricted-protocol={CLOSED}:token={self._token}",
            "--disable-auto-complete-config",
            f"--exit-timeout-secs={STOP_SECONDS / 2:.0f}",
        ]
        command = [sys.executable, "-I", "-c", LAUNCH, str(self.triton.program), *arguments]
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.triton.variables(),
                start_new_session=True,  # Ctrl-C is for the program that uses the server
            )

    def _end_process(self) -> None:
        """End the server and everything that it has started, and remove its shared memory."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its models are processes too
        process.wait()
        for path in Path("/dev/shm").glob(f"{self._shared}*"):
            path.unlink(missing_ok=True)

    def _is_up(self) -> bool:
        from tritonclient.grpc import InferenceServerClient
        from tritonclient.utils import InferenceServerException

        with InferenceServerClient(self.grpc_address) as client:
            try:
                return bool(client.is_server_ready(client_timeout=1))
            except InferenceServerException:
                return False

    def _self_test(self) -> None:
        """Send each model its test images, and compare the answer with what was recorded."""
        from tritonclient.grpc import InferenceServerClient, InferInput
        from tritonclient.utils import InferenceServerException, np_to_triton_dtype

        with InferenceServerClient(self.grpc_address) as client:
            for path in sorted(self.repository.glob(f"*/{SELF_TEST}")):
                model, expected = path.parent.name, load_file(path)
                images = expected[INPUT].numpy()
                tensor = InferInput(INPUT, images.shape, np_to_triton_dtype(images.dtype))
                tensor.set_data_from_numpy(images)
                try:
                    answer = client.infer(model, [tensor], client_timeout=START_SECONDS)
                except InferenceServerException as error:
                    raise ServingError(
                        f"The model {model!r} fails on its self-test: {error}"
                    ) from error
                logits = torch.from_numpy(answer.as_numpy(OUTPUT).copy())
                wanted = expected[OUTPUT]
                if logits.shape != wanted.shape:
                    raise ServingError(
                        f"The model {model!r} answers its self-test with logits of shape "
                        f"{tuple(logits.shape)} instead of {tuple(wanted.shape)}."
                    )
                error_found = max_relative_error(logits, wanted)
                if not error_found <= SAME_ANSWER:  # a NaN is not below it either
                    raise ServingError(
                        f"The model {model!r} answers its self-test with logits that differ by "
                        f"{error_found:.1e} of the largest. Write the repository again."
                    )

    def _reason(self) -> str:
        """Return the last error that the server has logged."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("E") or "error:" in line.lower()]
        # These are logged wherever there is no GPU.
        errors = [line for line in errors if not re.search("NVML|CudaDriver|DCGM", line)]
        return errors[-1] if errors else "it logged no reason."


def _require_free(ports: Sequence[int]) -> None:
    """Check that nothing listens on the ports."""
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise ServingError(
                    f"Port {port} cannot be used ({first_line(error)}). Stop the program that "
                    "listens there, or choose other ports."
                ) from error


@contextlib.contextmanager
def serve(
    repository: Path,
    ports: tuple[int, int, int] = PORTS,
    log: Path | None = None,
    triton: TritonBinary | None = None,
) -> Iterator[TritonServer]:
    """Serve the models of a repository for the length of a `with` block; see `TritonServer`."""
    with TritonServer(repository, ports, log, triton) as server:
        yield server
