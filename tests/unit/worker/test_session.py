"""A session carries out what its coordinator asks, packs what is there into one message, and ends all it has begun."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvrelay.errors import InvalidRequestError, WorkerLostError, first_leaf
from kvrelay.heartbeat import HeartbeatConfig, Silence, SilentError
from kvrelay.v1 import worker_pb2
from kvrelay.worker.outbox import Outbox, OutboxFullError
from kvrelay.worker.session import Session
from kvrelay.worker.submission import Sink
from tests.support.eventually import eventually

Failed = worker_pb2.RequestFailed


class FakeRole:
    """Both roles: notes what it was asked, waits for ever unless told to `finish` or to fail."""

    def __init__(self) -> None:
        self.sinks: dict[str, Sink] = {}
        self.running: set[str] = set()
        self.forgotten: list[str] = []
        self.error: Exception | None = None
        self.finish = asyncio.Event()

    async def prefill(self, request: worker_pb2.Prefill, sink: Sink) -> None:
        await self._run(f"prefill-{request.request_id}", sink)

    async def decode(self, request: worker_pb2.Decode, sink: Sink) -> None:
        await self._run(f"decode-{request.request_id}", sink)

    async def _run(self, job: str, sink: Sink) -> None:
        self.sinks[job] = sink
        self.running.add(job)
        try:
            if self.error is not None:
                raise self.error
            await self.finish.wait()
        finally:
            self.running.remove(job)

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)


class Stream:
    """The coordinator's end of a session."""

    def __init__(self, role: FakeRole) -> None:
        self.role = role
        self.status = worker_pb2.WorkerStatus()
        self.num_asked = 0
        self.taken: list[worker_pb2.WorkerMessage] = []
        self.may_write = asyncio.Event()
        self.may_write.set()
        self._inbox: asyncio.Queue[worker_pb2.CoordinatorMessage | None] = asyncio.Queue()

    async def run(self, outbox: Outbox | None = None, **values: Any) -> None:
        def status() -> worker_pb2.WorkerStatus:
            self.num_asked += 1
            return worker_pb2.WorkerStatus.FromString(self.status.SerializeToString())

        await Session(self.role, self.role, status, outbox=outbox, **values).run(self._messages(), self._write)

    async def _messages(self) -> AsyncIterator[worker_pb2.CoordinatorMessage]:
        while (message := await self._inbox.get()) is not None:
            yield message

    async def _write(self, message: worker_pb2.WorkerMessage) -> None:
        await self.may_write.wait()
        self.taken.append(message)

    def prefill(self, request_id: str, **values: Any) -> None:
        request = worker_pb2.Prefill(request_id=request_id, **values)
        self._inbox.put_nowait(worker_pb2.CoordinatorMessage(prefill=request))

    def decode(self, request_id: str, **values: Any) -> None:
        request = worker_pb2.Decode(request_id=request_id, **values)
        self._inbox.put_nowait(worker_pb2.CoordinatorMessage(decode=request))

    def cancel(self, request_id: str) -> None:
        self._inbox.put_nowait(worker_pb2.CoordinatorMessage(cancel=worker_pb2.Cancel(request_id=request_id)))

    def beat(self, **values: int) -> None:
        beat = worker_pb2.Heartbeat(**values)
        self._inbox.put_nowait(worker_pb2.CoordinatorMessage(heartbeat=beat))

    def hang_up(self) -> None:
        self._inbox.put_nowait(None)

    async def started(self, *jobs: str) -> None:
        await eventually(lambda: set(jobs) <= self.role.running, f"{jobs} run")

    def of(self, kind: str) -> list[worker_pb2.WorkerMessage]:
        return [message for message in self.taken if message.WhichOneof("message") == kind]

    async def took(self, count: int, kind: str) -> None:
        await eventually(lambda: len(self.of(kind)) >= count, f"{count} messages of {kind}")

    def failures(self) -> list[tuple[str, int]]:
        return [(message.failed.request_id, message.failed.reason) for message in self.of("failed")]


@asynccontextmanager
async def open_stream(**values: Any) -> AsyncIterator[Stream]:
    """A running session; the stream ends with the block, and no job outlives it."""
    stream = Stream(FakeRole())
    session = asyncio.create_task(stream.run(**values))
    try:
        yield stream
        stream.hang_up()
        async with asyncio.timeout(10):
            await session
        assert not stream.role.running
    finally:
        session.cancel()
        await asyncio.wait([session])


def delta(request_id: str, *tokens: int) -> worker_pb2.TokenDelta:
    return worker_pb2.TokenDelta(request_id=request_id, token_ids=tokens)


async def test_all_tokens_of_one_step_travel_in_one_message() -> None:
    async with open_stream() as stream:
        stream.prefill("a")
        stream.decode("b")
        await stream.started("prefill-a", "decode-b")
        for step in range(3):
            stream.role.sinks["prefill-a"](delta("a", step))
            stream.role.sinks["decode-b"](delta("b", step))
            await stream.took(step + 1, "step")
        expected = [worker_pb2.StepOutputs(deltas=[delta("a", step), delta("b", step)]) for step in range(3)]
        assert [message.step for message in stream.of("step")] == expected


async def test_a_slow_coordinator_gets_larger_messages_not_more() -> None:
    async with open_stream() as stream:
        stream.decode("a")
        await stream.started("decode-a")
        await eventually(lambda: stream.of("status"))
        stream.may_write.clear()
        for token in range(50):
            stream.role.sinks["decode-a"](delta("a", token))
            await asyncio.sleep(0)
        stream.may_write.set()
        await eventually(lambda: sum(len(m.step.deltas) for m in stream.of("step")) == 50)
        assert len(stream.of("step")) == 2
        assert [d.token_ids[0] for m in stream.of("step") for d in m.step.deltas] == list(range(50))


async def test_an_answer_too_large_for_a_message_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvrelay.worker.session._MAX_DELTA_BYTES", 100)
    async with open_stream() as stream:
        stream.decode("a")
        stream.decode("b")
        await stream.started("decode-a", "decode-b")
        stream.role.sinks["decode-a"](delta("a", *range(200)))
        stream.role.sinks["decode-b"](delta("b", 1))
        await eventually(stream.failures)
        assert stream.failures() == [("a", Failed.REASON_INVALID)]
        assert [d.request_id for m in stream.of("step") for d in m.step.deltas] == ["b"]
        assert stream.role.running == {"decode-b"}


async def test_a_coordinator_that_does_not_read_loses_its_session() -> None:
    stream = Stream(FakeRole())
    stream.may_write.clear()
    session = asyncio.create_task(stream.run(Outbox(max_waiting_bytes=1000)))
    stream.decode("a")
    await stream.started("decode-a")
    for _ in range(20):
        stream.role.sinks["decode-a"](delta("a", *range(100)))
    await asyncio.wait([session], timeout=10)
    assert isinstance(first_leaf(session.exception() or AssertionError()), OutboxFullError)
    assert not stream.role.running


async def test_a_cancel_ends_both_halves_of_a_request() -> None:
    async with open_stream() as stream:
        for request_id in ("a", "b"):
            stream.prefill(request_id)
            stream.decode(request_id)
        await stream.started("prefill-a", "decode-a", "prefill-b", "decode-b")
        stream.cancel("a")
        await eventually(lambda: stream.role.running == {"prefill-b", "decode-b"})
        assert stream.role.forgotten == ["a"]
        assert stream.failures() == []


async def test_a_request_may_be_cancelled_before_it_comes_and_before_it_runs() -> None:
    async with open_stream() as stream:
        stream.cancel("a")
        stream.decode("b")
        stream.prefill("b")
        stream.cancel("b")
        await eventually(lambda: stream.role.forgotten == ["a", "b"])
        assert not stream.role.sinks, "it never ran"
        assert stream.failures() == []


async def test_an_id_that_is_running_is_refused() -> None:
    async with open_stream() as stream:
        stream.decode("a")
        stream.prefill("a")
        await stream.started("decode-a", "prefill-a")
        stream.decode("a")
        await eventually(stream.failures)
        assert stream.failures() == [("a", Failed.REASON_INVALID)]
        assert stream.role.running == {"decode-a", "prefill-a"}


async def test_an_id_may_be_used_again_when_it_is_over() -> None:
    async with open_stream() as stream:
        stream.role.finish.set()
        stream.decode("a")
        await eventually(lambda: "decode-a" in stream.role.sinks and not stream.role.running)
        stream.role.finish.clear()
        stream.decode("a")
        await stream.started("decode-a")
        assert stream.failures() == []


@pytest.mark.parametrize(
    ("error", "reason", "text"),
    [
        (InvalidRequestError("too long by 3"), Failed.REASON_INVALID, "too long by 3"),
        (WorkerLostError("the peer is gone"), Failed.REASON_UNAVAILABLE, "the peer is gone"),
        (ZeroDivisionError("secret detail"), Failed.REASON_INTERNAL, "request a failed; the worker's log says why"),
    ],
)
async def test_a_failure_is_told_with_its_kind(error: Exception, reason: int, text: str) -> None:
    async with open_stream() as stream:
        stream.role.error = error
        stream.decode("a")
        await eventually(stream.failures)
        assert stream.failures() == [("a", reason)]
        assert stream.of("failed")[0].failed.message == text


@pytest.mark.parametrize("kind", ["prefill", "decode"])
async def test_a_request_whose_deadline_passes_ends_by_itself_and_says_so(kind: str) -> None:
    async with open_stream() as stream:
        getattr(stream, kind)("late", timeout_ms=50)
        getattr(stream, kind)("other", timeout_ms=60_000)
        getattr(stream, kind)("endless")
        await stream.started(f"{kind}-late", f"{kind}-other", f"{kind}-endless")
        await eventually(stream.failures)
        assert stream.failures() == [("late", Failed.REASON_UNAVAILABLE)]
        assert stream.of("failed")[0].failed.message == "the deadline of request late passed after 0.05 s"
        assert stream.role.running == {f"{kind}-other", f"{kind}-endless"}


async def test_a_timeout_inside_of_a_request_is_not_its_deadline() -> None:
    async with open_stream() as stream:
        stream.role.error = TimeoutError("of something else")
        stream.decode("a", timeout_ms=60_000)
        await eventually(stream.failures)
        assert stream.failures() == [("a", Failed.REASON_INTERNAL)]


async def test_a_failure_does_not_overtake_the_tokens_before_it() -> None:
    async with open_stream() as stream:
        await eventually(lambda: stream.of("status"))
        stream.may_write.clear()
        stream.decode("a")
        await stream.started("decode-a")
        stream.role.sinks["decode-a"](delta("a", 1))
        stream.decode("a")
        await asyncio.sleep(0)
        stream.may_write.set()
        await eventually(stream.failures)
        assert [m.WhichOneof("message") for m in stream.taken] == ["status", "step", "failed"]


async def test_status_is_sent_when_it_changes() -> None:
    async with open_stream() as stream:
        await eventually(lambda: len(stream.of("status")) == 1)
        stream.status.num_running_requests = 5
        await eventually(lambda: len(stream.of("status")) == 2)
        assert stream.of("status")[1].status.num_running_requests == 5


async def test_a_heartbeat_is_sent_when_nothing_else_is() -> None:
    async with open_stream(heartbeat=HeartbeatConfig(interval_s=0.01)) as stream:
        await stream.took(3, "heartbeat")
        assert [message.WhichOneof("message") for message in stream.taken[:2]] == ["status", "heartbeat"]
        assert len(stream.of("status")) == 1


async def test_heartbeats_do_not_gather_while_the_coordinator_does_not_read() -> None:
    async with open_stream(heartbeat=HeartbeatConfig(interval_s=0.001)) as stream:
        await stream.took(1, "heartbeat")
        stream.may_write.clear()
        num_taken, num_asked = len(stream.taken), stream.num_asked
        await eventually(lambda: stream.num_asked > num_asked + 20)
        stream.may_write.set()
        await eventually(lambda: len(stream.taken) > num_taken)
        assert len(stream.taken) <= num_taken + 2


async def test_a_large_message_is_announced() -> None:
    async with open_stream() as stream:
        stream.decode("a")
        await stream.started("decode-a")
        large = worker_pb2.TokenDelta(request_id="a", token_ids=range(500_000))
        stream.role.sinks["decode-a"](large)
        stream.role.sinks["decode-a"](delta("a", 1))
        await stream.took(1, "step")
        (step,) = stream.of("step")
        announced = stream.taken[stream.taken.index(step) - 1]
        assert announced.heartbeat.next_message_bytes == large.ByteSize() + delta("a", 1).ByteSize()
        assert len(step.step.deltas) == 2


async def test_a_coordinator_that_says_nothing_loses_its_session() -> None:
    stream = Stream(FakeRole())
    session = asyncio.create_task(stream.run(silence=Silence(0.1, tick_s=0.02)))
    stream.decode("a")
    stream.prefill("a")
    await stream.started("decode-a", "prefill-a")
    await asyncio.wait([session], timeout=10)
    error = first_leaf(session.exception() or AssertionError())
    assert isinstance(error, SilentError)
    assert str(error) == "the coordinator said nothing for 0.1 s"
    assert not stream.role.running


async def test_any_message_of_the_coordinator_is_heard() -> None:
    class Noted(Silence):
        def heard(self, next_message_bytes: int = 0, busy_ms: int = 0) -> None:
            heard.append((next_message_bytes, busy_ms))

    heard: list[tuple[int, int]] = []
    async with open_stream(silence=Noted(60.0, tick_s=0.25)) as stream:
        stream.beat(next_message_bytes=1 << 20)
        stream.beat(busy_ms=3)
        stream.cancel("unknown")
        await eventually(lambda: heard == [(1 << 20, 0), (0, 3), (0, 0)])


@pytest.mark.parametrize("broken", [True, False])
async def test_the_end_of_the_stream_ends_its_requests(broken: bool) -> None:
    stream = Stream(FakeRole())
    session = asyncio.create_task(stream.run())
    for i in range(5):
        stream.prefill(f"p{i}")
        stream.decode(f"d{i}")
    await stream.started("prefill-p4", "decode-d4")
    stream.decode("not started yet")
    if broken:
        session.cancel()
    else:
        stream.hang_up()
    await asyncio.wait([session], timeout=10)
    assert session.done()
    assert not stream.role.running


async def test_a_stream_that_takes_no_more_ends_its_requests() -> None:
    stream = Stream(FakeRole())

    async def broken(message: worker_pb2.WorkerMessage) -> None:
        raise ConnectionError("gone")

    stream._write = broken  # type: ignore[method-assign]
    stream.decode("a")
    async with asyncio.timeout(10):
        with pytest.raises(ExceptionGroup):
            await stream.run()
    assert not stream.role.running
