"""A stream asks for acks before it waits, and now and then before; it leaves no order behind."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.kv_transfer import push_stream
from kvrelay.kv_transfer.push_stream import (
    _ASK,
    _LAST,
    _UNASKED_BYTES,
    _UNASKED_S,
    Outgoing,
    PushStreams,
    _Stream,
    ignore_sent,
)
from kvrelay.v1.kv_transfer_pb2 import Frame, FrameAcks, LocalRun

LAST = _LAST["Push"]
Queue = queue.SimpleQueue[Outgoing | None]


class Order:
    """Is sent as its name, with "?" behind it when it asks for acks."""

    def __init__(self, name: str, num_bytes: int = 1, then: Callable[[], object] = bool) -> None:
        """`then` is called while it is made."""
        self.num_bytes = num_bytes
        self.is_dropped = False
        self._name = name
        self._then = then

    def encode(self, *, ack_now: bool) -> bytes | None:
        self._then()
        return None if self.is_dropped else f"{self._name}{'?' * ack_now}".encode()


def dropped(name: str) -> Order:
    order = Order(name)
    order.is_dropped = True
    return order


class Clock:
    now_s = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(push_stream, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


@pytest.fixture
def orders() -> Queue:
    return queue.SimpleQueue()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds nothing to send does not wait."""
    monkeypatch.setattr(push_stream, "_POLL_S", 0.001)
    monkeypatch.setattr(push_stream, "_IDLE_S", 0.002)


def stream_of(orders: Queue, first: Order, method: str = "Push") -> _Stream:
    return _Stream(orders, first, ignore_sent, method)


def put(orders: Queue, *names: str) -> None:
    for name in names:
        orders.put(Order(name))


def taken(orders: Queue) -> Order:
    """As another stream takes it."""
    order = orders.get_nowait()
    assert isinstance(order, Order)
    return order


def test_what_asks_and_what_ends_a_stream_are_messages_of_the_protocol() -> None:
    assert Frame.FromString(_ASK) == Frame(ack_now=True, checksum=Frame.FromString(_ASK).checksum)
    assert Frame.FromString(LAST) == Frame(is_last=True, checksum=Frame.FromString(LAST).checksum)
    assert LocalRun.FromString(_LAST["Copy"]) == LocalRun(is_last=True)


def test_the_last_that_is_queued_asks(orders: Queue, clock: Clock) -> None:
    put(orders, "b", "c")
    assert list(stream_of(orders, Order("a")).frames()) == [b"a", b"b", b"c?", LAST]


def test_one_asks_when_enough_was_sent(orders: Queue, clock: Clock) -> None:
    half = _UNASKED_BYTES // 2
    for name in ("b", "c", "d", "e"):
        orders.put(Order(name, half))
    assert list(stream_of(orders, Order("a", half - 1)).frames()) == [b"a", b"b", b"c?", b"d", b"e?", LAST]


def test_one_asks_when_the_last_that_did_is_long_ago(orders: Queue, clock: Clock) -> None:
    put(orders, *"bcdef")
    frames = stream_of(orders, Order("a")).frames()
    assert next(frames) == b"a"
    clock.now_s += _UNASKED_S * 0.9
    assert next(frames) == b"b"
    clock.now_s += _UNASKED_S * 0.2
    assert [next(frames), next(frames)] == [b"c?", b"d"]
    clock.now_s += _UNASKED_S * 1.1
    assert next(frames) == b"e?"


def test_a_stream_asks_before_it_waits_when_another_took_what_was_queued_behind(orders: Queue, clock: Clock) -> None:
    put(orders, "b")
    frames = stream_of(orders, Order("a")).frames()
    assert next(frames) == b"a"
    taken(orders)
    assert list(frames) == [_ASK, LAST]


def test_what_was_asked_for_before_a_wait_does_not_count_after_it(orders: Queue, clock: Clock) -> None:
    put(orders, "b")
    frames = stream_of(orders, Order("a", _UNASKED_BYTES - 1)).frames()
    assert next(frames) == b"a"
    taken(orders)
    assert next(frames) == _ASK
    put(orders, "c", "d")
    assert [next(frames), next(frames)] == [b"c", b"d?"]


def test_a_stream_asks_although_the_frame_that_should_have_is_not_wanted_any_more(orders: Queue, clock: Clock) -> None:
    orders.put(dropped("b"))
    assert list(stream_of(orders, Order("a")).frames()) == [b"a", _ASK, LAST]


def test_a_frame_that_is_not_wanted_any_more_does_not_count_as_having_asked(orders: Queue, clock: Clock) -> None:
    large = dropped("b")
    large.num_bytes = _UNASKED_BYTES
    for order in (large, Order("c", _UNASKED_BYTES // 2), Order("d")):
        orders.put(order)
    assert list(stream_of(orders, Order("a", _UNASKED_BYTES // 2)).frames()) == [b"a", b"c?", b"d?", LAST]


def test_runs_are_acknowledged_at_once_and_ask_for_nothing(orders: Queue, clock: Clock) -> None:
    put(orders, "b")
    frames = stream_of(orders, Order("a"), "Copy").frames()
    assert next(frames) == b"a"
    taken(orders)
    assert list(frames) == [_LAST["Copy"]]


@given(st.lists(st.tuples(st.integers(1, _UNASKED_BYTES), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12))
def test_nothing_that_was_sent_is_left_unasked(plan: list[tuple[int, bool, int]]) -> None:
    """Whatever is dropped meanwhile, and however much other streams take."""
    orders: Queue = queue.SimpleQueue()

    def stealing(number: int) -> Callable[[], None]:
        def steal() -> None:
            for _ in range(min(number, orders.qsize())):
                orders.get_nowait()

        return steal

    made = {}
    for i, (num_bytes, is_dropped, num_stolen) in enumerate(plan):
        made[f"{i}"] = order = Order(f"{i}", num_bytes, stealing(num_stolen))
        order.is_dropped = is_dropped
        orders.put(order)
    frames = list(stream_of(orders, taken(orders)).frames())
    assert frames.pop() == LAST
    unasked = 0
    for frame in frames:
        assert unasked < _UNASKED_BYTES
        asks = frame == _ASK or frame.endswith(b"?")
        unasked = 0 if asks else unasked + made[frame.decode()].num_bytes
    assert not unasked


def test_an_order_that_comes_while_a_stream_waits_is_sent(orders: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_stream, "_IDLE_S", 60.0)
    frames = stream_of(orders, Order("a")).frames()
    assert next(frames) == b"a?"
    put(orders, "b")
    assert next(frames) == b"b?"


def test_a_stream_that_waited_long_enough_ends_and_says_so(orders: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    class Watched:
        def get_nowait(self) -> Outgoing | None:
            return orders.get_nowait()

        def get(self, timeout: float) -> Outgoing | None:
            waits.append(timeout)
            raise queue.Empty

        def empty(self) -> bool:
            return orders.empty()

    monkeypatch.setattr(push_stream, "_POLL_S", 0.5)
    monkeypatch.setattr(push_stream, "_IDLE_S", 10.0)
    stream = _Stream(Watched(), Order("a"), ignore_sent, "Push")  # type: ignore[arg-type]
    assert list(stream.frames()) == [b"a?", LAST]
    assert sum(waits) == 10.0


def test_a_stream_that_is_over_gives_its_order_back_to_one_that_lives(orders: Queue) -> None:
    dead = stream_of(orders, Order("a"))
    frames = dead.frames()
    put(orders, "b")
    next(frames)
    dead.over = True
    assert list(frames) == [LAST], "for nobody"
    assert list(stream_of(orders, taken(orders)).frames()) == [b"b?", LAST]


def test_a_stream_that_ends_while_it_waits_gives_back_what_it_gets_then(orders: Queue) -> None:
    class EndsStream:
        """A queue whose stream is over by the time that an order comes."""

        def get_nowait(self) -> Outgoing | None:
            raise queue.Empty

        def get(self, timeout: float) -> Outgoing | None:
            stream.over = True
            return Order("b")

        def put(self, order: Outgoing | None) -> None:
            orders.put(order)

        def empty(self) -> bool:
            return True

    stream = _Stream(EndsStream(), Order("a"), ignore_sent, "Push")  # type: ignore[arg-type]
    assert list(stream.frames()) == [b"a?", LAST]
    assert list(stream_of(orders, taken(orders)).frames()) == [b"b?", LAST]


def test_the_order_to_stop_is_left_for_the_thread(orders: Queue) -> None:
    orders.put(None)
    assert list(stream_of(orders, Order("a")).frames()) == [b"a", LAST]
    assert orders.get_nowait() is None


def test_only_messages_that_carry_blocks_are_measured(orders: Queue, clock: Clock) -> None:
    sent: list[tuple[int, float]] = []
    orders.put(dropped("b"))
    frames: Iterator[bytes] = _Stream(orders, Order("abc"), lambda *values: sent.append(values), "Push").frames()
    next(frames)
    clock.now_s += 0.25
    list(frames)
    assert sent == [(len("abc"), 0.25)]


class Call:
    """Goes on until it is cancelled."""

    def __init__(self) -> None:
        self.is_cancelled = threading.Event()

    def cancel(self) -> None:
        self.is_cancelled.set()

    def __iter__(self) -> Iterator[FrameAcks]:
        assert self.is_cancelled.wait(20)
        return iter(())


async def test_a_call_that_begins_while_the_streams_close_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    call, begins, go_on = Call(), threading.Event(), threading.Event()

    def push(_frames: Iterator[bytes]) -> Call:
        begins.set()
        go_on.wait()
        return call

    channel = SimpleNamespace(stream_stream=lambda *_, **__: push)
    monkeypatch.setattr(grpc, "insecure_channel", lambda *_, **__: contextlib.nullcontext(channel))
    streams = PushStreams("nobody:1", "Push", 1, lambda _: None)
    streams.put(Order("a"))
    await asyncio.to_thread(begins.wait)
    closing = asyncio.create_task(streams.close())
    await asyncio.sleep(0)
    go_on.set()
    await closing
    assert call.is_cancelled.is_set()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-Push-nobody")]
