"""Where is the bitset of a block, and how do a million of them fit into two arrays?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
"""Keys of blocks: what `prefix_keys` makes of their hashes. Never 0."""

_Positions = npt.NDArray[np.intp]

WORD_BITS = 64
_WAYS = 8
"""Slots of a bucket: 64 bytes of keys, so a look-up touches one cache line of them."""
_FIRST_BUCKETS = 1024
_SWEEP_SLOTS = 1 << 16
"""At a time; takes well under a millisecond."""


class BlockTable:
    """A hash table of bitsets that looks up all keys of a prompt at once.

    Keys are parts of cryptographic hashes, so their lowest bits name the bucket. A bucket has eight slots; the few keys
    that find theirs full (under 1 % at half load, the most that is allowed) lie in spare slots behind the buckets,
    where a dict finds them. A slot is free when its key is 0. Bit b of a block is bit b % 64 of `words[slot, b // 64]`;
    a block without bits is not kept.
    """

    _keys: Keys
    _words: npt.NDArray[np.uint64]

    def __init__(self) -> None:
        self.num_words = 1
        self.num_blocks = 0
        self._allocate(_FIRST_BUCKETS)

    @property
    def size_bytes(self) -> int:
        """Of the arrays."""
        return self._keys.nbytes + self._words.nbytes

    def leading(self, keys: Keys) -> npt.NDArray[np.uint64]:
        """The bitsets of the first keys, up to one that is not there; one row each, a copy."""
        positions, absent = self._probe(keys)
        for i in absent.nonzero()[0].tolist():
            position = self._overflow.get(int(keys[i]))
            if position is None:
                positions = positions[:i]
                break
            positions[i] = position
        return self._words.take(positions, axis=0)

    def add(self, keys: Keys, bit: int) -> npt.NDArray[np.bool_]:
        """Set a bit of every key; returns which had it."""
        self._make_room(len(keys))
        positions = self._find(keys)
        new = positions < 0
        word, mask = divmod_bit(bit)
        had: npt.NDArray[np.bool_] = (self._words[positions, word] & mask).astype(bool) & ~new
        if new.any():
            inserted = positions[new] = self._insert(keys[new])
            self.num_blocks += len(set(inserted.tolist()) - {-1})
            positions = positions[positions >= 0]
        self._words[positions, word] |= mask
        return had

    def clear(self, keys: Keys, bit: int) -> None:
        """Unset a bit of every key."""
        positions = self._find(keys)
        positions = positions[positions >= 0]
        word, mask = divmod_bit(bit)
        self._words[positions, word] &= ~mask
        self._free(positions[~self._words[positions].any(axis=1)])

    def sweep(self, keep: npt.NDArray[np.uint64], start: int) -> int | None:
        """Unset all bits that are not in the words `keep`, in some slots from `start` on; where to go on, None at the
        end."""
        slots = slice(start, start + _SWEEP_SLOTS)
        words = self._words[slots]
        words &= keep
        empty = ~words.any(axis=1) & (self._keys[slots] != 0)
        self._free(empty.nonzero()[0] + start)
        return slots.stop if slots.stop < len(self._keys) else None

    def widen(self) -> None:
        """Make room for 64 bits more."""
        self._words = np.concatenate([self._words, np.zeros((len(self._words), 1), np.uint64)], axis=1)
        self.num_words += 1

    def used(self) -> npt.NDArray[np.uint64]:
        """Words of all bits that some block has."""
        words: npt.NDArray[np.uint64] = np.bitwise_or.reduce(self._words, axis=0)
        return words

    def count(self, bits: npt.NDArray[np.uint64]) -> int:
        """How many of these bits are set in all blocks; takes milliseconds."""
        return int(np.bitwise_count(self._words & bits).sum())

    def _allocate(self, num_buckets: int) -> None:
        self._num_slots = num_buckets * _WAYS
        num_spare = self._num_slots // 64
        self._bucket_mask = np.uint64(num_buckets - 1)
        self._keys = np.zeros(self._num_slots + num_spare, np.uint64)
        self._rows = self._keys[: self._num_slots].reshape(num_buckets, _WAYS)
        self._words = np.zeros((self._num_slots + num_spare, self.num_words), np.uint64)
        self._overflow: dict[int, int] = {}
        self._spare = list(range(self._num_slots, self._num_slots + num_spare))

    def _probe(self, keys: Keys) -> tuple[_Positions, npt.NDArray[np.bool_]]:
        """Positions of keys in their buckets, and which of them are not there."""
        buckets = (keys & self._bucket_mask).view(np.int64)
        hits = self._rows.take(buckets, axis=0) == keys[:, None]
        positions = buckets * _WAYS + hits.argmax(axis=1)
        return positions, self._keys.take(positions) != keys

    def _find(self, keys: Keys) -> _Positions:
        """Positions of keys; -1 for those that are not there."""
        positions, absent = self._probe(keys)
        if absent.any():
            find = self._overflow.get
            positions[absent] = [find(key, -1) for key in keys[absent].tolist()]
        return positions

    def _insert(self, keys: Keys) -> _Positions:
        """Positions of keys that were not there; -1 where none is left."""
        buckets = (keys & self._bucket_mask).view(np.int64)
        positions: _Positions = buckets * _WAYS + (self._rows.take(buckets, axis=0) == 0).argmax(axis=1)
        full = self._keys.take(positions) != 0
        if full.any():
            positions[full] = [self._spare_for(key) for key in keys[full].tolist()]
            keys = np.where(positions < 0, self._keys[-1], keys)
        self._keys[positions] = keys
        # Of keys that want the same slot the last one has it now.
        lost = self._keys.take(positions) != keys
        if lost.any():
            positions[lost] = self._insert(keys[lost])
        return positions

    def _spare_for(self, key: int) -> int:
        """-1 when there is none: hashes are not like this, and a block that is not in the index is only not found."""
        position = self._overflow.get(key, -1)
        if position < 0 and self._spare:
            position = self._overflow[key] = self._spare.pop()
            self._keys[position] = key
        return position

    def _free(self, positions: _Positions) -> None:
        if not positions.size:
            return
        distinct = set(positions.tolist())
        for position in distinct:
            if position >= self._num_slots:
                del self._overflow[int(self._keys[position])]
                self._spare.append(position)
        self._keys[positions] = 0
        self.num_blocks -= len(distinct)

    def _make_room(self, num_new: int) -> None:
        while self.num_blocks + num_new > self._num_slots // 2:
            self._double()

    def _double(self) -> None:
        """Each bucket becomes two, by one more bit of the keys; a million blocks take some 20 ms."""
        keys, words, old = self._keys, self._words, self._num_slots
        self._allocate(2 * old // _WAYS)
        slots = keys[:old].nonzero()[0]
        moved = slots + old * ((keys[slots] & np.uint64(old // _WAYS)) != 0)
        self._keys[moved] = keys[slots]
        self._words[moved] = words[slots]
        slots = keys[old:].nonzero()[0] + old
        self._words[self._insert(keys[slots])] = words[slots]


def divmod_bit(bit: int) -> tuple[int, np.uint64]:
    """In which word a bit is, and the word in which only this bit is set."""
    return bit // WORD_BITS, np.uint64(1 << bit % WORD_BITS)
