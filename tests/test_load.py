"""The load of a server: what is sent when, and what is counted. No test waits: time is virtual."""

import asyncio
import itertools
import math

import numpy as np
import pytest

from helpers.errors import InputError
from helpers.serving import load
from helpers.serving.endpoint import Endpoint, ModelInput, RequestError
from helpers.serving.load import ClosedLoop, OpenLoop, generate, is_same, random_requests


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time stands still while it works and jumps ahead when it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.select, self._selector.select = self._selector.select, self._jump

    def time(self) -> float:
        return self.now

    def _jump(self, timeout):
        # asyncio passes 0 if work is left, else the time until the next timer is due.
        assert timeout is not None, "every task waits for something that never happens"
        self.now += timeout
        return self.select(0)


@pytest.fixture
def virtual(monkeypatch):
    """Let `load.run` and this fixture's value run coroutines in virtual time."""
    monkeypatch.setattr(load, "_precise_loop", VirtualLoop)
    return load.run


REQUESTS = [{"images": np.full((8, 2), number, np.float32)} for number in range(3)]
ANSWERS = [{"logits": np.full((8, 1), number, np.float32)} for number in range(3)]


class Server:
    """Answers one request at a time, each after some seconds; remembers when they came."""

    def __init__(self, seconds: float = 0.01) -> None:
        self.seconds, self.came, self.lock = seconds, [], asyncio.Lock()

    async def send(self, number: int):
        self.came.append((asyncio.get_running_loop().time(), number))
        async with self.lock:
            await asyncio.sleep(self.seconds)
        return ANSWERS[number]


def loaded(virtual, send, arrivals, seconds=1.0, expected=ANSWERS, **options):
    return virtual(generate(send, REQUESTS, arrivals, seconds, expected, **options))


def test_one_client_waits_for_each_answer(virtual):
    server = Server(1 / 64)
    found = loaded(virtual, server.send, ClosedLoop(1))
    assert found.answered == 64
    assert found.errors == {}
    assert [number for _, number in server.came[:5]] == [0, 1, 2, 0, 1]
    assert found.times == pytest.approx([1000 / 64] * 64)
    assert found.images_per_second == pytest.approx(64 * 8)


def test_more_clients_wait_longer_at_a_server_that_does_one_thing_at_a_time(virtual):
    found = loaded(virtual, Server(1 / 64).send, ClosedLoop(4))
    assert found.percentile(50) == pytest.approx(4000 / 64)
    assert found.images_per_second == pytest.approx(64 * 8, rel=0.06)


def test_poisson_arrivals_have_the_rate_and_the_spread():
    due = OpenLoop(200, seed=1).due_times(100)
    assert len(due) == pytest.approx(20_000, rel=0.03)
    assert (due[0] >= 0, due[-1] < 100) == (True, True)
    gaps = np.diff(due)
    assert gaps.min() >= 0
    # The standard deviation of an exponential distribution is its mean.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)
    counts = np.histogram(due, 1000, (0, 100))[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.15)


def test_the_arrivals_depend_on_the_seed_alone():
    assert np.array_equal(OpenLoop(50, seed=3).due_times(4), OpenLoop(50, seed=3).due_times(4))
    assert not np.array_equal(OpenLoop(50, seed=3).due_times(4), OpenLoop(50, seed=4).due_times(4))


def test_open_requests_are_sent_when_they_are_due(virtual):
    server = Server(0.5)
    arrivals = OpenLoop(40, seed=2)
    found = loaded(virtual, server.send, arrivals, timeout=100)
    assert [moment for moment, _ in server.came] == pytest.approx(arrivals.due_times(1.0))
    assert found.sent_late_p99 == pytest.approx(0, abs=1e-6)
    # One at a time, in the order of their arrival: the latency has all the waiting in it.
    done = 0.0
    for outcome in sorted(found.outcomes):
        done = max(done, outcome.due) + 0.5
        assert outcome.done == pytest.approx(done)
    assert found.percentile(100) == pytest.approx(1000 * (done - arrivals.due_times(1.0)[-1]))


def test_a_stall_counts_for_every_request_that_was_due_meanwhile(virtual):
    """Coordinated omission: a closed loop sees one slow answer where an open one sees many."""

    async def send(number: int):
        now = asyncio.get_running_loop().time()
        if 2 <= now < 4:
            await asyncio.sleep(4 - now)
        await asyncio.sleep(0.001)
        return ANSWERS[number]

    opened = loaded(virtual, send, OpenLoop(100), seconds=10)
    closed = loaded(virtual, send, ClosedLoop(1), seconds=10)
    assert opened.percentile(50) == pytest.approx(1, rel=0.01)
    assert opened.percentile(95) > 1000
    assert closed.percentile(99) == pytest.approx(1, rel=0.01)


def test_a_loader_that_is_late_counts_from_the_due_time(virtual):
    """Work that blocks the event loop delays what is due meanwhile, and that is not hidden."""

    async def send(number: int):
        asyncio.get_running_loop().now += 0.25  # 4 requests a second is all this loader can send
        return ANSWERS[number]

    found = loaded(virtual, send, OpenLoop(40))
    assert found.answered == len(found.outcomes)
    assert found.sent_late_p99 > 5000
    assert found.percentile(99) > 5000
    assert found.images_per_second == pytest.approx(4 * 8, rel=0.01)


def test_what_exceeds_the_number_in_flight_is_counted_and_not_sent(virtual):
    server = Server(0.1)
    found = loaded(virtual, server.send, OpenLoop(100, in_flight=3))
    assert len(found.outcomes) == len(OpenLoop(100).due_times(1.0))
    assert found.errors == {"not sent": len(found.outcomes) - len(server.came)}
    assert found.errors["not sent"] > found.answered > 0
    assert found.percentile(100) <= 300.001
    assert len(found.times) == found.answered


def test_errors_are_counted_by_kind_with_their_first_message(virtual):
    numbers = itertools.count()

    async def send(number: int):
        await asyncio.sleep(1 / 64)
        turn = next(numbers) % 4
        if turn == 1:
            raise RequestError("unavailable", f"refused {number}")
        if turn == 2:
            await asyncio.sleep(100)
        return ANSWERS[number] if turn == 3 else {"logits": ANSWERS[number]["logits"] + 1}

    found = loaded(virtual, send, ClosedLoop(1), seconds=20, timeout=2)
    assert set(found.errors) == {"unavailable", "timed out", "wrong answer"}
    assert found.messages == {"unavailable": "refused 1"}
    assert found.answered + sum(found.errors.values()) == len(found.outcomes)
    row = found.row()
    assert (row["loop"], row["clients"], row["rate"]) == ("closed", 1, None)
    assert row["errors"] == found.errors
    assert "1 client of 8 images" in repr(found)
    assert "timed out" in repr(found)


def test_a_client_pauses_after_an_error(virtual):
    async def send(number: int):
        raise RequestError("no connection", "nobody there")

    found = loaded(virtual, send, ClosedLoop(2))
    assert len(found.outcomes) == pytest.approx(2 / load.PAUSE, rel=0.02)
    assert math.isnan(found.percentile(50))
    assert found.images_per_second == 0


def test_an_error_of_the_programs_own_is_not_counted_but_raised(virtual):
    async def send(number: int):
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as raised:
        loaded(virtual, send, ClosedLoop(1))
    assert raised.group_contains(ZeroDivisionError)


def test_answers_are_not_checked_unless_they_are_given(virtual):
    async def send(number: int):
        await asyncio.sleep(0.1)
        return {}

    assert loaded(virtual, send, ClosedLoop(1), expected=None).errors == {}
    assert set(loaded(virtual, send, ClosedLoop(1)).errors) == {"wrong answer"}


@pytest.mark.parametrize(
    ("answer", "tolerance", "same"),
    [
        ([1.0, 2.0], 0.0, True),
        ([1.0, 2.002], 0.0, False),
        ([1.0, 2.002], 1e-2, True),
        ([1.0, 2.2], 1e-2, False),
        ([1.0, np.nan], 1e-2, False),
        ([1.0], 1e-2, False),
        ([], 1.0, False),
        ([[1.0, 2.0]], 1.0, False),
    ],
)
def test_an_answer_is_compared_number_by_number(answer, tolerance, same):
    expected = {"logits": np.array([1.0, 2.0], np.float32)}
    assert is_same({"logits": np.array(answer, np.float32)}, expected, tolerance) == same


def test_an_output_that_is_missing_or_other_labels_are_wrong():
    labels = {"label": np.array([b"cat"], object)}
    assert is_same(labels | {"more": np.zeros(1)}, labels)
    assert not is_same({}, labels)
    assert not is_same({"label": np.array([b"dog"], object)}, labels, tolerance=1.0)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: ClosedLoop(0), "0 clients"),
        (lambda: OpenLoop(0), "0 requests per second"),
        (lambda: OpenLoop(math.inf), "inf requests per second"),
        (lambda: OpenLoop(5, in_flight=0), "0 of them in flight"),
        (lambda: load.run(generate(None, [], ClosedLoop(1), 1.0)), "0 requests"),
        (lambda: load.run(generate(None, REQUESTS, ClosedLoop(1), 0.0)), "in 0 s"),
        (lambda: load.run(generate(None, REQUESTS, ClosedLoop(1), 1.0, [])), "0 answers"),
    ],
)
def test_no_load_is_an_error(make, problem):
    with pytest.raises(InputError, match=problem):
        make()


def test_random_requests_suit_the_inputs():
    inputs = [ModelInput("images", "FP16", (-1, 3, 4, 4)), ModelInput("ids", "INT64", (5, 7))]
    requests = random_requests(inputs, batch=5, count=3, seed=1)
    assert len(requests) == 3
    for request in requests:
        assert request["images"].shape == (5, 3, 4, 4)
        assert request["images"].dtype == np.float16
        assert set(np.unique(request["ids"])) == {0, 1}
    assert not np.array_equal(requests[0]["images"], requests[1]["images"])
    again = random_requests(inputs, batch=5, count=3, seed=1)
    assert np.array_equal(requests[2]["images"], again[2]["images"])


@pytest.mark.parametrize(
    ("declared", "problem"),
    [
        (ModelInput("jpeg", "BYTES", (-1, 1)), "jpeg, BYTES"),
        (ModelInput("images", "FP32", (-1, 3, -1, -1)), "only its first size may be open"),
        (ModelInput("images", "FP32", (4, 3)), "takes 4 images at a time, not 8"),
    ],
)
def test_an_input_that_random_numbers_do_not_suit_is_an_error(declared, problem):
    with pytest.raises(InputError, match=problem):
        random_requests([declared], batch=8)


def test_loads_are_compared_in_a_table(virtual, monkeypatch):
    asked = []

    def load_server(endpoint, requests, arrivals, seconds, expected, tolerance, timeout):
        asked.append(endpoint.model)
        return virtual(
            generate(Server().send, requests, arrivals, seconds, expected, tolerance, timeout)
        )

    monkeypatch.setattr(load, "load_server", load_server)
    endpoints = {name: Endpoint(name, "http") for name in ("dense", "sparse")}
    each = dict.fromkeys(endpoints, REQUESTS)
    table = load.compare_loads(
        endpoints, each, [ClosedLoop(2), OpenLoop(10)], 1.0, dict.fromkeys(endpoints, ANSWERS)
    )
    assert asked == ["dense", "sparse"] * 2
    assert table.model.tolist() == asked
    assert set(table.protocol) == {"http"}
    assert table.loop.tolist() == ["closed", "closed", "open", "open"]
    assert (table.answered > 0).all()
    assert table.errors.tolist() == [{}] * 4


def test_a_load_runs_where_an_event_loop_runs_already():
    """A notebook's cells run inside one."""

    async def cell() -> int:
        return load.run(asyncio.sleep(0, 42))

    assert asyncio.run(cell()) == 42
