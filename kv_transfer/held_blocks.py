"""Which blocks would a request find at this worker, in memory or on disk?"""

from __future__ import annotations

from collections.abc import Callable

from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.disk_index import DiskIndex


class HeldBlocks:
    """Both together. Belongs to the worker's event loop."""

    def __init__(self, store: BlockStore, disk: DiskIndex | None = None) -> None:
        self._store = store
        self._disk = disk

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._store.hashes or (self._disk is not None and block_hash in self._disk)

    def hashes(self) -> list[bytes]:
        """Of all of them at this moment. Those that are in both places come twice."""
        return [*self._store.hashes, *(self._disk.hashes if self._disk is not None else ())]

    def notify(self, on_changed: Callable[[bytes], object]) -> None:
        """Call back with the hash of every block that may have come or gone; it must not use the blocks at once.

        What goes to disk is in memory then, so that is no change.
        """
        self._store.on_changed = on_changed
        if self._disk is not None:
            self._disk.on_dropped = on_changed
