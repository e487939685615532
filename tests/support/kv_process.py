"""One side of a transfer in a process of its own: `python -m tests.support.kv_process sender|receiver`.

It answers commands, a JSON line each, with a JSON line; the end of the input ends it. See `kv_child` for the other end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from kvrelay import logs
from kvrelay.kv_transfer.peer import Peers
from kvrelay.kv_transfer.push_server import PushServer
from kvrelay.kv_transfer.receiver import Receiver
from kvrelay.kv_transfer.sender import Push, PushResult
from kvrelay.v1 import kv_transfer_pb2
from tests.support.eventually import eventually
from tests.support.kv_pair import Side, kv_server, make_layout, push_of, side, whole

_SETTLE_S = 10.0


class Process(ABC):
    """Commands are the names of methods."""

    @abstractmethod
    async def run(self) -> None:
        """Until the end of the input."""

    async def _serve(self) -> None:
        commands = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
        while line := await commands.readline():
            if not line.strip():
                continue
            name, arguments = json.loads(line)
            print(json.dumps(await getattr(self, name)(**arguments)), flush=True)


class SenderProcess(Process):
    """Holds blocks `0..num_blocks`, all of its store."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._peers = Peers(make_layout())
        self._slots: list[int] = []
        self._open: list[tuple[Push, list[int]]] = []
        self._running: list[asyncio.Task[PushResult]] = []
        self._num_pushes = 0

    async def run(self) -> None:
        with side(self._num_blocks) as self._side:
            self._slots = self._side.put(range(self._num_blocks))
            self._side.store.unpin(self._slots)
            try:
                await self._serve()
            finally:
                await self._peers.close()

    async def time_pushes(self, address: str, first: int, num_blocks: int, repeat: int) -> list[float]:
        """Seconds of each of several pushes of so many blocks, one after the other."""
        seconds = []
        for start in range(first, first + num_blocks * repeat, num_blocks):
            push = self._push(address, range(start, start + num_blocks))
            self._feed(push, range(start, start + num_blocks))
            began_s = time.perf_counter()
            result = await push.run()
            seconds.append(time.perf_counter() - began_s)
            assert (result.error, result.num_bytes) == ("", num_blocks * self._side.segment.slot_bytes), result
        return seconds

    async def offer(self, address: str, first: int, num_blocks: int, repeat: int) -> None:
        """Begin several pushes, and wait until they know what is wanted; their blocks are not ready yet."""
        before = self._peers.num_transfers
        self.begin(address, first, num_blocks, repeat)
        await eventually(lambda: self._peers.num_transfers == before + repeat, "all offers are answered")

    def begin(self, address: str, first: int, num_blocks: int, repeat: int) -> None:
        for start in range(first, first + num_blocks * repeat, num_blocks):
            numbers = list(range(start, start + num_blocks))
            push = self._push(address, numbers)
            self._open.append((push, numbers))
            self._running.append(asyncio.create_task(push.run()))

    async def feed(self, address: str, first: int, num_blocks: int, repeat: int) -> None:
        """The blocks of the pushes that were begun are ready; begin more of them, fed as well."""
        self.begin(address, first, num_blocks, repeat)
        for push, numbers in self._open:
            self._feed(push, numbers)
        self._open.clear()

    async def results(self) -> list[tuple[int, str]]:
        """Of all pushes that were begun, once they are over: blocks that arrived, and the error."""
        results = await asyncio.gather(*self._running)
        self._running.clear()
        return [(result.num_blocks, result.error) for result in results]

    async def status(self) -> dict[str, int]:
        return {**_usage(self._side), "num_transfers": self._peers.num_transfers}

    def _push(self, address: str, numbers: Sequence[int]) -> Push:
        self._num_pushes += 1
        return push_of(self._side, self._peers.get(address), f"r{self._num_pushes}", numbers)

    def _feed(self, push: Push, numbers: Sequence[int]) -> None:
        self._side.store.pin(self._slots[number] for number in numbers)
        for index, number in enumerate(numbers):
            push.add(whole(index, self._slots[number]))
        push.finish()


class _GatedPushServer(PushServer):
    """Takes frames only while `is_open` is set."""

    is_open = threading.Event()

    def push(self, frames: Iterator[bytes], context: Any) -> Iterator[kv_transfer_pb2.FrameAcks]:
        def gated() -> Iterator[bytes]:
            for frame in frames:
                self.is_open.wait()
                yield frame

        yield from super().push(gated(), context)


class ReceiverProcess(Process):
    """Lets go of each transfer as soon as nothing more of it is coming."""

    def __init__(self, num_slots: int) -> None:
        _GatedPushServer.is_open.set()
        self._num_slots = num_slots
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        with side(self._num_slots) as self._side:
            async with kv_server(self._side.receiver, _GatedPushServer) as server:
                self._address = server.address
                self._follow(self._side.receiver)
                await self._serve()
                for task in self._tasks:
                    task.cancel()

    def _follow(self, receiver: Receiver) -> None:
        """As a decode worker does: wait for the transfer of each offer, and let go of it."""
        offer = receiver.offer

        def followed(request_id: str, *args: Any, **values: Any) -> Any:
            task = asyncio.create_task(self._let_go(request_id))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return offer(request_id, *args, **values)

        receiver.offer = followed  # type: ignore[method-assign]

    async def _let_go(self, request_id: str) -> None:
        await self._side.receiver.wait_settled(request_id, _SETTLE_S)
        self._side.receiver.let_go(request_id)

    async def address(self) -> str:
        return self._address

    async def shut(self) -> None:
        """No frame is taken; the event loop goes on."""
        _GatedPushServer.is_open.clear()

    async def open(self) -> None:
        _GatedPushServer.is_open.set()

    async def hold(self) -> None:
        """The event loop does nothing from its first answer until an empty line comes, and answers again."""
        print(json.dumps("held"), flush=True)
        select.select([sys.stdin], [], [])

    async def check(self, first: int, num_blocks: int) -> int:
        """How many of these blocks are there; fails when one has another content."""
        return sum(self._side.holds(number) for number in range(first, first + num_blocks))

    async def status(self) -> dict[str, int]:
        return {**_usage(self._side), "num_transfers": self._side.receiver.num_transfers}


def _usage(of: Side) -> dict[str, int]:
    usage = of.store.usage()
    return {"num_reserved": usage.num_reserved, "num_pinned": usage.num_pinned}


def main() -> None:
    kinds: dict[str, type[SenderProcess | ReceiverProcess]] = {"sender": SenderProcess, "receiver": ReceiverProcess}
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(kinds[sys.argv[1]](int(sys.argv[2])).run())


if __name__ == "__main__":
    logs.configure()  # To stderr: what is printed is read.
    main()
