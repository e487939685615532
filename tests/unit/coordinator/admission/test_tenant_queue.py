"""Tenants of one class get the same tokens, whatever they ask for and whoever leaves meanwhile."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.coordinator.admission.tenant_queue import TenantQueue
from kvrelay.coordinator.admission.ticket import Ticket

QUANTUM = 500
TENANTS = "abc"

tickets = st.builds(
    Ticket, num_tokens=st.integers(1, 4000), tenant=st.sampled_from(TENANTS), priority=st.integers(-1, 1)
)
sizes = st.lists(st.integers(1, 4000), min_size=1, max_size=30)


def filled(*given: Ticket) -> TenantQueue:
    queue = TenantQueue(QUANTUM)
    for ticket in given:
        queue.add(ticket)
    return queue


@given(st.tuples(sizes, sizes, sizes))
def test_no_tenant_that_waits_gets_more_than_a_quantum_and_a_request_ahead(by_tenant: tuple[list[int], ...]) -> None:
    queue = filled(
        *(
            Ticket(num_tokens=num, tenant=tenant)
            for tenant, given in zip(TENANTS, by_tenant, strict=True)
            for num in given
        )
    )
    largest = max(num for given in by_tenant for num in given)
    got: Counter[str] = Counter()
    while len(queue.tenants()) == len(TENANTS):
        ahead = max(got[tenant] for tenant in TENANTS) - min(got[tenant] for tenant in TENANTS)
        assert ahead <= QUANTUM + largest
        ticket = queue.pop()
        got[ticket.tenant] += ticket.num_tokens


@given(st.lists(st.one_of(tickets, st.none(), st.integers(0, 100))))
def test_every_ticket_leaves_once_and_in_the_order_of_its_tenant(steps: list[Ticket | int | None]) -> None:
    """A ticket is added, None takes the next one, a number removes one that waits."""
    queue = TenantQueue(QUANTUM)
    waiting: list[Ticket] = []
    for step in steps:
        if isinstance(step, Ticket):
            queue.add(step)
            waiting.append(step)
        elif step is None and waiting:
            ticket = queue.pop()
            same = [other for other in waiting if other.tenant == ticket.tenant]
            assert ticket is min(same, key=lambda other: other.priority)
            waiting.remove(ticket)
        elif step is not None and waiting:
            ticket = waiting.pop(step % len(waiting))
            queue.remove(ticket)
        assert set(queue) == set(waiting)
        assert queue.num_requests == len(waiting)
        assert queue.num_tokens == sum(ticket.num_tokens for ticket in waiting)
        assert queue.tenants() == Counter(ticket.tenant for ticket in waiting)
        for tenant in TENANTS:
            own = [ticket.num_tokens for ticket in waiting if ticket.tenant == tenant]
            assert queue.held(tenant) == (len(own), sum(own))


@given(st.lists(tickets, max_size=40), tickets)
def test_a_request_leaves_about_when_it_was_told(others: list[Ticket], own: Ticket) -> None:
    own.priority = 1
    queue = filled(*others)
    predicted = queue.tokens_before(own.tenant, own.num_tokens)
    queue.add(own)
    left = 0
    while own in set(queue):
        left += queue.pop().num_tokens
    largest = max(ticket.num_tokens for ticket in [own, *others])
    assert abs(left - predicted) <= (QUANTUM + 2 * largest) * len(TENANTS)


def test_a_request_of_many_quanta_waits_for_its_share_only() -> None:
    large = Ticket(num_tokens=1_000_000_000, tenant="a")
    small = [Ticket(num_tokens=100, tenant="b") for _ in range(3)]
    queue = filled(large, *small)
    assert [queue.pop() for _ in range(4)] == [*small, large]


def test_a_tenant_that_went_away_brings_no_credit_back() -> None:
    first = Ticket(num_tokens=1, tenant="a")
    queue = filled(first, Ticket(num_tokens=400, tenant="b"))
    assert queue.pop() is first
    back = Ticket(num_tokens=450, tenant="a")
    queue.add(back)
    assert queue.pop().tenant == "b"
    assert queue.pop() is back


def test_a_ticket_that_does_not_wait_cannot_be_removed() -> None:
    ticket = Ticket(num_tokens=1)
    queue = filled(ticket)
    queue.remove(ticket)
    with pytest.raises(KeyError):
        queue.remove(ticket)
