"""Whose turn is it among the tenants of one class? Deficit round robin by tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from kvrelay.coordinator.admission.ticket import Ticket


class _Backlog:
    """What waits for one tenant: by priority, then in the order of arrival."""

    __slots__ = ("by_priority", "deficit_tokens", "num_requests", "num_tokens")

    def __init__(self) -> None:
        self.by_priority: dict[int, dict[Ticket, None]] = {}
        self.deficit_tokens = 0
        self.num_requests = 0
        self.num_tokens = 0

    def add(self, ticket: Ticket) -> None:
        self.by_priority.setdefault(ticket.priority, {})[ticket] = None
        self.num_requests += 1
        self.num_tokens += ticket.num_tokens

    def remove(self, ticket: Ticket) -> None:
        """Raises `KeyError` for one that does not wait."""
        same = self.by_priority[ticket.priority]
        del same[ticket]
        if not same:
            del self.by_priority[ticket.priority]
        self.num_requests -= 1
        self.num_tokens -= ticket.num_tokens

    def first(self) -> Ticket:
        return next(iter(self.by_priority[min(self.by_priority)]))


class TenantQueue:
    """Tickets of one class.

    Each tenant in turn may take a quantum of tokens, and keeps what it does not use as long as it has something
    waiting (M. Shreedhar, G. Varghese, "Efficient Fair Queuing Using Deficit Round-Robin", SIGCOMM 1995): of two
    tenants that wait all the time neither gets more than a quantum and its largest request ahead of the other.
    """

    def __init__(self, quantum_tokens: int) -> None:
        self._quantum = quantum_tokens
        self._tenants: OrderedDict[str, _Backlog] = OrderedDict()
        """The one whose turn it is first."""
        self._is_granted = False
        """Whether the first one has got its quantum for this turn."""
        self.num_requests = 0
        self.num_tokens = 0

    def __iter__(self) -> Iterator[Ticket]:
        for backlog in self._tenants.values():
            for same in backlog.by_priority.values():
                yield from same

    def add(self, ticket: Ticket) -> None:
        self._tenants.setdefault(ticket.tenant, _Backlog()).add(ticket)
        self.num_requests += 1
        self.num_tokens += ticket.num_tokens

    def remove(self, ticket: Ticket) -> None:
        """Raises `KeyError` for a ticket that does not wait here."""
        backlog = self._tenants[ticket.tenant]
        backlog.remove(ticket)
        self.num_requests -= 1
        self.num_tokens -= ticket.num_tokens
        if not backlog.num_requests:
            if next(iter(self._tenants)) == ticket.tenant:
                self._is_granted = False
            del self._tenants[ticket.tenant]

    def pop(self) -> Ticket:
        """The next one; there must be one."""
        while True:
            tenant, backlog = next(iter(self._tenants.items()))
            if not self._is_granted:
                backlog.deficit_tokens += self._quantum
                self._is_granted = True
            ticket = backlog.first()
            if ticket.num_tokens <= backlog.deficit_tokens:
                backlog.deficit_tokens -= ticket.num_tokens
                self.remove(ticket)
                return ticket
            self._tenants.move_to_end(tenant)
            self._is_granted = False
            self._skip_rounds()

    def held(self, tenant: str) -> tuple[int, int]:
        """Requests and tokens that wait for a tenant."""
        backlog = self._tenants.get(tenant)
        return (backlog.num_requests, backlog.num_tokens) if backlog else (0, 0)

    def tenants(self) -> dict[str, int]:
        """Requests that wait, by tenant."""
        return {tenant: backlog.num_requests for tenant, backlog in self._tenants.items()}

    def tokens_before(self, tenant: str, num_tokens: int) -> int:
        """About how many tokens leave before a request that comes now and has so many is out, its own included."""
        own = self.held(tenant)[1] + num_tokens
        others = (backlog.num_tokens for name, backlog in self._tenants.items() if name != tenant)
        return own + sum(min(tokens, own) for tokens in others)

    def _skip_rounds(self) -> None:
        """Grant at once what all get in rounds in which nobody can afford its first request."""
        missing = min(backlog.first().num_tokens - backlog.deficit_tokens for backlog in self._tenants.values())
        num_rounds = -(-missing // self._quantum) - 1
        if num_rounds > 0:
            for backlog in self._tenants.values():
                backlog.deficit_tokens += num_rounds * self._quantum
