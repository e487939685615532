"""How long do KV blocks travel between simulated workers?"""

from __future__ import annotations

from collections import defaultdict


class Links:
    """Each worker sends to one other at a time and receives from one other at a time, at full speed, in order."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._sends_until_s: dict[str, float] = defaultdict(float)
        self._receives_until_s: dict[str, float] = defaultdict(float)
        self.sent_bytes = 0

    def send(self, source: str, target: str, num_bytes: int, now_s: float) -> float:
        """Put something on the way; returns when it has arrived."""
        starts_s = max(now_s, self._sends_until_s[source], self._receives_until_s[target])
        ends_s = starts_s + num_bytes / self.bytes_per_s
        self._sends_until_s[source] = self._receives_until_s[target] = ends_s
        self.sent_bytes += num_bytes
        return ends_s
