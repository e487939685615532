"""What waits goes out in order, in messages of bearable size, and does not grow without end."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.v1 import worker_pb2
from kvrelay.worker.outbox import Outbox, OutboxFullError
from tests.support.eventually import eventually


def delta(num_tokens: int, request_id: str = "r") -> worker_pb2.TokenDelta:
    return worker_pb2.TokenDelta(request_id=request_id, token_ids=[1] * num_tokens)


async def written(
    outbox: Outbox, is_over: Callable[[list[worker_pb2.WorkerMessage]], bool]
) -> list[worker_pb2.WorkerMessage]:
    """What it writes until then."""
    messages: list[worker_pb2.WorkerMessage] = []

    async def write(message: worker_pb2.WorkerMessage) -> None:
        messages.append(message)

    running = asyncio.create_task(outbox.run(write))
    await eventually(lambda: is_over(messages))
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    return messages


@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=40))
async def test_no_message_is_over_the_limit_but_for_one_delta_and_none_is_needless(sizes: list[int]) -> None:
    outbox = Outbox(max_step_bytes=100)
    deltas = [delta(size * 2, str(i)) for i, size in enumerate(sizes)]
    for each in deltas:
        outbox.add_delta(each)
    messages = await written(outbox, lambda messages: sum(len(m.step.deltas) for m in messages) == len(deltas))
    assert [each for message in messages for each in message.step.deltas] == deltas
    parts = [[each.ByteSize() for each in message.step.deltas] for message in messages]
    assert all(len(part) == 1 or sum(part) <= 100 for part in parts)
    assert all(sum(part) + following[0] > 100 for part, following in itertools.pairwise(parts))
    assert outbox.num_bytes == 0


async def test_it_ends_when_nobody_reads() -> None:
    outbox = Outbox(max_waiting_bytes=1000)
    stuck = asyncio.Event()

    async def write(_: worker_pb2.WorkerMessage) -> None:
        stuck.set()
        await asyncio.Event().wait()

    running = asyncio.create_task(outbox.run(write))
    outbox.add_delta(delta(10))
    await stuck.wait()
    while outbox.num_bytes < 1000:
        outbox.add_delta(delta(100))
    assert not running.done()
    kept = outbox.num_bytes
    outbox.post(worker_pb2.WorkerMessage(failed=worker_pb2.RequestFailed(request_id="r")))
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.timeout(10):
            await running
    assert caught.group_contains(OutboxFullError, match=f"does not read: {kept} bytes wait, and 1000 are allowed")
    assert outbox.num_bytes == kept


async def test_what_was_read_does_not_count() -> None:
    outbox = Outbox(max_waiting_bytes=1000)
    for _ in range(20):
        outbox.add_delta(delta(900))
        await written(outbox, lambda messages: bool(messages))
        assert outbox.num_bytes == 0
