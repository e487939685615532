"""How does the run get between two processes? Through a TCP proxy at each address that they are told."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable

_CHUNK_BYTES = 64 << 10
_MAX_QUEUED_CHUNKS = 32
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Harm:
    """What is done to all that passes a link, as long as it is imposed. Does nothing by itself."""

    holds = False
    """Bytes wait in the proxy, and connections stay open."""
    delay_s = 0.0
    """Added to the time that bytes are under way."""

    def __init__(self) -> None:
        self.touches: Callable[[Connection], bool] = lambda _: True

    def stall_s(self) -> float:
        """How long this chunk, and all behind it, comes late."""
        return 0.0

    def change(self, data: bytes) -> bytes:
        """What arrives of bytes on their way to the one who listens."""
        return data


class Partition(Harm):
    """Nothing passes."""

    holds = True


class Delay(Harm):
    """Everything comes so much later, in the same order."""

    def __init__(self, delay_s: float) -> None:
        super().__init__()
        self.delay_s = delay_s


class Lossy(Harm):
    """Packets are lost, and what is sent again comes late, with all that is behind it."""

    def __init__(self, rng: random.Random, *, rate: float = 0.05, retransmission_s: float = 0.3) -> None:
        super().__init__()
        self._rng = rng
        self._rate = rate
        self._retransmission_s = retransmission_s

    def stall_s(self) -> float:
        lost = self._rng.random() < self._rate
        return self._retransmission_s * self._rng.uniform(0.7, 2.0) if lost else 0.0


class Corruption(Harm):
    """One bit of a chunk is another one, now and then."""

    def __init__(self, rng: random.Random, *, rate: float = 0.1) -> None:
        super().__init__()
        self._rng = rng
        self._rate = rate

    def change(self, data: bytes) -> bytes:
        if self._rng.random() >= self._rate:
            return data
        place = self._rng.randrange(len(data))
        return data[:place] + bytes([data[place] ^ 1 << self._rng.randrange(8)]) + data[place + 1 :]


class Connection:
    """One connection through the proxy: to the side that dialled, and to the one that listens."""

    def __init__(self, number: int, to_dialler: asyncio.StreamWriter, to_listener: asyncio.StreamWriter) -> None:
        self.number = number
        self.may_pass = asyncio.Event()
        self._writers = to_dialler, to_listener

    def reset(self) -> None:
        """Both sides get an RST."""
        for writer in self._writers:
            connection: socket.socket = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()

    def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


class Link:
    """Passes bytes on to `target`, host:port, which need not listen all the time. Made by `open_link`."""

    def __init__(self, name: str, target: str) -> None:
        self.name = name
        self.target = target
        self.address = ""
        self.num_bytes: Counter[str] = Counter()
        self.connections: dict[int, Connection] = {}
        self._num_connections = 0
        self._harms: list[Harm] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def impose(self, harm: Harm) -> None:
        """From now on, until `lift`."""
        self._harms.append(harm)
        self._open_or_hold()

    def lift(self, harm: Harm) -> None:
        """What waited for it passes."""
        self._harms.remove(harm)
        self._open_or_hold()

    def reset(self) -> int:
        """Break all connections of this moment; returns how many."""
        connections = list(self.connections.values())
        for connection in connections:
            connection.reset()
        return len(connections)

    def _open_or_hold(self) -> None:
        for connection in self.connections.values():
            if any(harm.holds and harm.touches(connection) for harm in self._harms):
                connection.may_pass.clear()
            else:
                connection.may_pass.set()

    def accept(self, from_dialler: asyncio.StreamReader, to_dialler: asyncio.StreamWriter) -> None:
        """Serve a new connection."""
        task = asyncio.get_running_loop().create_task(self._serve(from_dialler, to_dialler), name=self.name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, from_dialler: asyncio.StreamReader, to_dialler: asyncio.StreamWriter) -> None:
        """One connection, until either side is gone."""
        try:
            host, port = self.target.rsplit(":", 1)
            from_listener, to_listener = await asyncio.open_connection(host, int(port))
        except OSError:
            to_dialler.transport.abort()
            return
        self._num_connections += 1
        connection = Connection(self._num_connections, to_dialler, to_listener)
        self.connections[connection.number] = connection
        self._open_or_hold()
        try:
            with contextlib.suppress(OSError):
                await self._both_ways(connection, (from_dialler, to_listener), (from_listener, to_dialler))
        finally:
            del self.connections[connection.number]
            connection.close()

    async def _both_ways(
        self,
        connection: Connection,
        there: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        back: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        """Until one side has closed and all that it sent before is passed on."""
        ways = [
            asyncio.create_task(self._pass(connection, *there, is_back=False)),
            asyncio.create_task(self._pass(connection, *back, is_back=True)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pass(
        self, connection: Connection, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, is_back: bool
    ) -> None:
        """In one direction. A task reads ahead, so that a delay costs no throughput."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MAX_QUEUED_CHUNKS)
        loop = asyncio.get_running_loop()
        reading = asyncio.create_task(self._read(source, queue, is_back=is_back))
        try:
            while True:
                due_s, data = await queue.get()
                if (early_s := due_s - loop.time()) > 0:
                    await asyncio.sleep(early_s)
                await connection.may_pass.wait()
                if not data:
                    return
                sink.write(data)
                await sink.drain()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(
        self, source: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]], *, is_back: bool
    ) -> None:
        """Into the queue with the time when it is due; an empty chunk is the end."""
        loop = asyncio.get_running_loop()
        data, due_s = b"-", 0.0
        while data:
            try:
                data = await source.read(_CHUNK_BYTES)
            except OSError:
                data = b""
            self.num_bytes["back" if is_back else "there"] += len(data)
            late_s = sum(harm.delay_s + harm.stall_s() for harm in self._harms)
            due_s = max(due_s, loop.time() + late_s)
            if data and not is_back:
                for harm in self._harms:
                    data = harm.change(data)
            await queue.put((due_s, data))

    async def end(self) -> None:
        """Close all connections."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def open_link(name: str, target: str) -> AsyncIterator[Link]:
    """A link at an address of its own; no connection is left at the end."""
    link = Link(name, target)
    server = await asyncio.start_server(link.accept, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    link.address = f"{host}:{port}"
    try:
        yield link
    finally:
        server.close()
        await link.end()
