"""Stands in for a GPU and for NCCL: what is queued on streams runs when somebody asks for an event.

NCCL's own stream runs only when the others can do no more, so that work that does not wait for it is seen to come too
early.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

_Work = Callable[[], bool]
"""Does it and returns true, or returns false when something that it waits for is not over."""


class Stream:
    """Work in order."""

    def __init__(self) -> None:
        self._queue: deque[_Work] = deque()

    def put(self, work: _Work) -> None:
        self._queue.append(work)

    def mark(self) -> Callable[[], bool]:
        """Says whether everything so far is over."""
        is_reached = False

        def reach() -> bool:
            nonlocal is_reached
            is_reached = True
            return True

        self.put(reach)
        return lambda: is_reached

    def run(self) -> bool:
        """As far as possible; whether anything was."""
        has_run = False
        while self._queue and self._queue[0]():
            self._queue.popleft()
            has_run = True
        return has_run


class Gpu:
    """Of one process. `torch` is what that process takes for torch; `pause` keeps everything from running."""

    def __init__(self) -> None:
        self.paused = False
        self.error = ""
        """What the device answers to every question from now on."""
        self.free_bytes = 1 << 20
        self.asked = threading.Event()
        """Set when somebody asks how far the device is."""
        self.nccl = Stream()
        self.streams: list[Stream] = []
        self.current: Stream | None = None
        self.torch = SimpleNamespace(
            uint8=np.uint8,
            device=lambda kind, index: (kind, index),
            empty=self._empty,
            cuda=SimpleNamespace(Stream=self._stream, Event=lambda: Event(self), stream=self._use),
        )

    def _stream(self, _device: Any) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    @contextlib.contextmanager
    def _use(self, stream: Stream) -> Iterator[None]:
        self.current = stream
        try:
            yield
        finally:
            self.current = None

    def _empty(self, num_bytes: int, *, dtype: Any, device: Any = None, pin_memory: bool = False) -> Buffer:
        assert pin_memory or device
        if device:
            if num_bytes > self.free_bytes:
                raise RuntimeError("CUDA out of memory")
            self.free_bytes -= num_bytes
        return Buffer(self, np.zeros(num_bytes, dtype))

    def side(self) -> Stream:
        """The stream that work is queued on, which must not be the engine's."""
        assert self.current is not None, "queued on the default stream"
        return self.current

    def run(self) -> None:
        """All streams as far as they can, or else NCCL's."""
        if not self.paused and not sum(stream.run() for stream in self.streams):
            self.nccl.run()


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._reached: Callable[[], bool] = bool

    def record(self, stream: Stream) -> None:
        self._reached = stream.mark()

    def query(self) -> bool:
        if self._gpu.error:
            raise RuntimeError(self._gpu.error)
        self._gpu.asked.set()
        self._gpu.run()
        return self._reached()


class Buffer:
    """A tensor of bytes."""

    def __init__(self, gpu: Gpu, array: npt.NDArray[np.uint8]) -> None:
        self._gpu = gpu
        self.array = array

    def __getitem__(self, index: slice) -> Buffer:
        return Buffer(self._gpu, self.array[index])

    def numpy(self) -> npt.NDArray[np.uint8]:
        return self.array

    def copy_(self, source: Buffer, *, non_blocking: bool) -> None:
        assert non_blocking, "the host would wait"

        def copy() -> bool:
            self.array[:] = source.array
            return True

        self._gpu.side().put(copy)


class NcclStandIn:
    """One end of a group: like `ProcessGroupNCCL`, on a stream of its own; the caller's waits for it when it is told.

    `wire`: what has been sent and not received, of both ends.
    """

    def __init__(self, gpu: Gpu, wire: deque[bytes], fails: bool = False) -> None:
        """With `fails` no message can be begun."""
        self._gpu = gpu
        self._fails = fails
        self._wire = wire
        self.environment = dict(os.environ)
        self.num_aborts = 0

    def send(self, tensors: list[Buffer], _rank: int, _tag: int) -> Any:
        def send() -> None:
            self._wire.append(tensors[0].array.tobytes())

        return self._begin(send, lambda: True)

    def recv(self, tensors: list[Buffer], _rank: int, _tag: int) -> Any:
        def receive() -> None:
            tensors[0].array[:] = np.frombuffer(self._wire.popleft(), np.uint8)

        return self._begin(receive, lambda: bool(self._wire))

    def _begin(self, act: Callable[[], None], can_act: Callable[[], bool]) -> Any:
        if self._fails:
            raise RuntimeError("NCCL: unhandled system error")
        caller = self._gpu.side()
        is_due = caller.mark()

        def work() -> bool:
            if not (is_due() and can_act()):
                return False
            act()
            return True

        self._gpu.nccl.put(work)
        is_over = self._gpu.nccl.mark()
        return SimpleNamespace(wait=lambda: caller.put(is_over))

    def abort(self) -> None:
        self.num_aborts += 1
