"""How fast do KV blocks go to other workers? Measured by the pushes to each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from kvrelay.v1 import worker_pb2

_KEPT = 0.8
"""Share that what was measured before keeps with each push, so that large pushes count for more."""
_MAX_LINKS = 256
MIN_BYTES = 1 << 16
"""Smaller pushes tell of the time that a message takes, not of the link."""


class LinkSpeeds:
    """Bytes per second by the address of the receiver, for the receivers of the latest pushes."""

    def __init__(self, max_links: int = _MAX_LINKS) -> None:
        self._max_links = max_links
        self._links: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def add(self, address: str, num_bytes: int, busy_s: float) -> None:
        """A push had bytes on the way for so long, all of which arrived."""
        if num_bytes < MIN_BYTES or busy_s <= 0:
            return
        known_bytes, known_s = self._links.pop(address, (0.0, 0.0))
        self._links[address] = (_KEPT * known_bytes + num_bytes, _KEPT * known_s + busy_s)
        if len(self._links) > self._max_links:
            self._links.popitem(last=False)

    def __iter__(self) -> Iterator[worker_pb2.LinkSpeed]:
        for address, (num_bytes, busy_s) in self._links.items():
            yield worker_pb2.LinkSpeed(address=address, bytes_per_s=num_bytes / busy_s)
