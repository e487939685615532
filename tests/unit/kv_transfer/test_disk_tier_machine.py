"""Whatever happens in whatever order, a block in memory has its own content, and nothing is held for nobody."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvrelay.kv_transfer import disk_writer
from kvrelay.kv_transfer.block_store import SlotState
from tests.support.disk_side import DiskSide, name_of

MAX_WRITES = disk_writer.MAX_WRITES
NUM_SLOTS = 8
NUM_PLACES = 5
NUM_NUMBERS = 12
NUMBERS = st.integers(0, NUM_NUMBERS - 1)
PROMPTS = st.lists(NUMBERS, min_size=1, max_size=5, unique=True)


class Request:
    """Restores a prompt, and stays inside until it may leave."""

    def __init__(self, side: DiskSide, numbers: list[int], or_last: int | None) -> None:
        self.side = side
        self.numbers = numbers
        self.or_last = or_last
        self.may_leave = asyncio.Event()
        self.held: list[int] = []
        """Slots that must not be given away while it is inside."""
        self.task = asyncio.get_running_loop().create_task(self.run())

    async def run(self) -> None:
        async with self.side.restored(self.numbers, self.or_last) as restored:
            found = self.side.store.match([name_of(number) for number in self.numbers])
            last = None if self.or_last is None else self.side.store.find(name_of(self.or_last))
            assert restored <= {*found, last}
            self.held = sorted(restored)
            await self.may_leave.wait()
            self.held = []


class DiskMachine(RuleBasedStateMachine):
    """The model is the content that each number's block must have; all else are invariants."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory(prefix="kvrelay-test-disk-")
        self.loop = asyncio.new_event_loop()
        self.requests: list[Request] = []
        self.reserved: list[int] = []

    @initialize(max_writes=st.sampled_from([1, 2, 32]))
    def begin(self, max_writes: int) -> None:
        """Some blocks are in memory, others have been on disk for a while."""
        disk_writer.MAX_WRITES = max_writes

        async def make() -> DiskSide:
            return DiskSide(NUM_SLOTS, NUM_PLACES, Path(self.folder.name), manual=True)

        self.side = self.loop.run_until_complete(make())
        assert self.side.readers is not None
        assert self.side.writers is not None
        self.readers, self.writers = self.side.readers, self.side.writers
        for number in range(NUM_NUMBERS):
            self.compute([number])
            self.keep_up()
        assert self.side.tier.num_blocks == NUM_PLACES

    def spin(self) -> None:
        """Let the event loop do what is due."""

        async def pause() -> None:
            for _ in range(5):
                await asyncio.sleep(0)

        self.loop.run_until_complete(pause())

    # What a worker does.

    @rule(numbers=PROMPTS)
    def compute(self, numbers: list[int]) -> None:
        """Blocks are computed as far as there are slots, be they in memory already or not."""
        usage = self.side.store.usage()
        self.side.put(numbers[: usage.num_free + usage.num_evictable])
        self.spin()

    @rule(count=st.integers(1, NUM_SLOTS))
    def fill_up(self, count: int) -> None:
        """Somebody takes slots and writes to them."""
        for slot in self.side.store.reserve(count):
            self.side.segment.slot_view(slot)[:1000] = b"x" * 1000
            self.reserved.append(slot)
        self.spin()

    @rule()
    def empty(self) -> None:
        self.side.store.release(self.reserved)
        self.reserved.clear()

    @rule(count=st.integers(1, NUM_SLOTS))
    def forget(self, count: int) -> None:
        """Blocks leave memory."""
        self.fill_up(count)
        self.empty()

    @rule(numbers=PROMPTS, or_last=st.none() | NUMBERS, data=st.data())
    def restore(self, numbers: list[int], or_last: int | None, data: st.DataObject) -> None:
        """Mostly of prompts whose first block is on disk alone."""
        only_there = [
            number
            for number in range(NUM_NUMBERS)
            if name_of(number) in self.side.tier.index and self.side.store.find(name_of(number)) is None
        ]
        if only_there:
            first = data.draw(st.sampled_from(only_there))
            numbers = [first, *(number for number in numbers if number != first)]

        async def start() -> Request:
            return Request(self.side, numbers, None if or_last in numbers else or_last)

        self.requests.append(self.loop.run_until_complete(start()))
        self.spin()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), cancel=st.booleans())
    def leave(self, data: st.DataObject, cancel: bool) -> None:
        request = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        if cancel:
            request.task.cancel()
        else:
            request.may_leave.set()
            self.requests.append(request)
        self.spin()
        if cancel:
            assert request.task.done()
            with contextlib.suppress(asyncio.CancelledError):
                request.task.result()

    # What threads and disks do.

    @rule()
    def begin_calls(self) -> None:
        """Threads take what waits for them."""
        for executor in (self.readers, self.writers):
            while executor.waiting:
                executor.begin()

    @precondition(lambda self: self.readers.running or self.writers.running)
    @rule(data=st.data())
    def end_call(self, data: st.DataObject) -> None:
        executor = data.draw(st.sampled_from([e for e in (self.readers, self.writers) if e.running]))
        executor.end(data.draw(st.integers(0, len(executor.running) - 1)))
        self.spin()

    @rule()
    def keep_up(self) -> None:
        self.readers.run_all()
        self.writers.run_all()
        self.spin()

    @rule(place=st.integers(0, NUM_PLACES - 1))
    def corrupt(self, place: int) -> None:
        self.side.file.corrupt([place])

    @rule(count=st.sampled_from([1, 1, 1, 2, 3]))
    def fail(self, count: int) -> None:
        self.side.file.num_failures = count

    # What must hold.

    @invariant()
    def every_block_has_its_content(self) -> None:
        if hasattr(self, "side"):
            for number in range(NUM_NUMBERS):
                self.side.holds(number)

    @invariant()
    def nobody_is_given_what_others_hold(self) -> None:
        for request in self.requests:
            if request.task.done():
                request.task.result()
            assert not set(request.held) & set(self.reserved)

    @invariant()
    def a_thread_writes_to_reserved_slots_only(self) -> None:
        if hasattr(self, "side"):
            for call in self.readers.running:
                _block, slot = call.args
                assert self.side.store._state[slot] is SlotState.RESERVED

    @invariant()
    def places_are_used_once(self) -> None:
        if hasattr(self, "side"):
            index = self.side.tier.index
            places = [block.place for block in index._blocks.values()] + index._free
            assert len(set(places)) == len(places) <= NUM_PLACES

    def teardown(self) -> None:
        disk_writer.MAX_WRITES = MAX_WRITES
        try:
            if hasattr(self, "side"):
                self.end()
        finally:
            if hasattr(self, "side"):
                self.loop.run_until_complete(self.side.tier.close())
                self.side.segment.close()
            self.loop.close()
            self.folder.cleanup()

    def end(self) -> None:
        """Requests leave, by themselves or cancelled; what threads have begun they end."""
        self.empty()
        for number, request in enumerate(self.requests):
            if number % 2:
                request.task.cancel()
            request.may_leave.set()
        self.spin()
        for _ in range(3):
            self.keep_up()
        for request in self.requests:
            assert request.task.done()
        self.side.assert_idle()


TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
