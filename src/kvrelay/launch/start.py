"""Is it worth while to start a child again that ended before everything was ready once?"""

from __future__ import annotations

_UNREACHABLE_STATUS = 4
"""A child's exit code when etcd did not answer: worth another attempt."""
_MAX_EARLY_ENDS = 3
"""So often may children end meanwhile."""


class Start:
    """The time until all children were ready. No I/O."""

    def __init__(self) -> None:
        self.is_over = False
        self._num_early_ends = 0

    def is_hopeless(self, status: int) -> bool:
        """A child has ended: by itself for a reason that stays, or as one of too many. False after the start."""
        if self.is_over:
            return False
        self._num_early_ends += 1
        ended_itself = status < 128 and status != _UNREACHABLE_STATUS
        return ended_itself or self._num_early_ends > _MAX_EARLY_ENDS
