"""What waits to be sent to one coordinator, in messages of bearable size, and how much may wait?"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

from kvrelay.heartbeat import LARGE_MESSAGE_BYTES
from kvrelay.v1 import worker_pb2

MAX_STEP_BYTES = 4 << 20
"""Of one StepOutputs, unless a single delta is larger: others are not held up by a message of seconds."""
MAX_WAITING_BYTES = 64 << 20
"""A coordinator that has so much to read does not read."""

Write = Callable[[worker_pb2.WorkerMessage], Awaitable[None]]


class OutboxFullError(Exception):
    """The coordinator does not read what it is sent."""


class Outbox:
    """Deltas and other messages, each kind in its order, the deltas first.

    Whatever is there when the stream takes more goes out together: the tokens of an engine step travel in one message,
    and a slow coordinator gets larger ones, not more of them.

    Large messages are announced: until one has come the coordinator hears nothing else.

    Adding never waits and never fails: `run` does, when `max_waiting_bytes` wait and more is added.
    """

    def __init__(self, *, max_waiting_bytes: int = MAX_WAITING_BYTES, max_step_bytes: int = MAX_STEP_BYTES) -> None:
        self._max_waiting_bytes = max_waiting_bytes
        self._max_step_bytes = max_step_bytes
        self._deltas: list[tuple[worker_pb2.TokenDelta, int]] = []
        """Each with its size."""
        self._others: list[worker_pb2.WorkerMessage] = []
        self._filled = asyncio.Event()
        self._full = asyncio.Event()
        self.num_bytes = 0
        """Waiting, what is being written included."""

    def add_delta(self, delta: worker_pb2.TokenDelta) -> None:
        num_bytes = delta.ByteSize()
        if self._has_room_for(num_bytes):
            self._deltas.append((delta, num_bytes))

    def post(self, message: worker_pb2.WorkerMessage) -> None:
        if self._has_room_for(message.ByteSize()):
            self._others.append(message)

    def _has_room_for(self, num_bytes: int) -> bool:
        if self.num_bytes >= self._max_waiting_bytes:
            self._full.set()
            return False
        self.num_bytes += num_bytes
        self._filled.set()
        return True

    async def run(self, write: Write) -> None:
        """Write everything that is added, until cancelled. Raises what `write` raises, and `OutboxFullError`."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write(write))
            await self._full.wait()
            raise OutboxFullError(
                f"the coordinator does not read: {self.num_bytes} bytes wait, and {self._max_waiting_bytes} are allowed"
            )

    async def _write(self, write: Write) -> None:
        while True:
            await self._filled.wait()
            self._filled.clear()
            deltas, self._deltas = self._deltas, []
            others, self._others = self._others, []
            for part, num_bytes in self._parts(deltas):
                if num_bytes > LARGE_MESSAGE_BYTES:
                    await write(worker_pb2.WorkerMessage(heartbeat=worker_pb2.Heartbeat(next_message_bytes=num_bytes)))
                await write(worker_pb2.WorkerMessage(step=worker_pb2.StepOutputs(deltas=part)))
                self.num_bytes -= num_bytes
            for message in others:
                await write(message)
                self.num_bytes -= message.ByteSize()

    def _parts(
        self, deltas: list[tuple[worker_pb2.TokenDelta, int]]
    ) -> Iterator[tuple[list[worker_pb2.TokenDelta], int]]:
        """The deltas in order, with their size: each part under the limit or of one delta."""
        part: list[worker_pb2.TokenDelta] = []
        num_bytes = 0
        for delta, delta_bytes in deltas:
            if part and num_bytes + delta_bytes > self._max_step_bytes:
                yield part, num_bytes
                part, num_bytes = [], 0
            part.append(delta)
            num_bytes += delta_bytes
        if part:
            yield part, num_bytes
