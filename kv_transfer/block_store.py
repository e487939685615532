"""Which slot of the host block store holds which KV block, and who may still touch it?"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice


class SlotState(enum.Enum):
    FREE = "free"
    RESERVED = "reserved"
    """Somebody writes it; no hash leads to it."""
    GRANTED = "granted"
    """Lent to the engine for blocks of generated tokens; no hash leads to it."""
    READY = "ready"
    """Complete and found under its hash; evictable while nobody has pinned it."""
    ABANDONED = "abandoned"
    """Its writer has left, somebody still reads it; no hash leads to it. Free at the last `unpin`."""


class SlotError(RuntimeError):
    """A slot was used against its state: a bug of the caller, never of a peer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreUsage:
    """Slots by state; they add up to `num_slots`."""

    num_slots: int
    num_free: int
    num_reserved: int
    """Pinned or not; abandoned ones count, too."""
    num_granted: int
    num_pinned: int
    """Ready ones."""
    num_evictable: int


class BlockStore:
    """Accounts of the slots; the bytes are the segment's.

    One owner, the worker's event loop: no locks. Invariants: a hash leads to one slot and a slot lies under
    one hash at most; only a ready slot nobody pins is ever taken away from its hash, least recently used
    first; a slot that somebody pins is not handed out, whatever its writer does. `reserve`, `pin` and `grant`
    hand out a duty each: a reserved or granted slot ends by `commit` or `release`, a pin by `unpin`.
    """

    def __init__(self, num_slots: int, on_taken: Callable[[int], object] = lambda _: None) -> None:
        """`on_taken` is called with every slot that is handed out, before anybody can write to it."""
        self._on_taken = on_taken
        self.on_turnover: Callable[[int], object] = lambda _: None
        """Called with how many slots were just handed out, or have become evictable; must not use the store at once."""
        self.on_changed: Callable[[bytes], object] = lambda _: None
        """Called with the hash of a block that has become ready, or is no more; must not use the store at once."""
        self._state = [SlotState.FREE] * num_slots
        self._pins = [0] * num_slots
        self._hash: list[bytes | None] = [None] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._slots: dict[bytes, int] = {}
        self._num_reserved = 0
        self._num_granted = 0

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Slots of the longest prefix of `hashes` that is ready. Pins nothing."""
        slots = []
        for block_hash in hashes:
            slot = self._slots.get(block_hash)
            if slot is None:
                break
            slots.append(slot)
        return slots

    def find(self, block_hash: bytes) -> int | None:
        """The ready slot of one hash."""
        return self._slots.get(block_hash)

    @property
    def hashes(self) -> Collection[bytes]:
        """Of all blocks that are ready; live."""
        return self._slots.keys()

    def pin(self, slots: Iterable[int]) -> None:
        """Keep slots from being used for anything else until as many `unpin`.

        Whoever pins a slot that is not ready reads only what is complete in it, and has pinned an abandoned one before.
        """
        for slot in slots:
            if self._state[slot] is SlotState.FREE:
                raise SlotError(f"slot {slot} is free and cannot be pinned")
            self._pins[slot] += 1
            self._evictable.pop(slot, None)

    def unpin(self, slots: Sequence[int]) -> None:
        """Give pins back. The last of `slots` is evicted first: a prefix outlives its continuations."""
        num_evictable = len(self._evictable)
        for slot in reversed(slots):
            if self._pins[slot] < 1:
                raise SlotError(f"slot {slot} is not pinned")
            self._pins[slot] -= 1
            if self._pins[slot]:
                continue
            if self._state[slot] is SlotState.READY:
                self._evictable[slot] = None
            elif self._state[slot] is SlotState.ABANDONED:
                self._num_reserved -= 1
                self._free_slot(slot)
        if len(self._evictable) > num_evictable:
            self.on_turnover(len(self._evictable) - num_evictable)

    def reserve(self, count: int) -> list[int]:
        """Up to `count` slots to write to, evicting what is needed; fewer when the rest is in use."""
        return self._take(count, SlotState.RESERVED)

    def grant(self, count: int) -> list[int]:
        """Like `reserve`, for slots lent to the engine before anybody knows what for."""
        return self._take(count, SlotState.GRANTED)

    def _take(self, count: int, state: SlotState) -> list[int]:
        taken: list[int] = []
        while len(taken) < count and (self._free or self._evictable):
            slot = self._free.pop() if self._free else self._evict()
            self._state[slot] = state
            self._on_taken(slot)
            taken.append(slot)
        if state is SlotState.RESERVED:
            self._num_reserved += len(taken)
        else:
            self._num_granted += len(taken)
        taken.sort()  # Neighbours are copied at once.
        if taken:
            self.on_turnover(len(taken))
        return taken

    def _evict(self) -> int:
        slot, _ = self._evictable.popitem(last=False)
        block_hash = self._hash[slot]
        assert block_hash is not None
        del self._slots[block_hash]
        self._hash[slot] = None
        self.on_changed(block_hash)
        return slot

    def next_out(self, count: int) -> list[tuple[int, bytes]]:
        """What the next `count` slots that are handed out hold, as long as nobody pins it: slots and hashes.

        The first to go comes first; free slots go before all and are left out.
        """
        evicted = islice(self._evictable, max(0, count - len(self._free)))
        return [(slot, block_hash) for slot in evicted if (block_hash := self._hash[slot]) is not None]

    def commit(self, slot: int, block_hash: bytes) -> int:
        """The block in a reserved or granted slot is complete; returns its slot, pinned once (more).

        When another slot holds the same block already, that one is returned and this one is released.
        """
        known = self._slots.get(block_hash)
        if known is not None:
            self.release([slot])
            self.pin([known])
            return known
        self._leave(slot)
        self._state[slot] = SlotState.READY
        self._hash[slot] = block_hash
        self._slots[block_hash] = slot
        self._pins[slot] += 1
        self.on_changed(block_hash)
        return slot

    def release(self, slots: Iterable[int]) -> None:
        """Free reserved or granted slots that will not be completed, those that are pinned once they are not."""
        for slot in slots:
            self._leave(slot)
            if self._pins[slot]:
                self._state[slot] = SlotState.ABANDONED
                self._num_reserved += 1
            else:
                self._free_slot(slot)

    def _free_slot(self, slot: int) -> None:
        self._state[slot] = SlotState.FREE
        self._free.append(slot)

    def _leave(self, slot: int) -> None:
        state = self._state[slot]
        if state is SlotState.RESERVED:
            self._num_reserved -= 1
        elif state is SlotState.GRANTED:
            self._num_granted -= 1
        else:
            raise SlotError(f"slot {slot} is {state.value}, neither reserved nor granted")

    def is_granted(self, slot: int) -> bool:
        """Whether the slot is lent to the engine."""
        return self._state[slot] is SlotState.GRANTED

    def usage(self) -> StoreUsage:
        """Slots by state at this moment."""
        num_slots = len(self._state)
        ready = len(self._slots)
        return StoreUsage(
            num_slots=num_slots,
            num_free=len(self._free),
            num_reserved=self._num_reserved,
            num_granted=self._num_granted,
            num_pinned=ready - len(self._evictable),
            num_evictable=len(self._evictable),
        )
