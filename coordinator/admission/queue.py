"""Which request goes to the workers next, and which one is not even let in?"""

from __future__ import annotations

import enum

from kvrelay.coordinator.admission.capacity import Capacity
from kvrelay.coordinator.admission.config import AdmissionConfig
from kvrelay.coordinator.admission.drain_rate import DrainRate
from kvrelay.coordinator.admission.request_class import CLASSES
from kvrelay.coordinator.admission.tenant_queue import TenantQueue
from kvrelay.coordinator.admission.ticket import Ticket
from kvrelay.errors import OverloadedError


class Offer(enum.Enum):
    """What becomes of a request."""

    ADMITTED = enum.auto()
    QUEUED = enum.auto()


class _ClassQueue:
    """One class, and how much of its share it has had."""

    def __init__(self, weight: float, quantum_tokens: int) -> None:
        self.weight = weight
        self.tenants = TenantQueue(quantum_tokens)
        self.virtual = 0.0
        """Tokens that left, by the weight."""


class AdmissionQueue:
    """Bounded, in front of the scheduler. No I/O; the caller's clock, in seconds.

    Between classes the tokens that leave are shared by weight, between the tenants of a class evenly, and within a
    tenant priority and arrival decide. So nobody starves, and what comes into an idle class leaves at once. While
    nothing waits and there is room, requests pass through at the cost of asking for room.
    """

    def __init__(self, config: AdmissionConfig, capacity: Capacity) -> None:
        self._config = config
        self._capacity = capacity
        self._rate = DrainRate()
        self._virtual = 0.0
        """Of the class that something left last, before it did: classes that begin to wait begin there."""
        self._classes = {name: _ClassQueue(kind.weight, config.quantum_tokens) for name, kind in CLASSES.items()}
        self.num_requests = 0
        self.num_tokens = 0

    def offer(self, ticket: Ticket, now_s: float) -> Offer:
        """Let a request through, or let it wait until `next_ready` returns it.

        Raises `OverloadedError` when too much waits, or when its first token is predicted later than it allows, with
        the seconds after which that would not be so if nothing else came.
        """
        if self._passes():
            return Offer.ADMITTED
        self._check(ticket, now_s)
        ticket.queued_at_s = now_s
        of_class = self._classes[ticket.request_class.name]
        if not of_class.tenants.num_requests:
            of_class.virtual = max(of_class.virtual, self._virtual)
        if not self.num_requests:
            self._rate.begin(now_s)
        of_class.tenants.add(ticket)
        self.num_requests += 1
        self.num_tokens += ticket.num_tokens
        return Offer.QUEUED

    def check(self, ticket: Ticket, now_s: float) -> None:
        """Raises what `offer` would, and lets nobody in."""
        if not self._passes():
            self._check(ticket, now_s)

    def next_ready(self, now_s: float) -> Ticket | None:
        """The request whose turn it is, if one waits and there is room; it does not wait any more then."""
        if not self.num_requests or not self._capacity.has_room():
            return None
        of_class = min(
            (of_class for of_class in self._classes.values() if of_class.tenants.num_requests),
            key=lambda of_class: of_class.virtual,
        )
        ticket = of_class.tenants.pop()
        self._virtual = of_class.virtual
        of_class.virtual += ticket.num_tokens / of_class.weight
        self._rate.left(ticket.num_tokens, now_s)
        self._forget(ticket, now_s)
        return ticket

    def remove(self, ticket: Ticket, now_s: float) -> None:
        """Nobody waits for it any more. Raises `KeyError` for a ticket that does not wait."""
        self._classes[ticket.request_class.name].tenants.remove(ticket)
        self._forget(ticket, now_s)

    def take_overdue(self, now_s: float) -> list[Ticket]:
        """Those that have waited for longer than their first token may take; they do not wait any more."""
        overdue = [
            ticket
            for of_class in self._classes.values()
            for ticket in of_class.tenants
            if ticket.ttft_s is not None and ticket.queued_at_s is not None
            if now_s - ticket.queued_at_s > ticket.ttft_s
        ]
        for ticket in overdue:
            self.remove(ticket, now_s)
        return overdue

    def wait_s(self, ticket: Ticket, now_s: float) -> float:
        """How long a request that comes now is predicted to wait."""
        return self._tokens_before(ticket) / rate if (rate := self._tokens_per_s(now_s)) else 0.0

    def num_waiting(self) -> dict[tuple[str, str], int]:
        """Requests by class and tenant."""
        return {
            (name, tenant): num
            for name, of_class in self._classes.items()
            for tenant, num in of_class.tenants.tenants().items()
        }

    def oldest_s(self, now_s: float) -> float:
        """For how long the one has waited that has waited longest; 0 when none does."""
        tickets = (ticket for of_class in self._classes.values() for ticket in of_class.tenants)
        return max((now_s - ticket.queued_at_s for ticket in tickets if ticket.queued_at_s is not None), default=0.0)

    def _passes(self) -> bool:
        return not self.num_requests and self._capacity.has_room()

    def _check(self, ticket: Ticket, now_s: float) -> None:
        self._check_bounds(ticket, now_s)
        self._check_target(ticket, now_s)

    def _tokens_before(self, ticket: Ticket) -> float:
        """As if tokens were a fluid that all classes get their shares of."""
        own = self._classes[ticket.request_class.name]
        num_tokens = own.tenants.tokens_before(ticket.tenant, ticket.num_tokens)
        others = (other for other in self._classes.values() if other is not own)
        return num_tokens + sum(
            min(other.tenants.num_tokens, num_tokens * other.weight / own.weight) for other in others
        )

    def _check_bounds(self, ticket: Ticket, now_s: float) -> None:
        config, share = self._config, self._config.max_tenant_share
        held = [of_class.tenants.held(ticket.tenant) for of_class in self._classes.values()]
        own = sum(num for num, _ in held), sum(tokens for _, tokens in held)
        bounds = (
            ("", self.num_requests, self.num_tokens, config.max_requests, config.max_tokens),
            ("of one tenant ", *own, int(config.max_requests * share), int(config.max_tokens * share)),
        )
        for whose, num, tokens, max_num, max_tokens in bounds:
            if num >= max(1, max_num):
                excess, what = tokens / num, f"{num} requests {whose}wait, and at most {max_num} may"
            elif num and tokens + ticket.num_tokens > max_tokens:
                excess = tokens + ticket.num_tokens - max_tokens
                what = f"{tokens} tokens {whose}wait, and with {ticket.num_tokens} more they are over {max_tokens}"
            else:
                continue
            rate = self._tokens_per_s(now_s)
            raise _overloaded(what, excess / rate if rate else None)

    def _check_target(self, ticket: Ticket, now_s: float) -> None:
        if ticket.ttft_s is None:
            return
        wait_s = self.wait_s(ticket, now_s)
        ttft_s = wait_s + self._config.dispatch_ahead_s
        if ttft_s > ticket.ttft_s:
            what = f"the first token is predicted after {ttft_s:.3f} s; ttft_s allows {ticket.ttft_s:g} s"
            excess_s = ttft_s - ticket.ttft_s
            raise _overloaded(what, excess_s if excess_s <= wait_s else None)

    def _tokens_per_s(self, now_s: float) -> float:
        return self._rate.tokens_per_s(now_s, self._capacity.tokens_per_s())

    def _forget(self, ticket: Ticket, now_s: float) -> None:
        self.num_requests -= 1
        self.num_tokens -= ticket.num_tokens
        if not self.num_requests:
            self._rate.end(now_s)


def _overloaded(what: str, retry_after_s: float | None) -> OverloadedError:
    hint = "try again later" if retry_after_s is None else f"try again in {retry_after_s:.3f} s"
    return OverloadedError(f"{what}; {hint}", retry_after_s=retry_after_s)
