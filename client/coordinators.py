"""Which of several coordinators is asked, and which next when that one is lost?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

StubT = TypeVar("StubT")


@dataclass(frozen=True, slots=True)
class Coordinator(Generic[StubT]):
    address: str
    stub: StubT


class Coordinators(Generic[StubT]):
    """All calls go to one of them until it is lost, and then to the next in turn."""

    def __init__(self, addresses: str | Sequence[str], connect: Callable[[str], StubT]) -> None:
        """`addresses`: one after the other, or in one string with commas. Raises `ValueError` when there is none."""
        names = addresses.split(",") if isinstance(addresses, str) else addresses
        self._all = [Coordinator(name.strip(), connect(name.strip())) for name in names]
        if not self._all:
            raise ValueError("a client needs the address of a coordinator")
        self._chosen = 0

    def __len__(self) -> int:
        return len(self._all)

    @property
    def addresses(self) -> str:
        """All of them, with commas."""
        return ",".join(each.address for each in self._all)

    def choose(self) -> Coordinator[StubT]:
        """Whom to ask now."""
        return self._all[self._chosen]

    def lost(self, coordinator: Coordinator[StubT]) -> None:
        """It does not answer. Many calls may say so of the same one."""
        if coordinator is self._all[self._chosen]:
            self._chosen = (self._chosen + 1) % len(self._all)
