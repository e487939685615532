"""The store's accounts stay right under every sequence of calls: they equal those of a plain model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvrelay.kv_transfer.block_store import BlockStore, SlotError

NUM_SLOTS = 6
HASHES = st.integers(0, 9).map(lambda i: bytes([i]) * 16)


class StoreMachine(RuleBasedStateMachine):
    """The model: sets of lent and abandoned slots, the slot of each hash, pins, and ready slots without pins.

    The latter are in the order of their last use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.store = BlockStore(NUM_SLOTS)
        self.reserved: set[int] = set()
        self.granted: set[int] = set()
        self.abandoned: set[int] = set()
        self.ready: dict[bytes, int] = {}
        self.pins: dict[int, int] = {}
        self.unpinned: list[int] = []
        self.turnover = 0
        self.expected_turnover = 0
        self.store.on_turnover = self.count

    def count(self, number: int) -> None:
        assert number > 0
        self.turnover += number

    @property
    def num_free(self) -> int:
        return NUM_SLOTS - len(self.reserved) - len(self.granted) - len(self.abandoned) - len(self.ready)

    @property
    def lent(self) -> list[int]:
        return sorted(self.reserved | self.granted)

    @property
    def pinnable(self) -> list[int]:
        return sorted({*self.lent, *self.abandoned, *self.ready.values()})

    def left(self, slot: int) -> None:
        """Its writer completed it or gave it up."""
        self.reserved.discard(slot)
        self.granted.discard(slot)
        if self.pins.get(slot):
            self.abandoned.add(slot)

    def taken(self, slots: list[int], count: int) -> None:
        """What `reserve` and `grant` have in common: no slot in use is handed out, the least recent are evicted."""
        num_evicted = max(0, min(count - self.num_free, len(self.unpinned)))
        assert len(slots) == len(set(slots)) == min(count, self.num_free + len(self.unpinned))
        evicted, self.unpinned = self.unpinned[:num_evicted], self.unpinned[num_evicted:]
        assert set(evicted) <= set(slots)
        self.ready = {h: slot for h, slot in self.ready.items() if slot not in evicted}
        assert not set(slots) & {*self.lent, *self.abandoned, *self.ready.values()}
        assert not any(self.pins.get(slot) for slot in slots)
        self.expected_turnover += len(slots)

    @rule(count=st.integers(0, NUM_SLOTS + 1))
    def reserve(self, count: int) -> None:
        slots = self.store.reserve(count)
        self.taken(slots, count)
        self.reserved |= set(slots)

    @rule(count=st.integers(0, 3))
    def grant(self, count: int) -> None:
        slots = self.store.grant(count)
        self.taken(slots, count)
        self.granted |= set(slots)

    @precondition(lambda self: self.lent)
    @rule(data=st.data(), block_hash=HASHES)
    def commit(self, data: st.DataObject, block_hash: bytes) -> None:
        slot = data.draw(st.sampled_from(self.lent))
        expected = self.ready.setdefault(block_hash, slot)
        assert self.store.commit(slot, block_hash) == expected
        self.left(slot)
        if expected == slot:
            self.abandoned.discard(slot)
        self.pins[expected] = self.pins.get(expected, 0) + 1
        if expected in self.unpinned:
            self.unpinned.remove(expected)

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slots = data.draw(st.lists(st.sampled_from(self.lent), unique=True))
        self.store.release(slots)
        for slot in slots:
            self.left(slot)

    @precondition(lambda self: self.pinnable)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        slots = data.draw(st.lists(st.sampled_from(self.pinnable)))
        self.store.pin(slots)
        for slot in slots:
            self.pins[slot] = self.pins.get(slot, 0) + 1
            if slot in self.unpinned:
                self.unpinned.remove(slot)

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pinned = sorted(slot for slot, count in self.pins.items() if count)
        slots = data.draw(st.lists(st.sampled_from(pinned), unique=True))
        self.store.unpin(slots)
        for slot in reversed(slots):
            self.pins[slot] -= 1
            if not self.pins[slot]:
                self.abandoned.discard(slot)
                if slot in self.ready.values():
                    self.unpinned.append(slot)
                    self.expected_turnover += 1

    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        """Every use of a slot against its state is refused and changes nothing."""
        slot = data.draw(st.integers(0, NUM_SLOTS - 1))
        if slot not in self.pinnable:
            with pytest.raises(SlotError):
                self.store.pin([slot])
        if not self.pins.get(slot):
            with pytest.raises(SlotError):
                self.store.unpin([slot])
        if slot not in self.reserved | self.granted:
            with pytest.raises(SlotError):
                self.store.release([slot])
            with pytest.raises(SlotError):
                self.store.commit(slot, data.draw(HASHES))

    @rule(hashes=st.lists(HASHES))
    def match(self, hashes: list[bytes]) -> None:
        expected = []
        for block_hash in hashes:
            if block_hash not in self.ready:
                break
            expected.append(self.ready[block_hash])
        assert self.store.match(hashes) == expected

    @rule(count=st.integers(0, NUM_SLOTS + 1))
    def next_out(self, count: int) -> None:
        by_slot = {slot: block_hash for block_hash, slot in self.ready.items()}
        expected = self.unpinned[: max(0, count - self.num_free)]
        assert self.store.next_out(count) == [(slot, by_slot[slot]) for slot in expected]

    @invariant()
    def every_turnover_is_told(self) -> None:
        assert self.turnover == self.expected_turnover

    @invariant()
    def every_hash_leads_to_its_slot(self) -> None:
        for block_hash in (bytes([i]) * 16 for i in range(10)):
            assert self.store.find(block_hash) == self.ready.get(block_hash)
        assert len(set(self.ready.values())) == len(self.ready)

    @invariant()
    def counts_add_up(self) -> None:
        usage = self.store.usage()
        assert usage.num_free == self.num_free
        assert usage.num_reserved == len(self.reserved) + len(self.abandoned)
        assert usage.num_granted == len(self.granted)
        assert usage.num_pinned == sum(1 for slot in self.ready.values() if self.pins.get(slot))
        assert usage.num_evictable == len(self.unpinned)
        parts = usage.num_free + usage.num_reserved + usage.num_granted + usage.num_pinned + usage.num_evictable
        assert parts == usage.num_slots == NUM_SLOTS
        assert {slot for slot in range(NUM_SLOTS) if self.store.is_granted(slot)} == self.granted


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def filled(num_slots: int) -> tuple[BlockStore, list[bytes]]:
    """A store whose slots hold one block each, the first used least recently."""
    store = BlockStore(num_slots)
    hashes = [bytes([i]) * 16 for i in range(num_slots)]
    for slot, block_hash in zip(store.reserve(num_slots), hashes, strict=True):
        store.unpin([store.commit(slot, block_hash)])
    return store, hashes


def test_the_least_recently_used_block_goes_first() -> None:
    store, hashes = filled(3)
    used = store.match(hashes[:1])
    store.pin(used)
    store.unpin(used)
    store.reserve(1)
    assert [store.find(h) is not None for h in hashes] == [True, False, True]


def test_a_prefix_outlives_its_continuation() -> None:
    store, hashes = filled(3)
    slots = store.match(hashes)
    store.pin(slots)
    store.unpin(slots)
    store.reserve(2)
    assert store.match(hashes) == slots[:1]


def test_free_slots_are_taken_before_anything_is_evicted() -> None:
    store = BlockStore(2)
    [slot] = store.reserve(1)
    store.unpin([store.commit(slot, b"a" * 16)])
    store.reserve(1)
    assert store.find(b"a" * 16) == slot


def test_a_block_that_came_twice_is_kept_once() -> None:
    store = BlockStore(2)
    first, second = store.reserve(2)
    assert store.commit(first, b"a" * 16) == first
    assert store.commit(second, b"a" * 16) == first
    usage = store.usage()
    assert (usage.num_free, usage.num_pinned) == (1, 1)
    store.unpin([first, first])
    assert store.usage().num_evictable == 1


def test_a_slot_whose_writer_left_is_free_when_its_last_reader_leaves() -> None:
    store = BlockStore(1)
    [slot] = store.reserve(1)
    store.pin([slot, slot])
    store.release([slot])
    assert store.reserve(1) == []
    store.pin([slot])
    store.unpin([slot, slot])
    assert store.usage().num_reserved == 1
    store.unpin([slot])
    with pytest.raises(SlotError, match="free"):
        store.pin([slot])
    assert store.reserve(1) == [slot]


def test_a_block_that_came_twice_stays_where_it_is_read() -> None:
    store = BlockStore(2)
    first, second = store.reserve(2)
    store.pin([second])
    store.commit(first, b"a" * 16)
    assert store.commit(second, b"a" * 16) == first
    usage = store.usage()
    assert (usage.num_reserved, usage.num_pinned, usage.num_free) == (1, 1, 0)
    store.unpin([second])
    assert store.usage().num_free == 1


def test_a_reader_of_a_slot_keeps_it_when_it_is_complete() -> None:
    store = BlockStore(1)
    [slot] = store.grant(1)
    store.pin([slot])
    assert store.commit(slot, b"a" * 16) == slot
    store.unpin([slot])
    assert store.usage().num_pinned == 1
    store.unpin([slot])
    assert store.usage().num_evictable == 1
