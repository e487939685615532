"""A store tells what came and what went since it was last asked."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvrelay.simulator.host_store import HostStore
from kvrelay.simulator.saving import Saving

NAMES = [bytes([number]) * 16 for number in range(20)]


def put(store: HostStore, *names: bytes) -> None:
    for name in names:
        for slot in store.reserve(1):
            store.unpin([store.commit(slot, name)])


def test_changes_since_the_last_time() -> None:
    store = HostStore(2)
    put(store, NAMES[0], NAMES[1])
    assert store.has_changed
    change = store.take_change()
    assert (list(change.added), list(change.removed)) == ([NAMES[0], NAMES[1]], [])
    assert not store.has_changed
    put(store, NAMES[2])
    change = store.take_change()
    assert (list(change.added), list(change.removed)) == ([NAMES[2]], [NAMES[0]])


def test_what_came_and_went_meanwhile_is_not_told() -> None:
    store = HostStore(1)
    put(store, NAMES[0], NAMES[1])
    change = store.take_change()
    assert (list(change.added), list(change.removed)) == ([NAMES[1]], [])


@given(st.integers(1, 6), st.lists(st.one_of(st.integers(0, 19), st.none()), max_size=60))
def test_whoever_follows_the_changes_knows_the_store(num_blocks: int, actions: list[int | None]) -> None:
    store, known = HostStore(num_blocks), set[bytes]()
    for action in [*actions, None]:
        if action is not None:
            put(store, NAMES[action])
            continue
        change = store.take_change()
        assert not set(change.added) & set(change.removed)
        known = (known | set(change.added)) - set(change.removed)
        assert known == {name for name in NAMES if store.has(name)}


def test_prompts_are_pinned_as_far_as_they_are_stored() -> None:
    store = HostStore(10)
    put(store, *NAMES[:2], NAMES[3])
    pins = store.pin_prefix(NAMES[:4])
    assert len(pins) == 2
    assert store.usage().num_pinned == 2
    put(store, NAMES[2])
    pins = store.extend_prefix(pins, NAMES[:4])
    assert len(pins) == store.usage().num_pinned == 4
    present = store.pin_present([NAMES[9], NAMES[3]])
    assert len(present) == 1
    store.unpin(pins + present)
    assert store.usage().num_pinned == 0


def test_blocks_are_saved_as_they_become_complete() -> None:
    store = HostStore(10)
    saving = Saving(store, NAMES[:4], 1, block_tokens=10)
    assert store.usage().num_reserved == 3
    assert saving.computed(19, complete=False) == []
    assert len(saving.computed(35, complete=False)) == 2
    assert len(saving.computed(38, complete=True)) == 1
    saving.close()
    assert [store.has(name) for name in NAMES[:4]] == [False, True, True, True]
    assert store.usage().num_reserved == 0


def test_what_has_no_room_is_not_saved() -> None:
    store = HostStore(2)
    saving = Saving(store, NAMES[:4], 0, block_tokens=10)
    assert len(saving.computed(40, complete=True)) == 2
    saving.close()
    assert [store.has(name) for name in NAMES[:4]] == [True, True, False, False]


def test_what_is_not_computed_is_given_back() -> None:
    store = HostStore(4)
    saving = Saving(store, NAMES[:4], 0, block_tokens=10)
    store.unpin(saving.computed(10, complete=False))
    saving.close()
    assert (store.usage().num_free, store.usage().num_reserved) == (3, 0)
