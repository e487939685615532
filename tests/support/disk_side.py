"""A host block store with a disk below it, and threads that move when the test says so."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.disk_file import DiskFile
from kvrelay.kv_transfer.disk_tier import DiskTier
from kvrelay.kv_transfer.segment import Segment, size_for
from tests.support.eventually import eventually

SLOT_BYTES = 5000
"""Not a multiple of a page."""
PLACE_BYTES = 8192


def name_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def content_of(number: int) -> bytes:
    return (b"block %d." % number * SLOT_BYTES)[:SLOT_BYTES]


@dataclass(slots=True)
class Call:
    """What a thread was asked to do."""

    future: Future[Any]
    fn: Callable[..., Any]
    args: tuple[Any, ...]


class ManualExecutor(Executor):
    """A thread pool in slow motion: a call begins, and later ends, when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[Call] = []
        self.running: list[Call] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        assert not kwargs
        call = Call(Future(), fn, args)
        self.waiting.append(call)
        return call.future

    def begin(self) -> None:
        """A thread takes the first call that was not cancelled."""
        while self.waiting:
            call = self.waiting.pop(0)
            if call.future.set_running_or_notify_cancel():
                self.running.append(call)
                return

    def end(self, index: int = 0) -> None:
        """Do the work of one call that has begun."""
        call = self.running.pop(index)
        try:
            call.future.set_result(call.fn(*call.args))
        except Exception as error:
            call.future.set_exception(error)

    def run_all(self) -> None:
        while self.waiting or self.running:
            self.begin()
            while self.running:
                self.end()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for call in self.waiting:
            call.future.cancel()
        self.waiting.clear()
        while self.running:
            self.end()


class FlakyFile(DiskFile):
    """Fails as often as it is told to, and lets the bytes on disk be changed."""

    num_failures = 0

    def write(self, place: int, block: memoryview) -> int:
        self._fail()
        return super().write(place, block)

    def read(self, place: int, into: memoryview, expected: int) -> None:
        self._fail()
        super().read(place, into, expected)

    def _fail(self) -> None:
        if self.num_failures:
            self.num_failures -= 1
            raise OSError(5, "Input/output error")

    def corrupt(self, places: Sequence[int], offset: int = SLOT_BYTES // 2) -> None:
        """Flip a byte of each of these places."""
        for place in places:
            position = place * PLACE_BYTES + offset
            old = os.pread(self._fd, 1, position) or b"\0"
            os.pwrite(self._fd, bytes([old[0] ^ 0xFF]), position)


class DiskSide:
    """Store, segment and tier; made in a running event loop."""

    def __init__(self, num_slots: int, num_places: int, directory: Path, *, manual: bool = False) -> None:
        self.segment = Segment.create(size_for(num_slots, SLOT_BYTES))
        self.segment.configure(SLOT_BYTES)
        self.store = BlockStore(num_slots, on_taken=self.segment.begin_generation)
        self.counters: Counter[str] = Counter()
        self.file = FlakyFile.create(directory, num_places * PLACE_BYTES)
        self.readers = ManualExecutor() if manual else None
        self.writers = ManualExecutor() if manual else None
        self.tier = DiskTier(
            self.store, self.segment, self.file, self.counters, readers=self.readers, writers=self.writers
        )

    def put(self, numbers: Sequence[int]) -> None:
        """Blocks of one prompt are computed; they are evictable afterwards."""
        slots = [self.store.commit(self.write(number), name_of(number)) for number in numbers]
        self.store.unpin(slots)

    def write(self, number: int) -> int:
        """Write a block into a reserved slot, which is returned."""
        [slot] = self.store.reserve(1)
        self.segment.slot_view(slot)[:] = content_of(number)
        return slot

    async def put_slowly(self, numbers: Sequence[int]) -> None:
        """One after the other; the disk keeps up."""
        for number in numbers:
            self.put([number])
            await self.written()

    async def written(self) -> None:
        """Until nothing is on its way to the disk; manual threads do what there is."""
        await asyncio.sleep(0)
        await eventually(self._is_quiet)

    def _is_quiet(self) -> bool:
        for executor in (self.readers, self.writers):
            if executor is not None:
                executor.run_all()
        return not self.tier.num_writing

    def holds(self, number: int) -> bool:
        """Whether the block is in memory; its content must be right then."""
        slot = self.store.find(name_of(number))
        if slot is None:
            return False
        assert bytes(self.segment.slot_view(slot)) == content_of(number), f"block {number} has another content"
        return True

    def restored(self, numbers: Sequence[int], or_last: int | None = None) -> Any:
        last = None if or_last is None else name_of(or_last)
        return self.tier.restored([name_of(number) for number in numbers], last)

    async def restore(self, numbers: Sequence[int], or_last: int | None = None) -> list[bool]:
        """Which of these blocks are in memory once all was tried; they may leave it at once."""
        async with self.restored(numbers, or_last):
            return [self.holds(number) for number in numbers]

    def assert_idle(self) -> None:
        """Nothing is reserved or pinned, and every place on disk is free or holds a block that nobody reads."""
        usage = self.store.usage()
        assert (usage.num_reserved, usage.num_pinned) == (0, 0)
        index = self.tier.index
        assert index.num_free + len(index) == index.num_places
        assert index.num_idle == len(index)


@contextlib.asynccontextmanager
async def disk_side(num_slots: int, num_places: int, *, manual: bool = False) -> AsyncIterator[DiskSide]:
    """It must be idle at the end."""
    with _directory() as directory:
        side = DiskSide(num_slots, num_places, directory, manual=manual)
        try:
            yield side
            await side.written()
            # A prefix that ended early leaves reads behind that have begun; each keeps its slot until it is over.
            await eventually(lambda: not side.store.usage().num_reserved, "reads that nobody waits for are over")
            side.assert_idle()
        finally:
            await side.tier.close()
            side.segment.close()


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """It must be empty all the time: the file has no name."""
    with tempfile.TemporaryDirectory(prefix="kvrelay-test-disk-") as path:
        yield Path(path)
        assert os.listdir(path) == []
