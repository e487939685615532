"""What waits leaves once, in a fair order, and what cannot be served in time is told so at once."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.coordinator.admission.config import AdmissionConfig
from kvrelay.coordinator.admission.queue import AdmissionQueue, Offer
from kvrelay.coordinator.admission.request_class import BATCH, CLASSES, INTERACTIVE, STANDARD
from kvrelay.coordinator.admission.ticket import Ticket
from kvrelay.errors import OverloadedError


@dataclass
class FixedCapacity:
    room: bool = False
    rate: float = 1000.0

    def has_room(self) -> bool:
        return self.room

    def has_workers(self) -> bool:
        return True

    def tokens_per_s(self) -> float:
        return self.rate


class Waiting:
    """A queue without room, and everything that was offered to it."""

    def __init__(self, config: AdmissionConfig | None = None) -> None:
        self.capacity = FixedCapacity()
        self.queue = AdmissionQueue(config or AdmissionConfig(), self.capacity)

    def add(self, *tickets: Ticket, now_s: float = 0.0) -> None:
        for ticket in tickets:
            assert self.queue.offer(ticket, now_s) is Offer.QUEUED

    def take(self, now_s: float = 0.0) -> Ticket | None:
        """The next one, as if there were room for just one."""
        self.capacity.room = True
        ticket = self.queue.next_ready(now_s)
        self.capacity.room = False
        return ticket


def test_with_room_and_nobody_waiting_a_request_passes_through() -> None:
    waiting = Waiting()
    waiting.capacity.room = True
    ticket = Ticket(num_tokens=10**9)
    assert waiting.queue.offer(ticket, 0.0) is Offer.ADMITTED
    assert waiting.queue.num_requests == 0
    assert ticket.queued_at_s is None


def test_nobody_overtakes_those_who_wait() -> None:
    waiting = Waiting()
    first, second = Ticket(num_tokens=1), Ticket(num_tokens=1)
    waiting.add(first)
    waiting.capacity.room = True
    assert waiting.queue.offer(second, 1.0) is Offer.QUEUED
    assert [waiting.queue.next_ready(2.0) for _ in range(3)] == [first, second, None]


def test_without_room_nobody_leaves() -> None:
    waiting = Waiting()
    waiting.add(Ticket(num_tokens=1))
    assert waiting.queue.next_ready(1.0) is None


steps = st.one_of(
    st.builds(
        Ticket,
        num_tokens=st.integers(1, 4000),
        tenant=st.sampled_from("ab"),
        request_class=st.sampled_from(list(CLASSES.values())),
        priority=st.integers(-1, 1),
        ttft_s=st.sampled_from([None, 0.3, 5.0, 60.0]),
    ),
    st.tuples(st.sampled_from(["take", "cancel", "overdue"]), st.integers(0, 100)),
    st.floats(0.0, 2.0),
)


@given(st.lists(steps, max_size=120))
def test_nothing_is_lost_or_doubled_and_the_bounds_hold(given: list[Ticket | tuple[str, int] | float]) -> None:
    config = AdmissionConfig(max_requests=8, max_tokens=10_000, quantum_tokens=512)
    waiting, inside, now_s = Waiting(config), set[Ticket](), 0.0
    for step in given:
        if isinstance(step, float):
            now_s += step
        elif isinstance(step, Ticket):
            with contextlib.suppress(OverloadedError):
                waiting.add(step, now_s=now_s)
                inside.add(step)
        elif step[0] == "take":
            ticket = waiting.take(now_s)
            assert (ticket is None) == (not inside)
            inside.discard(ticket)
        elif step[0] == "cancel" and inside:
            ticket = sorted(inside, key=id)[step[1] % len(inside)]
            waiting.queue.remove(ticket, now_s)
            inside.remove(ticket)
        elif step[0] == "overdue":
            for ticket in waiting.queue.take_overdue(now_s):
                inside.remove(ticket)
        queue = waiting.queue
        assert queue.num_requests == len(inside) <= config.max_requests
        assert queue.num_tokens == sum(ticket.num_tokens for ticket in inside)
        assert queue.num_tokens <= config.max_tokens or len(inside) == 1
        assert queue.num_waiting() == Counter((ticket.request_class.name, ticket.tenant) for ticket in inside)
        assert queue.oldest_s(now_s) == max((now_s - (ticket.queued_at_s or 0.0) for ticket in inside), default=0.0)


def test_classes_that_wait_share_by_weight_and_none_starves() -> None:
    waiting = Waiting(AdmissionConfig(max_requests=10_000))
    for kind in CLASSES.values():
        waiting.add(*(Ticket(num_tokens=100, request_class=kind) for _ in range(500)))
    left = Counter(ticket.request_class.name for _ in range(210) if (ticket := waiting.take()))
    assert left["interactive"] == pytest.approx(160, abs=2)
    assert left["standard"] == pytest.approx(40, abs=2)
    assert left["batch"] == pytest.approx(10, abs=2)


@given(st.lists(st.integers(1, 10_000), min_size=20, max_size=60))
def test_a_class_that_was_idle_is_served_at_once_and_saves_up_nothing(sizes: list[int]) -> None:
    waiting = Waiting()
    waiting.add(*(Ticket(num_tokens=num, request_class=BATCH) for num in sizes))
    for _ in range(10):
        waiting.take()
    urgent = [Ticket(num_tokens=100, request_class=INTERACTIVE) for _ in range(2)]
    waiting.add(*urgent)
    assert waiting.take() is urgent[0]


def test_a_batch_request_leaves_while_more_urgent_ones_keep_coming() -> None:
    waiting = Waiting()
    batch = Ticket(num_tokens=1000, request_class=BATCH)
    waiting.add(batch)
    for turn in range(1000):
        waiting.add(*(Ticket(num_tokens=100, request_class=kind) for kind in (INTERACTIVE, STANDARD)))
        if waiting.take() is batch:
            break
        assert turn < 50


def test_number_and_tokens_are_bounded_with_an_honest_time_to_come_back() -> None:
    waiting = Waiting(AdmissionConfig(max_requests=4, max_tokens=10_000, max_tenant_share=1.0))
    waiting.add(*(Ticket(num_tokens=2000) for _ in range(4)))
    with pytest.raises(OverloadedError, match=r"4 requests wait, and at most 4 may; try again in 2\.000 s") as many:
        waiting.queue.offer(Ticket(num_tokens=1), 0.0)
    assert many.value.retry_after_s == pytest.approx(2.0)
    waiting.take()
    with pytest.raises(OverloadedError, match="6000 tokens wait, and with 5000 more they are over 10000") as large:
        waiting.queue.offer(Ticket(num_tokens=5000), 0.0)
    assert large.value.retry_after_s is not None


def test_a_request_that_is_larger_than_the_queue_may_wait_alone() -> None:
    waiting = Waiting(AdmissionConfig(max_tokens=1000))
    waiting.add(Ticket(num_tokens=5000))
    with pytest.raises(OverloadedError):
        waiting.queue.offer(Ticket(num_tokens=1), 0.0)


def test_one_tenant_cannot_fill_the_queue() -> None:
    waiting = Waiting(AdmissionConfig(max_requests=8, max_tokens=10_000, max_tenant_share=0.5))
    waiting.add(*(Ticket(num_tokens=100, tenant="a", request_class=kind) for kind in [STANDARD, BATCH] * 2))
    with pytest.raises(OverloadedError, match="4 requests of one tenant wait, and at most 4 may"):
        waiting.queue.offer(Ticket(num_tokens=100, tenant="a", request_class=INTERACTIVE), 0.0)
    waiting.add(Ticket(num_tokens=4900, tenant="b"))
    with pytest.raises(OverloadedError, match="tokens of one tenant wait"):
        waiting.queue.offer(Ticket(num_tokens=200, tenant="b"), 0.0)


def test_what_cannot_be_served_in_time_is_refused_with_the_time_when_it_could() -> None:
    waiting = Waiting()
    waiting.add(*(Ticket(num_tokens=1000) for _ in range(9)))
    with pytest.raises(OverloadedError, match=r"predicted after 10.250 s; ttft_s allows 4 s; try again") as refused:
        waiting.queue.offer(Ticket(num_tokens=1000, ttft_s=4.0), 0.0)
    assert refused.value.retry_after_s == pytest.approx(6.25)
    for turn in range(1, 7):  # It goes as was predicted.
        waiting.take(now_s=turn)
    waiting.add(Ticket(num_tokens=1000, ttft_s=4.5), now_s=6.25)


def test_another_tenant_need_not_wait_behind_a_long_queue() -> None:
    waiting = Waiting()
    waiting.add(*(Ticket(num_tokens=1000, tenant="a") for _ in range(100)))
    quick = Ticket(num_tokens=1000, tenant="b", ttft_s=3.0)
    assert waiting.queue.wait_s(quick, 0.0) == pytest.approx(2.0)
    waiting.add(quick)


def test_what_waited_too_long_is_found() -> None:
    waiting = Waiting()
    patient, late = Ticket(num_tokens=1), Ticket(num_tokens=1, ttft_s=1.0)
    waiting.add(patient, late)
    assert waiting.queue.take_overdue(1.0) == []
    assert waiting.queue.take_overdue(1.01) == [late]
    assert waiting.queue.num_waiting() == {("standard", ""): 1}


def test_without_any_rate_nothing_is_promised() -> None:
    waiting = Waiting(AdmissionConfig(max_requests=1))
    waiting.capacity.rate = 0.0
    waiting.add(Ticket(num_tokens=1000, ttft_s=1.0))
    with pytest.raises(OverloadedError, match="try again later") as refused:
        waiting.queue.offer(Ticket(num_tokens=1), 0.0)
    assert refused.value.retry_after_s is None
