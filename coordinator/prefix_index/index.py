"""Which workers have how much of a prompt?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from kvrelay.coordinator.prefix_index.block_table import WORD_BITS, BlockTable, Keys

DEFAULT_SPECULATION_S = 10.0


class PrefixIndex:
    """From a block to the workers that have it: one bit each.

    Belongs to the event loop, does no I/O, and has no clock. Keys are what `prefix_keys` makes, or any 64-bit numbers
    but 0 (which no worker has) that are spread like hashes. What a worker has is told by `add` and `remove`; what it is
    about to have, because a request was just sent there, by `speculate`.
    """

    def __init__(self, speculation_s: float = DEFAULT_SPECULATION_S) -> None:
        """A block that was only speculated counts for `speculation_s`."""
        self._speculation_s = speculation_s
        self._table = BlockTable()
        self._bits: dict[str, int] = {}
        self._workers: dict[int, str] = {}
        self._dropped: set[int] = set()
        """Bits that may still be set somewhere, of workers that are gone."""
        self._sweeping: set[int] = set()
        self._sweep_from: int | None = None
        self._swept_bytes = 0
        self._speculated: dict[str, dict[int, float]] = {}
        """Blocks that only a dispatch has promised: worker -> key -> when, the oldest first."""
        self._live = np.zeros(1, np.uint64)

    def match(self, keys: Sequence[int] | Keys) -> dict[str, int]:
        """How many of the first blocks each worker has, without a hole; workers that lack the first are left out."""
        words = self._table.leading(np.asarray(keys, np.uint64))
        if not len(words):
            return {}
        words[0] &= self._live
        np.bitwise_and.accumulate(words, axis=0, out=words)
        ends = ((words[1:] != words[:-1]).any(axis=1).nonzero()[0] + 1).tolist()
        having, *fewer = map(_as_int, words[[0, *ends]].tolist())
        found: dict[str, int] = {}
        for depth, still_having in zip([*ends, len(words)], [*fewer, 0], strict=True):
            leaving = having & ~still_having
            while leaving:
                bit = leaving.bit_length() - 1
                found[self._workers[bit]] = depth
                leaving ^= 1 << bit
            having = still_having
        return found

    def add(self, worker_id: str, keys: Sequence[int] | Keys) -> None:
        """The worker has these blocks."""
        array = _as_keys(keys)
        if speculated := self._speculated.get(worker_id):
            for key in array.tolist():
                speculated.pop(key, None)
        self._table.add(array, self._bit_of(worker_id))

    def remove(self, worker_id: str, keys: Sequence[int] | Keys) -> None:
        """The worker has these blocks no more. What a dispatch has promised since stays until it expires."""
        if worker_id not in self._bits:
            return
        array = _as_keys(keys)
        if speculated := self._speculated.get(worker_id):
            array = np.array([key for key in array.tolist() if key not in speculated], np.uint64)
        self._table.clear(array, self._bits[worker_id])

    def replace(self, worker_id: str, by: str) -> None:
        """All that was added for `by` is from now on what the worker has, and nothing else but what was promised.

        `by` is unknown afterwards. So what a worker has can be built anew over time, and be exchanged in a moment.
        """
        bit = self._bit_of(by)
        speculated = self._speculated.pop(worker_id, {})
        self.drop(worker_id)
        del self._bits[by]
        self._bits[worker_id], self._workers[bit] = bit, worker_id
        keys = np.fromiter(speculated, np.uint64, len(speculated))
        missing = ~self._table.add(keys, bit)
        self._speculated[worker_id] = {key: speculated[key] for key in keys[missing].tolist()}

    def drop(self, worker_id: str) -> None:
        """The worker is gone with all that it had. Takes effect at once; `sweep` gives the space back."""
        bit = self._bits.pop(worker_id, None)
        if bit is None:
            return
        del self._workers[bit]
        self._speculated.pop(worker_id, None)
        self._dropped.add(bit)
        self._live = self._words_of(self._workers)

    def sweep(self) -> bool:
        """Give back a slice of the space of dropped workers; true when there is more. Call it from time to time."""
        if self._sweep_from is None:
            if not self._dropped:
                return False
            self._sweeping, self._sweep_from = set(self._dropped), 0
        elif self._swept_bytes != self._table.size_bytes:
            self._sweep_from = 0  # The table has grown meanwhile, and blocks are elsewhere.
        self._swept_bytes = self._table.size_bytes
        self._sweep_from = self._table.sweep(~self._words_of(self._sweeping), self._sweep_from)
        if self._sweep_from is None:
            self._dropped -= self._sweeping
        return bool(self._dropped)

    def speculate(self, worker_id: str, keys: Sequence[int] | Keys, now_s: float) -> None:
        """A request was sent that makes the worker have these blocks: they count at once.

        They are confirmed by `add`, and expire if that does not come. `now_s` must not fall from call to call.
        """
        array = _as_keys(keys)
        bit = self._bit_of(worker_id)
        speculated = self._speculated.setdefault(worker_id, {})
        for key, known in zip(array.tolist(), self._table.add(array, bit).tolist(), strict=True):
            if speculated.pop(key, None) is not None or not known:
                speculated[key] = now_s

    def retract(self, worker_id: str, keys: Sequence[int] | Keys, now_s: float) -> None:
        """The dispatch of that moment failed: what nobody has confirmed, or promised later, counts no more."""
        if speculated := self._speculated.get(worker_id):
            gone = [key for key in dict.fromkeys(_as_keys(keys).tolist()) if speculated.get(key) == now_s]
            self._forget(worker_id, gone)

    def expire(self, now_s: float) -> None:
        """Let go of what was promised and has not come."""
        for worker_id, speculated in self._speculated.items():
            late = []
            for key, promised_s in speculated.items():
                if promised_s + self._speculation_s > now_s:
                    break
                late.append(key)
            self._forget(worker_id, late)

    @property
    def num_blocks(self) -> int:
        """Different ones; those that only a dropped worker had count until they are swept."""
        return self._table.num_blocks

    @property
    def num_entries(self) -> int:
        """Pairs of a worker and a block that it has. Counting takes milliseconds."""
        return self._table.count(self._live)

    @property
    def num_speculated(self) -> int:
        """Of the entries, those that are promised only."""
        return sum(map(len, self._speculated.values()))

    @property
    def size_bytes(self) -> int:
        """What the blocks take of memory."""
        return self._table.size_bytes

    def _forget(self, worker_id: str, keys: Sequence[int]) -> None:
        if keys:
            for key in keys:
                del self._speculated[worker_id][key]
            self._table.clear(np.array(keys, np.uint64), self._bits[worker_id])

    def _bit_of(self, worker_id: str) -> int:
        bit = self._bits.get(worker_id)
        if bit is None:
            bit = self._bits[worker_id] = self._free_bit()
            self._workers[bit] = worker_id
            self._live = self._words_of(self._workers)
        return bit

    def _free_bit(self) -> int:
        """The lowest one; before the table is widened, one of a worker that has nothing."""
        num_bits = self._table.num_words * WORD_BITS
        taken = self._workers.keys() | self._dropped
        if len(taken) == num_bits:
            used = _as_int(self._table.used().tolist())
            idle = [bit for bit in self._workers if not used >> bit & 1]
            for bit in idle:
                worker_id = self._workers.pop(bit)
                del self._bits[worker_id]
                self._speculated.pop(worker_id, None)
            if not idle:
                self._table.widen()
            taken = self._workers.keys() | self._dropped
        return next(bit for bit in range(num_bits + 1) if bit not in taken)

    def _words_of(self, bits: Iterable[int]) -> npt.NDArray[np.uint64]:
        bitset = sum(1 << bit for bit in bits)
        return np.frombuffer(bitset.to_bytes(8 * self._table.num_words, "little"), "<u8")


def _as_keys(keys: Sequence[int] | Keys) -> Keys:
    array = np.asarray(keys, np.uint64)
    return array if array.all() else array[array != 0]


def _as_int(words: Sequence[int]) -> int:
    bitset = words[-1]
    for word in words[-2::-1]:
        bitset = bitset << WORD_BITS | word
    return bitset
