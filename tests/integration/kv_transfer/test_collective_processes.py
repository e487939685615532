"""A worker that is killed breaks the groups that it is in, and no others."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator

import pytest

from tests.support.collective_pair import BACKENDS, Sending, group_threads, receiving, sending
from tests.support.eventually import eventually
from tests.support.kv_pair import SLOT_BYTES, push_of, whole

pytestmark = pytest.mark.skipif(not BACKENDS, reason="torch has no gloo here")


@contextlib.asynccontextmanager
async def child(*arguments: str) -> AsyncIterator[tuple[Process, str]]:
    """A `collective_child`, and the line that it prints when it is where it shall be."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.collective_child", *arguments, stdin=PIPE, stdout=PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process, (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()
        process.stdin.close()
        await asyncio.wait_for(process.wait(), 20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _meet(worker: Sending, address: str, number: int) -> None:
    peer = worker.peers.get(address)
    assert (await worker.push(peer, f"meet-{number}", [number]).run()).transport == "grpc"
    await eventually(lambda: peer.collecting.is_ready)


async def test_a_killed_receiver_breaks_its_own_group_only() -> None:
    async with child() as (victim, victim_address), child() as (_, other_address), sending() as worker:
        await _meet(worker, victim_address, 1000)
        await _meet(worker, other_address, 1001)
        pushes = [push_of(worker.side, worker.peers.get(a), "r", range(20)) for a in (victim_address, other_address)]
        slots = worker.side.put(range(20))
        worker.side.store.pin(slots)
        running = [asyncio.create_task(push.run()) for push in pushes]
        for push in pushes:
            for index in range(10):
                push.add(whole(index, slots[index]))
        await eventually(lambda: all(push.result.num_blocks == 10 for push in pushes))
        victim.kill()
        await victim.wait()
        for push in pushes:
            for index in range(10, 20):
                push.add(whole(index, slots[index]))
            push.finish()
        broken, whole_result = await asyncio.wait_for(asyncio.gather(*running), 10)
        assert broken.error
        assert broken.num_blocks == 10
        assert (whole_result.num_blocks, whole_result.transport, whole_result.error) == (20, "gloo", "")
        assert worker.counters["collective_fallbacks"] == 1
        assert (await worker.push(worker.peers.get(other_address), "s", [100]).run()).transport == "gloo"
    await eventually(lambda: not group_threads())


async def test_whoever_waits_for_a_killed_sender_computes_the_rest_at_once() -> None:
    async with receiving() as to:
        async with child(to.server.address) as (victim, said):
            assert said == "half"
            to.side.receiver.let_go("first")
            waiting = asyncio.create_task(to.side.receiver.wait_settled("second", 30))
            began = time.monotonic()
            victim.kill()
            transfer = await waiting
            assert time.monotonic() - began < 5
            assert transfer is not None
            assert transfer.settled
            assert (transfer.received_blocks, transfer.received_bytes) == (1, SLOT_BYTES)
        to.side.receiver.let_go("second")
    await eventually(lambda: not group_threads())
