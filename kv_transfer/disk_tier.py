"""The disk below the host block store: what leaves memory is on disk before, and comes back when it is wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager

from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.disk_access import DiskAccess
from kvrelay.kv_transfer.disk_file import DiskFile
from kvrelay.kv_transfer.disk_index import DiskIndex
from kvrelay.kv_transfer.disk_reader import DiskReader
from kvrelay.kv_transfer.disk_writer import DiskWriter
from kvrelay.kv_transfer.segment import Segment


class DiskTier:
    """Puts the parts together; belongs to the worker's event loop (ADR 11).

    The file is a cache of a cache: an error costs a block, which is computed again, and never a request.
    """

    def __init__(
        self,
        store: BlockStore,
        segment: Segment,
        file: DiskFile,
        counters: Counter[str],
        *,
        readers: Executor | None = None,
        writers: Executor | None = None,
    ) -> None:
        """Owns the file from here on. `readers` and `writers` run the calls that block. Raises `ValueError` when not
        even one block fits into the file."""
        file.configure(segment.slot_bytes)
        self._file = file
        self._access = DiskAccess(segment, file, counters, readers=readers, writers=writers)
        self.index = DiskIndex(file.num_places)
        self._access.on_off = self.index.clear
        self._writer = DiskWriter(store, segment, self.index, self._access, counters)
        self._reader = DiskReader(store, self.index, self._access)

    def restored(
        self, hashes: Sequence[bytes], or_last: bytes | None = None
    ) -> AbstractAsyncContextManager[frozenset[int]]:
        """See `DiskReader.restored`."""
        return self._reader.restored(hashes, or_last)

    @property
    def size_bytes(self) -> int:
        """Of the file; 0 when the disk has failed and is not used any more."""
        return 0 if self._access.is_off else self._file.size_bytes

    @property
    def num_blocks(self) -> int:
        """Complete ones on disk."""
        return len(self.index)

    @property
    def num_writing(self) -> int:
        """Blocks on their way to the disk."""
        return self._writer.num_writing

    async def close(self) -> None:
        """No thread touches a slot afterwards, and the file is gone."""
        await self._access.close()
