"""Requests wait before the dispatcher while workers have no room, and none of them is forgotten or started twice."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from kvrelay.coordinator.admission.config import AdmissionConfig
from kvrelay.coordinator.admitting import Admitting
from kvrelay.coordinator.flow_request import Completion, FlowRequest
from kvrelay.coordinator.request_terms import STANDARD_TERMS
from kvrelay.coordinator.request_trace import RequestTrace
from kvrelay.coordinator.timeline import RequestTimeline
from kvrelay.errors import KvrelayError, NoWorkersError, OverloadedError
from kvrelay.tracing import Tracing
from kvrelay.v1 import common_pb2


@dataclass
class Room:
    left: int = 0
    is_deserted: bool = False

    def has_workers(self) -> bool:
        return not self.is_deserted

    def has_room(self) -> bool:
        return self.left > 0

    def tokens_per_s(self) -> float:
        return 1000.0


@dataclass
class Dispatching:
    """A dispatcher for which each request takes a place."""

    room: Room
    error: KvrelayError | None = None
    started: list[FlowRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    def submit(self, request: FlowRequest, timeline: RequestTimeline, trace: RequestTrace) -> None:
        if self.error:
            raise self.error
        self.room.left -= 1
        self.started.append(request)

    def cancel(self, completion_ids: Sequence[str]) -> None:
        self.cancelled += completion_ids


class Setup:
    def __init__(self, *, room: int = 0, config: AdmissionConfig | None = None) -> None:
        self.room = Room(room)
        self.dispatcher = Dispatching(self.room)
        self.refused: list[tuple[list[str], KvrelayError]] = []
        self.now_s = 100.0
        self.admitting = Admitting(
            self.dispatcher,
            lambda ids, error: self.refused.append((list(ids), error)),
            config or AdmissionConfig(),
            self.room,
            clock=lambda: self.now_s,
        )

    def submit(self, name: str, num_completions: int = 1, **terms: float | str) -> FlowRequest:
        ids = [name] if num_completions == 1 else [f"{i}_{name}" for i in range(num_completions)]
        request = FlowRequest(
            request_id=name,
            external_id=name,
            prompt_token_ids=[1] * 100,
            completions=[Completion(request_id=one, sampling=common_pb2.SamplingParams(max_tokens=100)) for one in ids],
            max_model_len_tokens=1000,
            terms=replace(STANDARD_TERMS, **terms),  # type: ignore[arg-type]
        )
        self.admitting.submit(request, RequestTimeline(), RequestTrace(Tracing(), None))
        return request

    def release(self, room: int) -> list[str]:
        """Make room for so many; returns who was started."""
        num_before = len(self.dispatcher.started)
        self.room.left = room
        self.admitting.release()
        return [request.request_id for request in self.dispatcher.started[num_before:]]

    def assert_idle(self) -> None:
        assert self.admitting.queue.num_requests == 0
        assert not self.admitting._waiting
        assert not self.admitting._tickets


def test_with_room_a_request_starts_in_the_call_and_without_an_event_loop() -> None:
    setup = Setup(room=1)
    request = setup.submit("a")
    assert setup.dispatcher.started == [request]
    setup.assert_idle()


async def test_requests_start_in_turn_as_room_comes() -> None:
    setup = Setup()
    for name in "abc":
        setup.submit(name)
    assert setup.release(room=0) == []
    assert setup.release(room=2) == ["a", "b"]
    assert setup.release(room=9) == ["c"]
    setup.assert_idle()


async def test_room_is_found_without_being_told() -> None:
    setup = Setup()
    setup.submit("a")
    setup.room.left = 1
    async with asyncio.timeout(5):
        while not setup.dispatcher.started:
            await asyncio.sleep(0)
    setup.assert_idle()


async def test_what_the_dispatcher_refuses_later_is_told_to_who_waits() -> None:
    setup = Setup()
    setup.submit("a", num_completions=2)
    setup.dispatcher.error = NoWorkersError("nobody")
    assert setup.release(room=1) == []
    assert setup.refused == [(["0_a", "1_a"], setup.dispatcher.error)]
    setup.assert_idle()


async def test_who_waits_goes_on_waiting_for_a_while_when_all_workers_are_gone() -> None:
    setup = Setup()
    setup.submit("a")
    setup.room.is_deserted = True
    assert setup.release(room=1) == []
    setup.now_s += 59
    assert setup.release(room=1) == []
    setup.room.is_deserted = False
    assert setup.release(room=1) == ["a"]
    assert not setup.refused
    setup.assert_idle()


async def test_an_absence_of_workers_that_nobody_waited_out_does_not_count() -> None:
    setup = Setup()
    setup.submit("a")
    setup.room.is_deserted = True
    setup.release(room=1)
    setup.admitting.cancel(["a"])
    setup.now_s += 100
    setup.submit("b")
    assert setup.release(room=1) == []
    assert not setup.refused


async def test_nobody_waits_for_ever_for_workers() -> None:
    setup = Setup()
    setup.submit("a")
    setup.submit("b")
    setup.room.is_deserted = True
    setup.release(room=1)
    setup.now_s += 60
    setup.release(room=1)
    assert [ids for ids, _ in setup.refused] == [["a"], ["b"]]
    assert all(isinstance(error, NoWorkersError) for _, error in setup.refused)
    setup.assert_idle()


def test_what_it_refuses_at_once_is_raised() -> None:
    setup = Setup(room=1)
    setup.dispatcher.error = NoWorkersError("nobody")
    with pytest.raises(NoWorkersError):
        setup.submit("a")
    assert not setup.refused
    setup.assert_idle()


async def test_too_many_are_refused_and_nothing_of_them_is_left() -> None:
    setup = Setup(config=AdmissionConfig(max_requests=2, max_tenant_share=1.0))
    setup.submit("a")
    setup.submit("b")
    with pytest.raises(OverloadedError):
        setup.submit("c")
    assert setup.release(room=9) == ["a", "b"]
    setup.assert_idle()


async def test_who_leaves_while_waiting_is_never_started() -> None:
    setup = Setup()
    for name in "abc":
        setup.submit(name)
    setup.admitting.cancel(["b"])
    assert setup.release(room=9) == ["a", "c"]
    setup.admitting.cancel(["a", "unknown"])
    assert setup.dispatcher.cancelled[-2:] == ["a", "unknown"]
    setup.assert_idle()


async def test_of_several_completions_those_still_wanted_are_generated() -> None:
    setup = Setup()
    setup.submit("a", num_completions=3)
    setup.admitting.cancel(["0_a"])
    assert setup.release(room=1) == ["a"]
    assert setup.dispatcher.cancelled == ["0_a", "0_a"]
    setup.submit("b", num_completions=2)
    setup.admitting.cancel(["0_b", "1_b"])
    assert setup.release(room=1) == []
    setup.assert_idle()


async def test_the_scheduler_gets_what_is_left_of_the_target() -> None:
    setup = Setup()
    setup.submit("a", ttft_s=5.0)
    setup.now_s += 2.0
    setup.release(room=1)
    assert setup.dispatcher.started[0].terms.ttft_s == pytest.approx(3.0)


async def test_who_has_waited_too_long_is_refused() -> None:
    setup = Setup()
    setup.submit("a", ttft_s=5.0)
    setup.now_s += 5.1
    assert setup.release(room=9) == []
    ((ids, error),) = setup.refused
    assert ids == ["a"]
    assert isinstance(error, OverloadedError)
    assert "within the 5 s of ttft_s" in error.message
    setup.assert_idle()


async def test_tenants_take_turns() -> None:
    setup = Setup(config=AdmissionConfig(quantum_tokens=200))
    for i in range(6):
        setup.submit(f"a{i}", tenant="a")
    for i in range(2):
        setup.submit(f"b{i}", tenant="b")
    assert setup.release(room=4) == ["a0", "b0", "a1", "b1"]
    assert setup.release(room=9) == ["a2", "a3", "a4", "a5"]
