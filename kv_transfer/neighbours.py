"""Which senders run on this machine, so that their blocks can be copied without a network?"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import structlog

from kvrelay.kv_transfer.segment import Segment
from kvrelay.v1 import kv_transfer_pb2

_log = structlog.get_logger(__name__)

_IDLE_S = 60.0
_MAX_NEIGHBOURS = 64


class Neighbours:
    """Maps the segments of senders on the same machine, to read only.

    A name proves nothing: the sender tells a path and random bytes, and only who finds these bytes in the memory that
    the path leads to has found the sender's. A mapping keeps the memory, so it ends soon after its sender.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._segments: dict[bytes, Segment] = {}
        self._used_s: dict[bytes, float] = {}
        self._refused: set[bytes] = set()

    def meet(self, local: kv_transfer_pb2.LocalSegment, slot_bytes: int) -> bool:
        """Whether the sender's segment can be read here; maps it."""
        if local.proof in self._segments:
            self._used_s[local.proof] = self._clock()
            return True
        if not local.path or local.proof in self._refused or len(self._segments) == _MAX_NEIGHBOURS:
            return False
        try:
            segment = Segment.open_foreign(local.path, local.proof)
            segment.configure(slot_bytes)
        except (OSError, ValueError) as error:
            _log.info("a sender's memory is not on this machine", path=local.path, reason=str(error))
            if len(self._refused) == _MAX_NEIGHBOURS:
                self._refused.clear()
            self._refused.add(local.proof)
            return False
        self._segments[local.proof] = segment
        self._used_s[local.proof] = self._clock()
        return True

    def segment(self, proof: bytes) -> Segment | None:
        """A segment that was met. Any thread."""
        segment = self._segments.get(proof)
        if segment is not None:
            self._used_s[proof] = self._clock()
        return segment

    def expire(self) -> None:
        """Unmap what has not been used for a while, and what belonged to a process that is gone."""
        latest_s = self._clock() - _IDLE_S
        for proof, segment in list(self._segments.items()):
            if self._used_s[proof] < latest_s or not os.path.exists(segment.path):
                self._forget(proof)

    def close(self) -> None:
        """Unmap all; idempotent."""
        for proof in list(self._segments):
            self._forget(proof)

    def _forget(self, proof: bytes) -> None:
        """Unmapped as soon as no thread copies from it any more: with the last reference."""
        del self._used_s[proof], self._segments[proof]


def views_of(source: Segment, slots: Sequence[int], offset: int, size: int) -> list[memoryview]:
    """Of `size` bytes from `offset` of each slot; whole slots that follow each other are joined."""
    views = []
    first = 0
    while first < len(slots):
        end = first + 1
        while size == source.slot_bytes and end < len(slots) and slots[end] == slots[end - 1] + 1:
            end += 1
        views.append(source.run_view(slots[first], offset, (end - first) * size))
        first = end
    return views
