"""Where may the frames of one transfer be written, by any thread, and when is that over?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from kvrelay.kv_transfer.segment import Segment

Buffer = memoryview | bytes

_COLD_PIECE_BYTES = 512 << 10
"""Of a source that is in no cache, as another worker's memory: a larger copy, which glibc makes past the caches, was
measured to be slower by a fifth. What was just received is in the cache; there a large copy is faster by a third."""


LandedHandler = Callable[[Sequence[int], int, bool], None]
"""Indices of blocks, bit set of their layers that landed, and whether nothing is missing now."""


class LandingClosedError(RuntimeError):
    """The transfer is over: nothing lands any more."""


class OverlapError(ValueError):
    """The frame repeats some layers of a block and brings others: no honest sender does that."""


class Landing:
    """The reserved slots of one transfer, open to the threads that receive.

    Every layer of a block is written at most once: a repeated one changes nothing. After `close` has returned no byte
    is written, so the slots may be given to somebody else.
    """

    def __init__(self, segment: Segment, slots: Mapping[int, int], layer_bytes: int, on_landed: LandedHandler) -> None:
        """`slots`: by index of the block; `layer_bytes`: of one block in one layer.

        `on_landed` is called by the thread that wrote, and `close` waits for it too.
        """
        self._segment = segment
        self._on_landed = on_landed
        self._num_missing_bytes = len(slots) * segment.slot_bytes
        self._slots = slots
        self._layer_bytes = layer_bytes
        self._claimed: dict[int, int] = {}
        self._writers = 0
        self._open = True
        self._changed = threading.Condition(threading.Lock())

    def write(
        self,
        first_block: int,
        layers: tuple[int, int],
        runs: Sequence[Buffer],
        still_valid: Callable[[], bool] | None = None,
    ) -> list[int] | None:
        """Copy the blocks from `first_block`, each the layers `(first, number)`; `runs` hold them one after the other.

        Blocks that are not wanted, or that have these layers already, are skipped; returns the others. Returns None,
        with nothing landed, when `still_valid` says after the copy that the source has changed meanwhile. Raises
        `LandingClosedError`, `OverlapError`.
        """
        first_layer, num_layers = layers
        bits = ((1 << num_layers) - 1) << first_layer
        offset, size = first_layer * self._layer_bytes, num_layers * self._layer_bytes
        with self._changed:
            if not self._open:
                raise LandingClosedError
            claims = self._claim(first_block, sum(map(len, runs)) // size, bits)
            self._writers += 1
        valid = False
        try:
            for target, source in self._pairs(first_block, frozenset(claims), runs, offset, size):
                _copy(target, source, len(source) if still_valid is None else _COLD_PIECE_BYTES)
            valid = still_valid is None or still_valid()
            if valid and claims:
                self._on_landed(claims, bits, self._count(len(claims) * size))
        finally:
            with self._changed:
                if not valid:
                    for block in claims:
                        self._claimed[block] &= ~bits
                self._writers -= 1
                self._changed.notify_all()
        return claims if valid else None

    def _count(self, num_bytes: int) -> bool:
        """Whether nothing is missing after these."""
        with self._changed:
            self._num_missing_bytes -= num_bytes
            return not self._num_missing_bytes

    def _pairs(
        self, block: int, claims: Collection[int], runs: Sequence[Buffer], offset: int, size: int
    ) -> Iterator[tuple[memoryview, Buffer]]:
        """Target and source of every claimed block from `block`; neighbours in both memories are joined."""
        whole = size == self._segment.slot_bytes
        for run in runs:
            start, end = block, block + len(run) // size
            while block < end:
                count = 0
                while block + count < end and block + count in claims and (whole or not count):
                    if self._slots[block + count] != self._slots[block] + count:
                        break
                    count += 1
                if count:
                    source = (block - start) * size
                    target = self._segment.run_view(self._slots[block], offset, count * size)
                    yield target, run[source : source + count * size]
                block += max(1, count)

    def _claim(self, first_block: int, num_blocks: int, bits: int) -> list[int]:
        claims = []
        for block in range(first_block, first_block + num_blocks):
            if block not in self._slots:
                continue
            overlap = self._claimed.get(block, 0) & bits
            if overlap == bits:
                continue
            if overlap:
                raise OverlapError
            claims.append(block)
        for block in claims:
            self._claimed[block] = self._claimed.get(block, 0) | bits
        return claims

    def close(self) -> None:
        """Let nothing land any more; waits for what is being copied, at most some frames of it. Idempotent."""
        with self._changed:
            self._open = False
            while self._writers:
                self._changed.wait()


def _copy(target: memoryview, source: Buffer, piece_bytes: int) -> None:
    """Through numpy, which lets other threads run meanwhile."""
    to, data = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
    for start in range(0, len(data), piece_bytes):
        np.copyto(to[start : start + piece_bytes], data[start : start + piece_bytes])
