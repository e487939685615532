"""Which blocks are written to disk, and when? Those that leave memory next, before they do."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from functools import partial

from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.disk_access import DiskAccess
from kvrelay.kv_transfer.disk_index import DiskIndex
from kvrelay.kv_transfer.segment import Segment

MAX_WRITES = 32
"""In flight."""


class DiskWriter:
    """Sees to it that of the slots that the store hands out next, a quarter of all, none holds a block that would be
    lost.

    The store knows nothing of it: what is evicted before it was written is lost, as without a disk. Nobody pins a slot
    that is written. When the write is over its generation tells whether it held the same block all the time; if not,
    what was written is worth nothing.
    """

    def __init__(
        self, store: BlockStore, segment: Segment, index: DiskIndex, access: DiskAccess, counters: Counter[str]
    ) -> None:
        self._store = store
        self._segment = segment
        self._index = index
        self._access = access
        self._counters = counters
        self._num_ahead = max(1, min(segment.num_slots // 4, index.num_places))
        self._candidates: deque[tuple[int, bytes]] = deque()
        self._writing: set[bytes] = set()
        self._num_turned_over = 0
        self._look_again_after = 1
        self._will_look = False
        self._loop = asyncio.get_running_loop()
        store.on_turnover = self._turned_over

    @property
    def num_writing(self) -> int:
        """Blocks that are being written, or will be as soon as others are."""
        return len(self._writing) + len(self._candidates)

    def _turned_over(self, count: int) -> None:
        self._num_turned_over += count
        self._look_soon()

    def _look_soon(self) -> None:
        """Looking through a large store takes a millisecond: only after a quarter of what was seen has changed."""
        due = self._num_turned_over >= self._look_again_after and not self._candidates
        if due and not self._will_look and not self._access.is_off:
            self._will_look = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._will_look = False
        if self._access.is_off:
            return
        next_out = self._store.next_out(self._num_ahead)
        num_seen = min(self._num_ahead, self._store.usage().num_free + len(next_out))
        self._num_turned_over, self._look_again_after = 0, max(1, num_seen // 4)
        for slot, block_hash in next_out:
            if block_hash in self._index:
                self._index.touch(block_hash)  # So that the disk forgets in the order in which memory does.
            elif block_hash not in self._writing:
                self._candidates.append((slot, block_hash))
        self._write()

    def _write(self) -> None:
        while self._candidates and len(self._writing) < MAX_WRITES:
            slot, block_hash = self._candidates.popleft()
            if self._store.find(block_hash) != slot:  # Evicted meanwhile.
                continue
            place = self._index.take()
            if place is None:  # All are being read or written.
                self._candidates.clear()
                return
            self._writing.add(block_hash)
            generation = self._segment.generation(slot)
            self._access.write(slot, place, partial(self._written, slot, block_hash, place, generation))

    def _written(self, slot: int, block_hash: bytes, place: int, generation: int, checksum: int | None) -> None:
        self._writing.discard(block_hash)
        if checksum is None or self._access.is_off or self._segment.generation(slot) != generation:
            self._index.give_back(place)
        else:
            self._index.put(block_hash, place, checksum)
            self._counters["disk_blocks_written"] += 1
        if self._access.is_off:
            self._candidates.clear()
        self._write()
        self._look_soon()
