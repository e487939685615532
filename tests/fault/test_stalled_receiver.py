"""A receiver takes nothing for a while: nobody's memory grows by what waits, and other receivers lose no speed."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from tests.support.eventually import eventually
from tests.support.kv_child import KvChild, kv_child
from tests.support.kv_pair import SLOT_BYTES

pytestmark = pytest.mark.timeout(180)

STALL_S = 30.0
SHORT_S = 4.0
"""Longer than until frames are sent again, shorter than until a push is given up."""
SENDER_BLOCKS = (1 << 30) // SLOT_BYTES
PUSH_BLOCKS = 32
NUM_TIMED = 20
ROUND_BLOCKS = NUM_TIMED * PUSH_BLOCKS
NUM_QUEUED = 40
QUEUED_BLOCKS = NUM_QUEUED * PUSH_BLOCKS
"""320 MiB."""
MOST_SENDER_BYTES = 32 << 20
MOST_RECEIVER_BYTES = 160 << 20
"""gRPC's threads read ahead: 40 to 85 MiB were seen, whatever is queued."""
IDLE = {"num_reserved": 0, "num_pinned": 0, "num_transfers": 0}


class Growth:
    """The most private memory that a process was seen with, beyond what it had."""

    def __init__(self, child: KvChild) -> None:
        self._child = child
        self._before = child.private_bytes()
        self.num_bytes = 0

    def look(self) -> None:
        self.num_bytes = max(self.num_bytes, self._child.private_bytes() - self._before)


async def look_until(time_s: float, *growths: Growth) -> None:
    """Again and again until `time.monotonic()` says so."""

    def passed() -> bool:
        for growth in growths:
            growth.look()
        return time.monotonic() >= time_s

    await eventually(passed, timeout_s=STALL_S + 10)


async def test_a_process_that_stops_costs_neither_memory_nor_the_speed_of_others() -> None:
    """Its host still takes bytes for it, until that is full; connections to it break before it goes on."""
    async with (
        kv_child("sender", SENDER_BLOCKS) as sender,
        kv_child("receiver", ROUND_BLOCKS - PUSH_BLOCKS) as fast,
        kv_child("receiver", 2 * QUEUED_BLOCKS) as slow,
    ):
        to_fast, to_slow = await fast.ask("address"), await slow.ask("address")
        await sender.ask("time_pushes", address=to_slow, first=2 * QUEUED_BLOCKS, num_blocks=PUSH_BLOCKS, repeat=4)
        before_s = min([await _median_s(sender, to_fast, number) for number in range(3)])
        await sender.ask("offer", address=to_slow, first=0, num_blocks=PUSH_BLOCKS, repeat=NUM_QUEUED)
        growth = Growth(sender)
        slow.stop()
        began_s = time.monotonic()
        during_s = []
        for number in range(3):
            first = QUEUED_BLOCKS + number * 10 * PUSH_BLOCKS
            await sender.ask("feed", address=to_slow, first=first, num_blocks=PUSH_BLOCKS, repeat=10)
            during_s.append(await _median_s(sender, to_fast, number))
            await look_until(began_s + STALL_S * (number + 1) / 3, growth)
        results = await sender.ask("results")
        assert await sender.ask("status") == IDLE
        slow.go_on()
        print("before", before_s, "during", during_s, "s; grown by", growth.num_bytes >> 20, "MiB")
        assert len(results) == NUM_QUEUED + 30
        assert not any(num_blocks for num_blocks, _ in results[:NUM_QUEUED])
        assert growth.num_bytes < MOST_SENDER_BYTES
        assert min(during_s) < 1.5 * before_s
        await _answers_again(sender, to_slow)
        await slow.ask("check", first=0, num_blocks=QUEUED_BLOCKS)
        for child in (sender, fast, slow):
            await _idle(child)


async def test_frames_that_are_not_read_stay_with_the_sender_as_orders() -> None:
    """The connection lives and nobody reads from it: gRPC's flow control holds the sender's threads."""
    async with _queued() as queued:
        await queued.receiver.ask("shut")
        await queued.feed()
        await look_until(time.monotonic() + SHORT_S, queued.sender_growth, queued.receiver_growth)
        assert await queued.sender.ask("status") != IDLE
        await queued.receiver.ask("open")
        await queued.check()


async def test_a_slow_event_loop_lets_frames_in_without_holding_them() -> None:
    """Threads place them in slots; what the loop is told later is small."""
    async with _queued() as queued:
        assert await queued.receiver.ask("hold") == "held"
        await queued.feed()
        await look_until(time.monotonic() + SHORT_S, queued.sender_growth, queued.receiver_growth)
        await queued.receiver.release()
        await queued.check()


@dataclass(frozen=True, slots=True)
class _Queued:
    """Pushes that know what is wanted, and whose blocks are not ready."""

    sender: KvChild
    receiver: KvChild
    address: str
    sender_growth: Growth
    receiver_growth: Growth

    async def feed(self) -> None:
        await self.sender.ask("feed", address=self.address, first=0, num_blocks=PUSH_BLOCKS, repeat=0)

    async def check(self) -> None:
        """All of it arrives, and nobody's memory has grown by it."""
        assert await self.sender.ask("results") == [[PUSH_BLOCKS, ""]] * NUM_QUEUED
        assert await self.receiver.ask("check", first=0, num_blocks=QUEUED_BLOCKS) == QUEUED_BLOCKS
        for growth in (self.sender_growth, self.receiver_growth):
            growth.look()
        print("grown by", self.sender_growth.num_bytes >> 20, "and", self.receiver_growth.num_bytes >> 20, "MiB")
        assert self.sender_growth.num_bytes < MOST_SENDER_BYTES
        assert self.receiver_growth.num_bytes < MOST_RECEIVER_BYTES
        for child in (self.sender, self.receiver):
            await _idle(child)


@contextlib.asynccontextmanager
async def _queued() -> AsyncIterator[_Queued]:
    async with kv_child("sender", SENDER_BLOCKS) as sender, kv_child("receiver", 2 * QUEUED_BLOCKS) as receiver:
        address = await receiver.ask("address")
        await sender.ask("time_pushes", address=address, first=QUEUED_BLOCKS, num_blocks=PUSH_BLOCKS, repeat=40)
        await sender.ask("offer", address=address, first=0, num_blocks=PUSH_BLOCKS, repeat=NUM_QUEUED)
        yield _Queued(sender, receiver, address, Growth(sender), Growth(receiver))


async def _median_s(sender: KvChild, address: str, number: int) -> float:
    """Of the pushes of one round; the receiver has forgotten the blocks of the round before it."""
    seconds: list[float] = await sender.ask(
        "time_pushes", address=address, first=number * ROUND_BLOCKS, num_blocks=PUSH_BLOCKS, repeat=NUM_TIMED
    )
    return statistics.median(seconds)


async def _answers_again(sender: KvChild, address: str) -> None:
    """A push arrives, in the end: the first ones may meet what is left of the connections."""
    async with asyncio.timeout(20):
        for first in range(2 * QUEUED_BLOCKS + 4 * PUSH_BLOCKS, SENDER_BLOCKS):
            await sender.ask("feed", address=address, first=first, num_blocks=1, repeat=1)
            if await sender.ask("results") == [[1, ""]]:
                return


async def _idle(child: KvChild) -> None:
    async with asyncio.timeout(10):
        while await child.ask("status") != IDLE:
            continue
