"""Whose requests can still come for the blocks that are received? Those of coordinators with a session here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Owners:
    """Counts the sessions of each coordinator. `on_gone` is called with its id when the last one has ended."""

    def __init__(self, on_gone: Callable[[str], object]) -> None:
        self._on_gone = on_gone
        self._num_sessions: Counter[str] = Counter()

    @contextmanager
    def session(self, owner: str) -> Iterator[None]:
        """Around a session: its requests may come for what is received meanwhile."""
        self._num_sessions[owner] += 1
        try:
            yield
        finally:
            self._num_sessions[owner] -= 1
            if not self._num_sessions[owner]:
                del self._num_sessions[owner]
                self._on_gone(owner)

    def is_gone(self, owner: str) -> bool:
        """Whether nobody comes any more. Blocks without an owner, "", are somebody's own who waits for them."""
        return owner != "" and owner not in self._num_sessions
