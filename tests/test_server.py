"""A Triton server on this machine: what it answers, what it refuses, and that it stays up.

One server serves the whole module. Where it cannot run, the tests are skipped with the reason.
"""

import concurrent.futures
import io
import json
import os
import re
import signal
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("tritonclient.grpc", reason="tritonclient is missing", exc_type=ImportError)

import tritonclient.grpc
import tritonclient.http
from safetensors.torch import load_file, save_file
from tritonclient.utils import InferenceServerException

from helpers.errors import InputError
from helpers.inference.runners import OnnxRunner
from helpers.serving import load
from helpers.serving import server as server_module
from helpers.serving.errors import ServingError
from helpers.serving.python_model import best_classes, decode_jpeg
from helpers.serving.repository import (
    SELF_TEST,
    Batching,
    Preprocessing,
    ServedModel,
    write_repository,
)
from helpers.serving.server import TritonServer, free_ports
from helpers.serving.triton_binary import find_triton
from helpers.tutorial.settings import project_root

CLIENTS = {"http": tritonclient.http, "grpc": tritonclient.grpc}
GREY = Preprocessing([0.286], [0.353], resize=28, crop=28)
NAMES = [f"class {number}" for number in range(10)]
LARGEST = 128

both_protocols = pytest.mark.parametrize("protocol", CLIENTS)


@pytest.fixture(scope="module")
def triton():
    try:
        return find_triton()
    except ServingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def networks(exported, resnext_files) -> dict[str, Path]:
    return {"dense": exported[1]["fp32"], "sparse": resnext_files["fp32"]}


@pytest.fixture(scope="module")
def write(networks):
    def write(folder: Path, **batching: int) -> Path:
        models = [ServedModel(name, path) for name, path in networks.items()]
        sizes = (1, LARGEST)
        return write_repository(
            folder, models, (1, 28, 28), NAMES, GREY, Batching(sizes=sizes, **batching)
        )

    return write


@pytest.fixture(scope="module")
def server(triton, write, tmp_path_factory):
    # A request may wait for long on a busy machine, and only one test is about refusals.
    folder = write(tmp_path_factory.mktemp("served") / "repository", longest_wait_ms=60_000)
    with TritonServer(folder, free_ports(), triton=triton) as server:
        yield server


@pytest.fixture(scope="module")
def runners(networks):
    return {name: OnnxRunner(path) for name, path in networks.items()}


@pytest.fixture
def client(server, protocol):
    with connect(server, protocol) as client:
        yield client


def connect(server: TritonServer, protocol: str):
    server.wait_until_ready()
    address = server.http_address if protocol == "http" else server.grpc_address
    return CLIENTS[protocol].InferenceServerClient(address)


def ask(client, model: str, array: np.ndarray, name: str = "images", kind: str = "FP32"):
    """Return the answer to one request, with the module of the client's protocol."""
    module = CLIENTS["http" if "http" in type(client).__module__ else "grpc"]
    tensor = module.InferInput(name, array.shape, kind)
    tensor.set_data_from_numpy(array)
    return client.infer(model, [tensor])


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 1, 28, 28), dtype=np.float32)


def jpeg(seed: int, size: int = 28) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def jpegs(*files: bytes) -> np.ndarray:
    return np.array([[file] for file in files], dtype=object)


def assert_served(server: TritonServer, runners) -> None:
    """Check that a request is answered, and rightly."""
    own = images(3, seed=9)
    with connect(server, "grpc") as client:
        found = ask(client, "sparse", own).as_numpy("logits")
    assert np.array_equal(found, runners["sparse"](torch.from_numpy(own)).numpy())


# --- answers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every_size(runners) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and the sparse runner's logits for each batch size."""
    batches = [images(size, seed=size) for size in range(1, LARGEST + 1)]
    return [(batch, runners["sparse"](torch.from_numpy(batch)).numpy()) for batch in batches]


@both_protocols
def test_answers_are_the_runners_own_for_every_batch_size(client, every_size):
    for own, logits in every_size:
        assert np.array_equal(ask(client, "sparse", own).as_numpy("logits"), logits), len(own)


@both_protocols
def test_jpeg_files_become_the_names_and_scores_of_the_runners_logits(client, runners):
    for size in (1, 2, 7, 32):
        files = [jpeg(seed, 28 if seed % 2 else 40) for seed in range(size)]
        decoded = np.stack([decode_jpeg(file, GREY.mean, GREY.std, 28, 28) for file in files])
        order, scores = best_classes(runners["sparse"](torch.from_numpy(decoded)).numpy(), 3)
        found = ask(client, "sparse_jpeg", jpegs(*files), "jpeg", "BYTES")
        assert np.array_equal(found.as_numpy("scores"), scores)
        names = [[NAMES[number].encode() for number in row] for row in order]
        assert found.as_numpy("classes").tolist() == names


def test_answers_are_the_runners_own_under_concurrent_load(server, runners):
    def work(worker: int) -> int:
        protocol, model = ("http", "grpc")[worker % 2], ("dense", "sparse")[worker // 2 % 2]
        with connect(server, protocol) as client:
            for turn in range(15):
                own = images(1 + (7 * worker + turn) % 40, seed=100 * worker + turn)
                found = ask(client, model, own).as_numpy("logits")
                with one_at_a_time:
                    wanted = runners[model](torch.from_numpy(own)).numpy()
                assert np.array_equal(found, wanted)
        return turn

    one_at_a_time = threading.Lock()  # a runner holds the images of one caller
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [14] * 8


@both_protocols
def test_a_client_can_ask_for_the_best_classes_by_name(client, runners, protocol):
    module, own = CLIENTS[protocol], images(2)
    tensor = module.InferInput("images", own.shape, "FP32")
    tensor.set_data_from_numpy(own)
    asked = [module.InferRequestedOutput("logits", class_count=1)]
    found = client.infer("sparse", [tensor], outputs=asked).as_numpy("logits")
    expected = runners["sparse"](torch.from_numpy(own)).argmax(1).tolist()
    named = [text.decode().split(":")[1:] for text in found[:, 0]]
    assert named == [[str(number), NAMES[number]] for number in expected]


def test_the_example_of_the_readme_asks_the_server(server, runners, capsys):
    readme = (project_root() / "README.md").read_text()
    (example,) = re.findall(r"```py\n(.*?)```", readme, re.S)
    assert example.count("127.0.0.1:8001") == 1
    assert sum(map(bool, example.splitlines())) == 5
    names: dict = {}
    exec(example.replace("127.0.0.1:8001", server.grpc_address), names)
    names["client"].close()
    logits = runners["sparse"](torch.zeros(1, 1, 28, 28)).numpy()
    assert capsys.readouterr().out == f"{logits}\n"


# --- bad input -----------------------------------------------------------------------------


def tampered() -> np.ndarray:
    array = images(2)
    array[1, 0, 5, 5] = np.inf
    return array


def giant() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (20_000, 20_000)).save(buffer, "JPEG")
    return buffer.getvalue()


BAD = {
    "height": ("sparse", images(2)[:, :, :27], "images", "FP32", "unexpected shape"),
    "rank": ("sparse", images(2)[0], "images", "FP32", "unexpected shape|expect"),
    "type": ("sparse", images(2).astype(np.float16), "images", "FP16", "data-?type"),
    "name": ("sparse", images(2), "pictures", "FP32", "unexpected inference input|pictures"),
    "model": ("spares", images(2), "images", "FP32", "unknown model"),
    "empty batch": ("sparse", images(0), "images", "FP32", "Expected 3136, got 0"),
    "too large": ("sparse", images(LARGEST + 1), "images", "FP32", "batch-size must be <= 128"),
    "infinite": ("sparse", tampered(), "images", "FP32", "NaN or infinite"),
    "garbage": ("sparse_jpeg", jpegs(b"garbage"), "jpeg", "BYTES", "no JPEG file"),
    "empty file": ("sparse_jpeg", jpegs(b""), "jpeg", "BYTES", "no JPEG file"),
    "truncated": ("sparse_jpeg", jpegs(jpeg(0, 280)[:-4000]), "jpeg", "BYTES", "damaged"),
    "giant": ("sparse_jpeg", jpegs(jpeg(0), giant()), "jpeg", "BYTES", "jpeg 1: too many pixels"),
}


@both_protocols
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_clear_error_and_the_next_request_is_served(server, client, runners, case):
    model, array, name, kind, complaint = BAD[case]
    with pytest.raises(InferenceServerException, match=complaint):
        ask(client, model, np.ascontiguousarray(array), name, kind)
    assert_served(server, runners)


def post(server: TritonServer, path: str, body: bytes, **headers: str) -> tuple[int, str]:
    """Return the status and text of an answer over HTTP, without a client library."""
    request = urllib.request.Request(
        f"http://{server.http_address}/v2/{path}", body, headers, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"garbage", {}),
        (b"garbage", {"Inference-Header-Content-Length": str(2**40)}),
        (json.dumps({"inputs": [{"name": "images", "shape": [-1, 1, 28, 28],
                     "datatype": "FP32", "data": [0]}]}).encode(), {}),
        (json.dumps({"inputs": [{"name": "images", "shape": [1, 1, 28, 28],
                     "datatype": "FP32", "data": [0]}]}).encode(), {}),
    ],
    ids=["garbage", "long header", "negative shape", "short data"],
)  # fmt: skip
def test_a_malformed_request_is_refused(server, runners, body, headers):
    status, text = post(server, "models/sparse/infer", body, **headers)
    assert 400 <= status < 600
    assert "error" in text
    assert_served(server, runners)


def test_a_header_that_declares_gigabytes_costs_a_restart_at_most(server, runners):
    starts = server.starts
    body = {"inputs": [{"name": "images", "shape": [1, 1, 10**9, 28], "datatype": "FP32",
                        "data": [0]}]}  # fmt: skip
    try:
        status, _ = post(server, "models/sparse/infer", json.dumps(body).encode())
        assert status >= 400
    except OSError:  # this version of Triton dies of it
        wait_for_start(server, starts + 1)
    assert_served(server, runners)


def test_clients_that_hang_up_do_no_harm(server, runners):
    host, port = server.http_address.split(":")
    head = b"POST /v2/models/sparse/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100352\r\n\r\n"
    for number in range(20):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + b"0" * 100 * number)
            # Close at once, without the usual handshake.
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    assert_served(server, runners)


# --- what is closed ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "repository/index", "repository/models/sparse/load", "repository/models/sparse/unload",
        "trace/setting", "logging", "systemsharedmemory/region/a/register",
    ],
)  # fmt: skip
def test_what_controls_the_server_is_closed_over_http(server, path):
    status, text = post(server, path, b"{}")
    assert status == 403
    assert "restricted" in text


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.get_model_repository_index(),
        lambda client: client.unload_model("sparse"),
        lambda client: client.register_system_shared_memory("a", "/a", 8),
        lambda client: client.get_trace_settings(),
        lambda client: client.get_log_settings(),
    ],
)
def test_what_controls_the_server_is_closed_over_grpc(server, call):
    with connect(server, "grpc") as client, pytest.raises(InferenceServerException) as raised:
        call(client)
    assert "restricted" in str(raised.value)


def test_nothing_listens_beyond_this_machine(server):
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            host, port = address.split(":")
            if state == "0A" and int(port, 16) in server.ports:
                listening.add((host, int(port, 16)))
    assert {port for _, port in listening} == set(server.ports)
    here = "0100007F"  # 127.0.0.1, and the same as an IPv6 address
    assert {host for host, _ in listening} <= {here, f"0000000000000000FFFF0000{here}"}


def metrics(server: TritonServer) -> list[str]:
    url = f"http://{server.metrics_address}/metrics"
    return urllib.request.urlopen(url, timeout=30).read().decode().splitlines()


def test_the_page_of_metrics_counts_requests_and_refusals_of_each_model(server):
    page = "\n".join(metrics(server))
    for name in (
        "nv_inference_request_success", "model_refused_requests", "model_wait_duration_us",
    ):  # fmt: skip
        assert f'{name}{{model="sparse",version="1"}}' in page


# --- staying up ----------------------------------------------------------------------------


def wait_for_start(server: TritonServer, count: int) -> None:
    deadline = time.monotonic() + server_module.START_SECONDS
    while server.starts < count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.starts >= count
    server.wait_until_ready()


def test_a_killed_server_is_back_and_no_answer_is_wrong(server, runners):
    own = images(8, seed=5)
    wanted = runners["sparse"](torch.from_numpy(own)).numpy()
    counts, stop = {"right": 0, "wrong": 0, "errors": 0}, threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            with tritonclient.grpc.InferenceServerClient(server.grpc_address) as client:
                try:
                    found = ask(client, "sparse", own).as_numpy("logits")
                    counts["right" if np.array_equal(found, wanted) else "wrong"] += 1
                except InferenceServerException:
                    counts["errors"] += 1

    thread = threading.Thread(target=keep_asking)
    thread.start()
    try:
        starts, before = server.starts, server.pid
        os.kill(before, signal.SIGKILL)
        wait_for_start(server, starts + 1)
        assert_served(server, runners)
    finally:
        stop.set()
        thread.join()
    assert server.pid != before
    assert counts["wrong"] == 0
    assert counts["errors"] > 0


def test_overload_is_answered_with_refusals_that_are_counted(triton, write, tmp_path):
    folder = write(tmp_path / "repository", longest_wait_ms=500)
    with TritonServer(folder, free_ports(), triton=triton) as server:
        endpoint = load.Endpoint("sparse", "grpc", server.grpc_address)
        requests = [{"images": images(64, seed=seed)} for seed in range(4)]
        expected = load.ask_idle_server(endpoint, requests)
        arrivals = load.OpenLoop(rate=1000)
        outcome = load.load_server(endpoint, requests, arrivals, 3, expected, timeout=60)
        assert outcome.answered > 0
        assert set(outcome.errors) <= {"unavailable", load.NOT_SENT}, outcome.messages
        counted = 'model_refused_requests{model="sparse",version="1"} '
        (line,) = [line for line in metrics(server) if line.startswith(counted)]
        assert float(line.removeprefix(counted)) == outcome.errors.get("unavailable", 0)
        assert server.starts == 1


def test_a_swapped_file_changes_nothing_on_the_running_server(server, runners):
    path = server.repository / "sparse" / "1" / "model.onnx"
    before = path.read_bytes()
    try:
        path.write_bytes(b"garbage")
        assert_served(server, runners)
    finally:
        path.write_bytes(before)


def test_a_port_in_use_is_one_sentence_and_the_other_server_serves_on(server, triton, runners):
    with pytest.raises(ServingError, match=f"Port {server.ports[0]} cannot be used"):
        TritonServer(server.repository, server.ports, triton=triton).start()
    assert_served(server, runners)


def shared_memory() -> set[Path]:
    return set(Path("/dev/shm").glob("s2to4_*"))


def test_a_stopped_server_leaves_nothing_behind(triton, write, tmp_path):
    log, before = tmp_path / "server.log", shared_memory()
    folder = write(tmp_path / "repository", longest_wait_ms=0)  # whatever waits is refused
    with (
        pytest.raises(ServingError, match=r"fails on its self-test: .*the server is busy"),
        TritonServer(folder, free_ports(), log, triton) as server,
    ):
        pytest.fail(f"{server.pid} should not be ready")
    assert "Signal (15) received" in log.read_text()
    assert shared_memory() <= before


# --- without a server ----------------------------------------------------------------------


@pytest.fixture
def unstarted(write, tmp_path):
    return TritonServer(write(tmp_path / "repository"), free_ports())


def test_a_folder_that_is_no_repository_is_refused(tmp_path):
    with pytest.raises(InputError, match="no model repository"):
        TritonServer(tmp_path)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (torch.zeros(0), r"shape \(0,\) instead of"),
        (torch.full((2, 10), float("nan")), "differ by nan"),
        (torch.ones(2, 10), "differ by"),
    ],
)
def test_a_wrong_answer_to_the_self_test_is_told(unstarted, monkeypatch, answer, complaint):
    class Client:
        def __init__(self, _: str) -> None: ...

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None: ...

        def infer(self, *_, **__):
            return type("Answer", (), {"as_numpy": staticmethod(lambda _: answer.numpy())})

    monkeypatch.setattr(tritonclient.grpc, "InferenceServerClient", Client)
    path = unstarted.repository / "dense" / SELF_TEST
    stored = load_file(path)
    save_file(stored | {"logits": stored["logits"] + 5}, path)
    with pytest.raises(ServingError, match=complaint):
        unstarted._self_test()


def test_three_free_ports_are_three_ports():
    assert len(set(free_ports())) == 3
