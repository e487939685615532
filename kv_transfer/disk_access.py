"""How do bytes move between slots and places without the event loop waiting, and what do errors lead to?"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import structlog

from kvrelay.kv_transfer.disk_file import CorruptBlockError, DiskFile
from kvrelay.kv_transfer.disk_index import DiskBlock
from kvrelay.kv_transfer.posting import post_to_running_loop, raise_in_loop
from kvrelay.kv_transfer.segment import Segment

_log = structlog.get_logger(__name__)

MAX_FAILURES = 3
"""So many calls in a row that the system refused, and the disk is not used any more."""
_NUM_READERS = 2
_NUM_WRITERS = 1
"""Threads of their own: a request waits for its reads, nobody for a write."""


class DiskAccess:
    """Reads and writes whole blocks on threads. Belongs to the worker's event loop, in which it calls back.

    A block that changed on disk is one error; an error of the system may be the first of many, and `MAX_FAILURES` of
    them without a success between end the use of the disk: `is_off`, and `on_off` is called.
    """

    def __init__(
        self,
        segment: Segment,
        file: DiskFile,
        counters: Counter[str],
        *,
        readers: Executor | None = None,
        writers: Executor | None = None,
    ) -> None:
        """Counts `disk_blocks_read`, `disk_blocks_written` and `disk_errors`."""
        self.is_off = False
        self.on_off: Callable[[], object] = lambda: None
        self._segment = segment
        self._file = file
        self._counters = counters
        self._readers = readers or ThreadPoolExecutor(_NUM_READERS, "disk-read")
        self._writers = writers or ThreadPoolExecutor(_NUM_WRITERS, "disk-write")
        self._post = post_to_running_loop(raise_in_loop)
        self._num_failures = 0

    def read(self, block: DiskBlock, slot: int, done: Callable[[bool], object]) -> Future[None]:
        """Read a block into a slot; `done` learns whether it is there. The thread touches the slot until then.

        The future is for `cancel` alone; where that succeeds the slot is not touched, and `done` is called as well.
        """
        future = self._readers.submit(self._read, block, slot)
        future.add_done_callback(lambda over: self._post(self._read_over, over, done))
        return future

    def write(self, slot: int, place: int, done: Callable[[int | None], object]) -> None:
        """Write a slot to a place; `done` gets its checksum, or None when that failed."""
        future = self._writers.submit(self._write, slot, place)
        future.add_done_callback(lambda over: self._post(self._write_over, over, done))

    def _read(self, block: DiskBlock, slot: int) -> None:
        with self._segment.slot_view(slot) as view:
            self._file.read(block.place, view, block.checksum)

    def _write(self, slot: int, place: int) -> int | None:
        if self.is_off:
            return None
        with self._segment.slot_view(slot) as view:
            return self._file.write(place, view)

    def _read_over(self, over: Future[None], done: Callable[[bool], object]) -> None:
        succeeded = self._is_good(over)
        self._counters["disk_blocks_read"] += succeeded
        done(succeeded)

    def _write_over(self, over: Future[int | None], done: Callable[[int | None], object]) -> None:
        done(over.result() if self._is_good(over) else None)

    def _is_good(self, over: Future[None] | Future[int | None]) -> bool:
        """Count an error, and give the disk up for what is neither its nor the system's fault: a mistake of ours."""
        if over.cancelled():
            return False
        match over.exception():
            case None:
                self._num_failures = 0
                return True
            case CorruptBlockError() as error:
                self._counters["disk_errors"] += 1
                _log.warning("block on disk is corrupt", error=str(error))
            case OSError() as error:
                self._counters["disk_errors"] += 1
                self._num_failures += 1
                if self._num_failures >= MAX_FAILURES:
                    self._switch_off(error)
            case error:
                self._counters["disk_errors"] += 1
                self._switch_off(error)
        return False

    def _switch_off(self, error: BaseException) -> None:
        if self.is_off:
            return
        self.is_off = True
        _log.error(
            "the disk fails and is not used for KV blocks any more; replace it, or correct --kv-disk-path, and restart",
            directory=str(self._file.directory),
            error=str(error),
            exc_info=None if isinstance(error, OSError) else error,
        )
        self.on_off()
        self._writers.submit(self._file.give_up_space)

    async def close(self) -> None:
        """End the threads, then the file. What has not begun is cancelled; slots are untouched from here on."""
        self.is_off = True
        await asyncio.to_thread(self._join)
        self._file.close()

    def _join(self) -> None:
        for executor in (self._readers, self._writers):
            executor.shutdown(wait=True, cancel_futures=True)
