"""A push that is over holds nothing, however long its peer takes to hear of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvrelay.kv_transfer.push_server import PushServer
from kvrelay.v1 import kv_transfer_pb2
from tests.support.eventually import eventually
from tests.support.kv_pair import kv_server, open_peers, push_of, side, whole

NUM_BLOCKS = 40


async def test_a_push_that_failed_pins_nothing_while_its_commit_is_not_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    came, go_on = threading.Event(), threading.Event()

    class Waiting(PushServer):
        def push(self, frames: Iterator[bytes], context: Any) -> Iterator[kv_transfer_pb2.FrameAcks]:
            def held() -> Iterator[bytes]:
                for frame in frames:
                    came.set()
                    go_on.wait()
                    yield frame

            yield from super().push(held(), context)

    with side() as source, side() as receiver:
        async with kv_server(receiver.receiver, Waiting) as server, open_peers() as peers:
            peer = peers.get(server.address)
            committed, answered = asyncio.Event(), asyncio.Event()

            async def slow_commit(_transfer_id: int) -> int:
                committed.set()
                await answered.wait()
                return 0

            monkeypatch.setattr(peer, "commit", slow_commit)
            push = push_of(source, peer, "r", range(NUM_BLOCKS))
            running = asyncio.create_task(push.run())
            for index, slot in enumerate(source.put(range(NUM_BLOCKS))):
                push.add(whole(index, slot))
            push.finish()
            await asyncio.to_thread(came.wait)
            receiver.receiver.let_go("r")
            go_on.set()
            async with asyncio.timeout(10):
                await committed.wait()
            assert source.store.usage().num_pinned == 0
            answered.set()
            assert "STATUS_STALE" in (await running).error
            await eventually(lambda: not peers.num_transfers)
