"""What leaves memory comes back from disk, right or not at all, and nothing is held for longer than it is needed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from kvrelay.kv_transfer import disk_reader
from kvrelay.kv_transfer.disk_access import MAX_FAILURES
from tests.support.disk_side import DiskSide, ManualExecutor, disk_side, name_of
from tests.support.eventually import eventually

SLOTS = 16
AHEAD = SLOTS // 4
PLACES = 64


@contextlib.asynccontextmanager
async def slow_side() -> AsyncIterator[tuple[DiskSide, ManualExecutor]]:
    """A side whose blocks 0 to 3 are on disk and not in memory, and whose threads wait to be told."""
    async with disk_side(SLOTS, PLACES, manual=True) as side:
        assert side.readers is not None
        assert side.writers is not None
        side.put(range(3, -1, -1))
        side.put(range(10, 10 + SLOTS - AHEAD))
        await eventually(lambda: side.tier.num_writing == AHEAD)
        await side.written()
        side.store.release(side.store.reserve(AHEAD))
        yield side, side.readers


async def test_what_left_memory_comes_back() -> None:
    async with disk_side(SLOTS, PLACES) as side:
        await side.put_slowly(range(40))
        assert not side.holds(0)
        assert await side.restore(range(12)) == [True] * 12
        assert side.counters["disk_blocks_read"] == 12
        assert side.counters["disk_errors"] == 0
        # Nobody holds them any more: they are cache.
        assert [side.holds(number) for number in range(12)] == [True] * 12


async def test_nothing_is_written_while_there_is_room() -> None:
    async with disk_side(SLOTS, PLACES) as side:
        await side.put_slowly(range(SLOTS - AHEAD))
        assert side.counters["disk_blocks_written"] == 0
        await side.put_slowly([90])
        assert side.counters["disk_blocks_written"] == 1
        await side.put_slowly([91, 92, 93])
        assert side.counters["disk_blocks_written"] == AHEAD
        assert all(name_of(number) in side.tier.index for number in range(AHEAD))


async def test_the_order_in_which_memory_forgets_does_not_change() -> None:
    async with disk_side(SLOTS, PLACES) as side:
        await side.put_slowly(range(SLOTS))
        assert side.counters["disk_blocks_written"] == AHEAD
        assert side.store.next_out(SLOTS) == [(side.store.find(name_of(i)), name_of(i)) for i in range(SLOTS)]


async def test_a_block_on_disk_is_not_written_again() -> None:
    async with disk_side(SLOTS, PLACES) as side:
        await side.put_slowly(range(SLOTS * 2))
        for _ in range(3):
            await side.restore([0])
            await side.put_slowly(range(40, 40 + SLOTS))
        assert side.counters["disk_blocks_read"] == 3
        assert side.counters["disk_blocks_written"] <= SLOTS * 3


async def test_the_disk_forgets_what_memory_forgot_first() -> None:
    async with disk_side(SLOTS, 8) as side:
        await side.put_slowly(range(40))
        on_disk = [number for number in range(40) if name_of(number) in side.tier.index]
        assert len(on_disk) == 8
        # The oldest that are in memory, which leave it next, and the last that have left it.
        assert on_disk == list(range(40 - SLOTS + AHEAD - 8, 40 - SLOTS + AHEAD))


async def test_a_restored_block_outlives_the_others_on_disk() -> None:
    async with disk_side(SLOTS, 24) as side:
        await side.put_slowly(range(30))
        await side.restore([0])
        await side.put_slowly(range(40, 46))
        assert name_of(0) in side.tier.index
        assert name_of(1) not in side.tier.index


async def test_a_disk_smaller_than_what_leaves_next_is_not_written_in_circles() -> None:
    async with disk_side(SLOTS, 2) as side:
        await side.put_slowly(range(SLOTS))
        assert side.counters["disk_blocks_written"] == 2


async def test_gaps_are_filled_from_disk_and_end_at_the_first_block_that_is_nowhere() -> None:
    async with disk_side(SLOTS, PLACES) as side:
        await side.put_slowly(range(30))
        assert await side.restore([29, 0, 28, 1, 99, 2]) == [True, True, True, True, False, False]
        assert side.counters["disk_blocks_read"] == 2


async def test_the_last_block_may_have_another_name() -> None:
    async with disk_side(SLOTS, PLACES) as side:
        await side.put_slowly(range(30))
        async with side.restored([0, 99], or_last=1) as restored:
            assert restored == {side.store.find(name_of(0)), side.store.find(name_of(1))}
            assert side.holds(0)
            assert side.holds(1)
        async with side.restored([2, 98, 99], or_last=3):
            assert not side.holds(3)


async def test_inside_nothing_leaves_memory_again() -> None:
    async with disk_side(SLOTS, PLACES) as side:
        await side.put_slowly(range(30))
        async with side.restored([29, 0, 28]):
            side.store.release(side.store.reserve(SLOTS))
            assert [side.holds(number) for number in (29, 0, 28)] == [True] * 3


async def test_a_prompt_that_is_in_memory_costs_nothing() -> None:
    async with disk_side(SLOTS, PLACES) as side:
        await side.put_slowly(range(30))
        async with side.restored([29, 28, 99]) as restored:
            assert not restored
            assert side.store.usage().num_pinned == 0


async def test_a_store_in_use_restores_what_it_has_slots_for() -> None:
    async with disk_side(SLOTS, PLACES) as side:
        await side.put_slowly(range(40))
        busy = side.store.reserve(SLOTS - 2)
        assert await side.restore(range(10)) == [True] * 2 + [False] * 8
        more = side.store.reserve(2)
        assert await side.restore([0, 1]) == [False, False]
        side.store.release(busy + more)


async def test_what_follows_a_block_without_a_slot_is_not_held() -> None:
    async with disk_side(SLOTS, PLACES) as side:
        await side.put_slowly(range(40))
        assert side.holds(39)
        busy = side.store.reserve(SLOTS - 1)
        async with side.restored([0, 39]) as restored:
            assert not restored
            assert side.store.usage().num_pinned == 0
        side.store.release(busy)


async def test_two_requests_read_the_same_prefix_once() -> None:
    async with disk_side(SLOTS, PLACES) as side:
        await side.put_slowly(range(40))
        answers = await asyncio.gather(side.restore(range(6)), side.restore(range(4)), side.restore(range(6)))
        assert answers == [[True] * 6, [True] * 4, [True] * 6]
        assert side.counters["disk_blocks_read"] == 6


async def test_a_block_computed_meanwhile_is_kept_once() -> None:
    async with slow_side() as (side, readers):
        task = asyncio.create_task(side.restore([0]))
        await eventually(lambda: readers.waiting)
        side.put([0])
        readers.run_all()
        assert await task == [True]


# Errors.


async def test_a_corrupt_block_ends_the_restored_prefix_and_is_forgotten() -> None:
    async with disk_side(SLOTS, PLACES) as side:
        await side.put_slowly(range(40))
        block = side.tier.index.open(name_of(2))
        side.tier.index.close(block)
        side.file.corrupt([block.place])
        assert (await side.restore(range(5)))[:3] == [True, True, False]
        assert side.counters["disk_errors"] == 1
        assert name_of(2) not in side.tier.index
        assert side.tier.size_bytes


async def test_one_error_of_the_system_costs_one_block() -> None:
    async with disk_side(SLOTS, PLACES) as side:
        await side.put_slowly(range(40))
        side.file.num_failures = 1
        assert await side.restore([0]) == [False]
        assert await side.restore([1]) == [True]
        side.file.num_failures = MAX_FAILURES - 1
        await side.put_slowly(range(50, 60))
        assert side.counters["disk_errors"] == MAX_FAILURES
        assert side.tier.size_bytes
        written = side.counters["disk_blocks_written"]
        await side.put_slowly(range(60, 70))
        assert side.counters["disk_blocks_written"] > written


async def test_a_disk_that_fails_is_not_used_any_more() -> None:
    async with disk_side(SLOTS, PLACES) as side:
        await side.put_slowly(range(SLOTS))
        with capture_logs() as logs:
            side.file.num_failures = 1000
            await side.put_slowly(range(40, 60))
        assert [line["event"].split(",")[0] for line in logs] == [
            "the disk fails and is not used for KV blocks any more; replace it"
        ]
        assert "Input/output error" in logs[0]["error"]
        assert side.counters["disk_errors"] == MAX_FAILURES
        assert (side.tier.size_bytes, side.tier.num_blocks) == (0, 0)
        assert await side.restore(range(4)) == [False] * 4


async def test_an_error_that_nobody_foresaw_ends_the_use_of_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError("a mistake")

    async with disk_side(SLOTS, PLACES) as side:
        await side.put_slowly(range(40))
        monkeypatch.setattr(side.file, "read", fail)
        with capture_logs() as logs:
            assert await side.restore([0, 1]) == [False, False]
        assert [line["error"] for line in logs] == ["a mistake"]
        assert (side.tier.size_bytes, side.tier.num_blocks) == (0, 0)


async def test_what_is_written_over_during_the_write_is_not_kept() -> None:
    async with disk_side(SLOTS, PLACES, manual=True) as side:
        assert side.writers is not None
        side.put(range(SLOTS))
        await eventually(lambda: side.tier.num_writing == AHEAD)
        slot = side.write(50)  # That of block 15: the last of a prompt leaves first.
        await side.written()
        assert [name_of(SLOTS - i) in side.tier.index for i in range(1, AHEAD + 1)] == [False] + [True] * (AHEAD - 1)
        side.store.release([slot])


# Slow disks, and requests that do not wait for them.


async def test_a_block_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_reader, "STALL_S", 0.01)
    async with slow_side() as (side, readers):
        task = asyncio.create_task(side.restore([0, 1]))
        await eventually(lambda: readers.waiting)
        readers.begin()
        assert await task == [False, False]
        assert side.store.usage().num_reserved == 1
        readers.end()
        await eventually(lambda: not side.store.usage().num_reserved)
        assert side.holds(0)


async def test_a_request_cancelled_before_its_reads_begin_leaves_nothing() -> None:
    async with slow_side() as (side, readers):
        task = asyncio.create_task(side.restore([0, 1]))
        await eventually(lambda: readers.waiting)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert side.store.usage().num_reserved == 0
        readers.run_all()


async def test_a_slot_that_a_thread_writes_to_stays_reserved_until_it_is_done() -> None:
    async with slow_side() as (side, readers):
        task = asyncio.create_task(side.restore([0, 1]))
        await eventually(lambda: readers.waiting)
        readers.begin()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert side.store.usage().num_reserved == 1
        readers.end()
        await eventually(lambda: side.holds(0))
        assert not side.holds(1)


async def test_the_others_go_on_when_one_of_them_is_cancelled() -> None:
    async with slow_side() as (side, readers):
        first, second = asyncio.create_task(side.restore([0])), asyncio.create_task(side.restore([0]))
        await eventually(lambda: readers.waiting)
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        readers.run_all()
        assert await second == [True]


async def test_a_place_that_is_read_is_not_written() -> None:
    async with disk_side(SLOTS, 4, manual=True) as side:
        readers, writers = side.readers, side.writers
        assert readers is not None
        assert writers is not None
        side.put(range(SLOTS))
        await side.written()
        side.store.release(side.store.reserve(4))
        task = asyncio.create_task(side.restore([SLOTS - 1]))
        await eventually(lambda: readers.waiting)
        for number in range(50, 60):
            side.put([number])
            await asyncio.sleep(0)
            writers.run_all()
            await eventually(lambda: not side.tier.num_writing)
        assert side.counters["disk_blocks_written"] > 8
        assert len(readers.waiting) == 1
        readers.run_all()
        assert await task == [True]


async def test_closing_in_the_middle_leaves_no_request_waiting() -> None:
    async with slow_side() as (side, readers):
        task = asyncio.create_task(side.restore([0, 1]))
        await eventually(lambda: readers.waiting)
        readers.begin()
        await side.tier.close()
        assert await task == [True, False]
