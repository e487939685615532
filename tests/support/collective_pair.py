"""Senders and receivers in one process, with real gloo groups between them that can be made to fail."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrelay.kv_transfer.collective_group import CollectiveConfig, Group, Staging, Transit
from kvrelay.kv_transfer.collectives import Collectives, usable_backends
from kvrelay.kv_transfer.peer import Peer, Peers
from kvrelay.kv_transfer.sender import Push, PushResult
from kvrelay.kv_transfer.transport import KvTransport
from tests.support.eventually import eventually
from tests.support.kv_pair import KvServer, Side, kv_server, open_peers, push_of, side, whole

BACKENDS = usable_backends(KvTransport.COLLECTIVE)
_numbers = itertools.count(10_000)
_THREADS = ("gloo", "pt_gloo", "pt_tcpstore", "kv-Collect", "kv-collect")


class Wrapped(Group):
    """A group as it is; tests override what shall go wrong."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def staging(self, num_bytes: int) -> Staging:
        return self.group.staging(num_bytes)

    def send(self, staging: Staging, num_bytes: int) -> Transit:
        return self.group.send(staging, num_bytes)

    def recv(self, staging: Staging, num_bytes: int) -> Transit:
        return self.group.recv(staging, num_bytes)

    def abort(self) -> None:
        self.group.abort()

    def close(self) -> None:
        self.group.close()


class FaultyCollectives(Collectives):
    """Its groups pass through `wrap`."""

    def __init__(self, wrap: Callable[[Group], Group] = lambda group: group, **config: Any) -> None:
        super().__init__(BACKENDS, CollectiveConfig(**config))
        self.wrap = wrap

    @contextlib.contextmanager
    def as_sender(self, *args: Any) -> Iterator[Group]:
        with super().as_sender(*args) as group:
            yield self.wrap(group)

    @contextlib.contextmanager
    def as_receiver(self, *args: Any) -> Iterator[Group]:
        with super().as_receiver(*args) as group:
            yield self.wrap(group)


@dataclass(slots=True)
class Sending:
    """A worker that sends."""

    side: Side
    peers: Peers
    counters: Counter[str]

    def push(self, peer: Peer, request_id: str, numbers: Sequence[int]) -> Push:
        """A push of blocks that are all ready."""
        push = push_of(self.side, peer, request_id, numbers)
        for index, slot in enumerate(self.side.put(numbers)):
            push.add(whole(index, slot))
        push.finish()
        return push

    async def send(self, to: Receiving, request_id: str, numbers: Sequence[int]) -> PushResult:
        """All blocks, which must arrive with their content."""
        result = await self.push(self.peer(to), request_id, numbers).run()
        assert (result.num_blocks, result.num_missing_blocks, result.error) == (len(numbers), 0, ""), result
        assert all(to.side.holds(number) for number in numbers)
        to.side.receiver.let_go(request_id)
        return result

    def peer(self, to: Receiving) -> Peer:
        return self.peers.get(to.server.address)

    async def meet(self, to: Receiving) -> Peer:
        """Build the group; the block that it is built for goes by gRPC."""
        number = next(_numbers)
        result = await self.send(to, f"meet-{number}", [number])
        assert result.transport == "grpc"
        peer = self.peer(to)
        await eventually(lambda: peer.collecting.is_ready, "the group is there")
        return peer


@dataclass(slots=True)
class Receiving:
    """A worker that receives."""

    side: Side
    server: KvServer
    collectives: Collectives


@contextlib.asynccontextmanager
async def receiving(collectives: Collectives | None = None) -> AsyncIterator[Receiving]:
    collectives = collectives or FaultyCollectives()
    with side() as receiver:
        async with kv_server(receiver.receiver, collectives=collectives) as server:
            yield Receiving(receiver, server, collectives)


@contextlib.asynccontextmanager
async def sending(collectives: Collectives | None = None) -> AsyncIterator[Sending]:
    """Nothing of any group is left in this process at the end."""
    collectives, counters = collectives or FaultyCollectives(), Counter[str]()
    with side() as sender:
        async with open_peers(collectives=collectives, counters=counters) as peers:
            yield Sending(sender, peers, counters)
        collectives.close()


def group_threads() -> list[str]:
    """Threads of groups, gloo's own included."""
    names = [thread.name for thread in threading.enumerate()]
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            names.append(Path(f"/proc/self/task/{task}/comm").read_text().strip())
    return [name for name in names if name.startswith(_THREADS)]
