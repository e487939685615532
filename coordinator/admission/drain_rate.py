"""How fast does the queue empty?"""

from __future__ import annotations

import math

_MEMORY_S = 10.0
_GUESS_S = 1.0
"""For so long a guess counts as if it had been measured."""


class DrainRate:
    """Tokens per second that leave while some wait; the latest ten seconds of that count for most."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._since_s: float | None = None

    def begin(self, now_s: float) -> None:
        """From now on something waits."""
        self._since_s = now_s

    def end(self, now_s: float) -> None:
        """Nothing waits any more."""
        self._advance(now_s)
        self._since_s = None

    def left(self, num_tokens: int, now_s: float) -> None:
        """So many have left the queue because it was their turn."""
        self._advance(now_s)
        self._tokens += num_tokens

    def tokens_per_s(self, now_s: float, guess: float) -> float:
        """`guess` is what it would be without any measurement. 0 when that is 0 and nothing was measured."""
        self._advance(now_s)
        return (self._tokens + guess * _GUESS_S) / (self._seconds + _GUESS_S)

    def _advance(self, now_s: float) -> None:
        if self._since_s is None:
            return
        passed_s = max(0.0, now_s - self._since_s)
        kept = math.exp(-passed_s / _MEMORY_S)
        self._tokens *= kept
        self._seconds = self._seconds * kept + passed_s
        self._since_s = now_s
