"""Which blocks of a prompt does an engine write to the store?"""

from __future__ import annotations

from collections.abc import Sequence

from kvrelay.simulator.host_store import HostStore


class Saving:
    """Reserved slots for the blocks that are not stored yet, until they are complete or given back.

    When the store has no room for all of them, the last ones are not saved.
    """

    def __init__(self, store: HostStore, names: Sequence[bytes], num_stored: int, block_tokens: int) -> None:
        self._store = store
        self._names = names
        self._next = num_stored
        self._block_tokens = block_tokens
        self._slots = store.reserve(len(names) - num_stored)[::-1]

    def computed(self, num_tokens: int, *, complete: bool) -> list[int]:
        """So many tokens of the prompt are computed, or all: then its last block is complete, full or not.

        Returns the slots of the blocks that are complete now, pinned; whoever gets them unpins them.
        """
        end = len(self._names) if complete else num_tokens // self._block_tokens
        saved = []
        while self._next < end and self._slots:
            saved.append(self._store.commit(self._slots.pop(), self._names[self._next]))
            self._next += 1
        return saved

    def close(self) -> None:
        """Nothing more will be computed."""
        self._store.release(self._slots)
        self._slots = []
