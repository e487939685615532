"""How do blocks of a prompt come back from disk, and who holds them meanwhile?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.disk_access import DiskAccess
from kvrelay.kv_transfer.disk_index import DiskBlock, DiskIndex

STALL_S = 5.0
"""A block that takes longer than this, beyond those before it, is computed instead."""


@dataclass(slots=True, eq=False)
class _Reading:
    """One block on its way into a reserved slot, for one request or several."""

    block: DiskBlock
    slot: int
    num_claims: int = 0
    """Requests that want it; each gets a pin when it is there."""
    future: Future[None] | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    landed: int | None = None
    """The block's slot once it is over, unless it failed."""


class DiskReader:
    """Reads blocks into reserved slots of the store; what is being read is read once, whoever wants it."""

    def __init__(self, store: BlockStore, index: DiskIndex, access: DiskAccess) -> None:
        self._store = store
        self._index = index
        self._access = access
        self._readings: dict[bytes, _Reading] = {}

    @asynccontextmanager
    async def restored(self, hashes: Sequence[bytes], or_last: bytes | None = None) -> AsyncIterator[frozenset[int]]:
        """Inside, as many of these blocks as possible from the first one on are in memory and will not leave it.

        Yields the slots of those that were read; nothing is held when there is nothing to read, and nothing after the
        end. The last block may also be stored under the name `or_last`. Blocks that cannot be read, and those that the
        store has no slots for, are left out with all that follow. After cancellation slots that a thread still
        writes to stay reserved until it is done; the block is a cache entry then.
        """
        steps = self._begin(hashes, or_last)
        try:
            slots = []
            for reading in (step for step in steps if isinstance(step, _Reading)):
                slot = await _arrival(reading)
                if slot is None:
                    break
                slots.append(slot)
            yield frozenset(slots)
        finally:
            self._let_go(steps)

    def _begin(self, hashes: Sequence[bytes], or_last: bytes | None) -> list[int | _Reading]:
        """Pin what is in memory, claim what is read, and reserve for the rest, up to the first that cannot be had."""
        found = self._find(hashes, or_last)
        in_memory = [slot for slot in found if isinstance(slot, int)]
        if len(in_memory) == len(found):
            return []
        self._store.pin(in_memory)  # First, or reserving could evict them.
        steps: list[int | _Reading] = []
        for step in found:
            if isinstance(step, bytes):
                reading = self._readings.get(step) or self._start(step)
                if reading is None:
                    break
                reading.num_claims += 1
                steps.append(reading)
            else:
                steps.append(step)
        self._store.unpin([slot for slot in found[len(steps) :] if isinstance(slot, int)])
        return steps

    def _find(self, hashes: Sequence[bytes], or_last: bytes | None) -> list[int | bytes]:
        """For each block from the first on: its slot in memory, or its name on disk."""
        found: list[int | bytes] = []
        for number, block_hash in enumerate(hashes, 1):
            step = self._locate(block_hash)
            if step is None and number == len(hashes) and or_last is not None:
                step = self._locate(or_last)
            if step is None:
                break
            found.append(step)
        return found

    def _locate(self, block_hash: bytes) -> int | bytes | None:
        slot = self._store.find(block_hash)
        if slot is not None:
            return slot
        return block_hash if block_hash in self._readings or block_hash in self._index else None

    def _start(self, block_hash: bytes) -> _Reading | None:
        reserved = self._store.reserve(1)
        if not reserved:
            return None
        reading = self._readings[block_hash] = _Reading(self._index.open(block_hash), reserved[0])
        reading.future = self._access.read(reading.block, reading.slot, partial(self._read, reading))
        return reading

    def _read(self, reading: _Reading, succeeded: bool) -> None:
        block_hash = reading.block.block_hash
        if self._readings.get(block_hash) is not reading:  # Cancelled before it began.
            return
        del self._readings[block_hash]
        if succeeded:
            slot = reading.landed = self._store.commit(reading.slot, block_hash)
            self._store.pin([slot] * reading.num_claims)
            self._store.unpin([slot])
        else:
            self._index.drop(block_hash)
            self._store.release([reading.slot])
        self._index.close(reading.block)
        reading.over.set()

    def _let_go(self, steps: Sequence[int | _Reading]) -> None:
        pinned = []
        for step in steps:
            if isinstance(step, int):
                pinned.append(step)
            elif step.over.is_set():
                pinned += [] if step.landed is None else [step.landed]
            else:
                step.num_claims -= 1
                if not step.num_claims:
                    self._cancel(step)
        self._store.unpin(pinned)

    def _cancel(self, reading: _Reading) -> None:
        if reading.future is not None and reading.future.cancel():
            del self._readings[reading.block.block_hash]
            self._store.release([reading.slot])
            self._index.close(reading.block)


async def _arrival(reading: _Reading) -> int | None:
    """The block's slot, pinned for this claim; None if it does not come."""
    try:
        async with asyncio.timeout(STALL_S):
            await reading.over.wait()
    except TimeoutError:
        return None
    return reading.landed
