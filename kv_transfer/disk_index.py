"""Which place on disk holds which KV block, and which is written next?"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class DiskBlock:
    """One block on disk."""

    block_hash: bytes
    place: int
    checksum: int
    num_readers: int = 0


class DiskIndex:
    """Accounts of the places; the bytes are the file's.

    One owner, the worker's event loop: no locks. Invariants: a hash leads to one place and a place lies under one hash
    at most; a place that somebody reads or writes is not handed out. `take` and `open` hand out a duty each: a place
    that was taken ends by `put` or `give_back`, a block that was opened by `close`.
    """

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self._free = list(range(num_places - 1, -1, -1))
        self._blocks: dict[bytes, DiskBlock] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        """Those that nobody reads, least recently used first."""
        self.on_dropped: Callable[[bytes], object] = lambda _: None
        """Called with the hash of a block that is not on disk any more."""

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._blocks

    @property
    def hashes(self) -> Collection[bytes]:
        """Of all blocks; live."""
        return self._blocks.keys()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_idle(self) -> int:
        """Blocks that nobody reads."""
        return len(self._idle)

    def take(self) -> int | None:
        """A place to write to, that of the least recently used block if none is free; None when all are in use."""
        if not self._free and self._idle:
            self.drop(next(iter(self._idle)))
        return self._free.pop() if self._free else None

    def put(self, block_hash: bytes, place: int, checksum: int) -> None:
        """The block is in a place that was taken, and nowhere else on disk."""
        assert block_hash not in self._blocks
        self._blocks[block_hash] = DiskBlock(block_hash, place, checksum)
        self._idle[block_hash] = None

    def give_back(self, place: int) -> None:
        """Nothing of worth was written to a place that was taken."""
        self._free.append(place)

    def touch(self, block_hash: bytes) -> None:
        """Of those that nobody reads, it is the most recently used one."""
        if block_hash in self._idle:
            self._idle.move_to_end(block_hash)

    def open(self, block_hash: bytes) -> DiskBlock:
        """For reading: the place is not used for anything else until `close`. Raises `KeyError`."""
        block = self._blocks[block_hash]
        block.num_readers += 1
        self._idle.pop(block_hash, None)
        return block

    def close(self, block: DiskBlock) -> None:
        """It was read; the most recently used one now."""
        block.num_readers -= 1
        if block.num_readers:
            return
        if self._blocks.get(block.block_hash) is block:
            self._idle[block.block_hash] = None
        else:
            self._free.append(block.place)

    def drop(self, block_hash: bytes) -> None:
        """Forget a block; its place is free as soon as nobody reads it. Unknown ones are fine."""
        block = self._blocks.pop(block_hash, None)
        if block is None:
            return
        self._idle.pop(block_hash, None)
        if not block.num_readers:
            self._free.append(block.place)
        self.on_dropped(block_hash)

    def clear(self) -> None:
        """Forget all."""
        for block_hash in list(self._blocks):
            self.drop(block_hash)
