"""What does a simulated worker hold in host memory, and what does it tell of it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.kv_transfer.block_store import BlockStore, StoreUsage


@dataclass(frozen=True, slots=True)
class StoreChange:
    """Blocks that came and went since the last one; no block is in both."""

    added: Sequence[bytes]
    removed: Sequence[bytes]


class HostStore:
    """The accounts of a worker's block store, and which blocks have changed since that was asked last."""

    def __init__(self, num_blocks: int) -> None:
        self._store = BlockStore(num_blocks, self._on_taken)
        self._names: dict[int, bytes] = {}
        """Of the slots that hold a block."""
        self._added: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    @property
    def has_changed(self) -> bool:
        return bool(self._added or self._removed)

    def take_change(self) -> StoreChange:
        change = StoreChange(tuple(self._added), tuple(self._removed))
        self._added.clear()
        self._removed.clear()
        return change

    def usage(self) -> StoreUsage:
        return self._store.usage()

    def has(self, name: bytes) -> bool:
        return self._store.find(name) is not None

    def pin_prefix(self, names: Sequence[bytes]) -> list[int]:
        """Pin what is stored of a prefix; its slots."""
        return self.extend_prefix([], names)

    def extend_prefix(self, pins: list[int], names: Sequence[bytes]) -> list[int]:
        """More of the prefix may be stored than `pins` hold; all its slots, pinned once."""
        more = self._store.match(names[len(pins) :])
        self._store.pin(more)
        return pins + more

    def pin_present(self, names: Sequence[bytes]) -> list[int]:
        """Pin those blocks that are stored, wherever in the prompt they are."""
        slots = [slot for name in names if (slot := self._store.find(name)) is not None]
        self._store.pin(slots)
        return slots

    def unpin(self, slots: Sequence[int]) -> None:
        self._store.unpin(slots)

    def reserve(self, count: int) -> list[int]:
        """Up to `count` slots to write to; fewer when the rest is in use."""
        return self._store.reserve(count)

    def release(self, slots: Sequence[int]) -> None:
        """Give reserved slots back."""
        self._store.release(slots)

    def commit(self, slot: int, name: bytes) -> int:
        """The block in a reserved slot is complete; returns the slot that holds it, pinned."""
        held = self._store.commit(slot, name)
        if held == slot:
            self._names[slot] = name
            if name in self._removed:
                del self._removed[name]
            else:
                self._added[name] = None
        return held

    def _on_taken(self, slot: int) -> None:
        name = self._names.pop(slot, None)
        if name is None:
            return
        if name in self._added:
            del self._added[name]
        else:
            self._removed[name] = None
