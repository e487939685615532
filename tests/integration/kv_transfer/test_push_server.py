"""The server of frames ends with everything that it started."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator

import pytest

from kvrelay.kv_transfer.push_server import PushServer
from tests.support.eventually import eventually
from tests.support.kv_pair import kv_server, open_peers, push_of, side, whole


@pytest.fixture
def _no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
async def test_no_thread_outlives_it_until_garbage_is_collected() -> None:
    with side() as source, side() as receiver:
        async with kv_server(receiver.receiver) as server, open_peers() as peers:
            push = push_of(source, peers.get(server.address), "r", [1])
            push.add(whole(0, *source.put([1])))
            push.finish()
            assert (await push.run()).num_blocks == 1
            receiver.receiver.let_go("r")
    await eventually(lambda: not _threads(), "its threads end")


async def test_it_may_be_stopped_twice_or_before_it_starts() -> None:
    with side() as receiver:
        server = PushServer(receiver.receiver)
        server.stop()
        server.start("127.0.0.1:0")
        for _ in range(2):
            await asyncio.to_thread(server.stop)
    assert not _threads()


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-")]
