"""One side of collective transfers as a process of its own, to be killed: `python -m tests.support.collective_child`.

Without an argument it receives, and prints its address. With the address of a receiver it builds a group with it, sends
the first of two blocks through that, and prints `half`. Either way it lives until the end of its input.
"""

from __future__ import annotations

import asyncio
import sys

from kvrelay import logs
from tests.support.collective_pair import FaultyCollectives, receiving, sending
from tests.support.eventually import eventually
from tests.support.kv_pair import push_of, whole


async def _receive() -> None:
    async with receiving() as to:
        print(to.server.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        for request_id in list(to.side.receiver._by_request):
            to.side.receiver.let_go(request_id)


async def _send(address: str) -> None:
    async with sending(FaultyCollectives()) as worker:
        peer = worker.peers.get(address)
        assert not (await worker.push(peer, "first", [1]).run()).error
        await eventually(lambda: peer.collecting.is_ready)
        push = push_of(worker.side, peer, "second", [2, 3])
        [slot] = worker.side.put([2])
        push.add(whole(0, slot))
        running = asyncio.create_task(push.run())
        await eventually(lambda: push.result.num_blocks)
        print("half", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        running.cancel()


if __name__ == "__main__":
    logs.configure()  # To stderr: what is printed is read.
    asyncio.run(_send(sys.argv[1]) if len(sys.argv) > 1 else _receive())
