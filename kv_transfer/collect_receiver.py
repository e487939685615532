"""How do blocks come in through a process group? One thread posts receives as runs are told, one places what came."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import structlog

from kvrelay.kv_transfer.collective_group import NUM_STAGINGS, RUN_BYTES, Group, GroupError, Staging, Transit
from kvrelay.kv_transfer.collectives import Collectives
from kvrelay.kv_transfer.receiver import Receiver
from kvrelay.kv_transfer.wire import FrameHeader
from kvrelay.v1.kv_transfer_pb2 import CollectRun, FrameAck

_log = structlog.get_logger(__name__)

MAX_RUN_BYTES = 256 << 20
"""More is refused: it is memory that a sender could have taken."""
_JOIN_S = 5.0


@dataclass(slots=True)
class _Coming:
    run: CollectRun
    staging: Staging
    transit: Transit | None
    """None when the group was broken already."""


def receive_runs(
    messages: Iterator[CollectRun], receiver: Receiver, collectives: Collectives
) -> Iterator[tuple[FrameHeader, FrameAck.Status.ValueType]]:
    """What became of each run of one stream. The group ends with it, or earlier: then every run is LOST.

    Raises `GroupError` when there is no group, `ValueError` for a stream that is none, and `ConnectionError` or what
    `messages` does when the sender is gone.
    """
    first = next(messages, None)
    if first is None:
        return
    if not first.HasField("group"):
        raise ValueError("the first message of a Collect stream names its group")
    with collectives.as_receiver(first.group) as group:
        yield from _Incoming(messages, receiver, group).statuses()


class _Incoming:
    """One group. `messages` is read by a thread that posts the receives, one open while another is placed."""

    def __init__(self, messages: Iterator[CollectRun], receiver: Receiver, group: Group) -> None:
        self._messages = messages
        self._receiver = receiver
        self._group = group
        self._free: queue.SimpleQueue[Staging | None] = queue.SimpleQueue()
        self._coming: queue.SimpleQueue[_Coming | BaseException | None] = queue.SimpleQueue()
        self._is_broken = False

    def statuses(self) -> Iterator[tuple[FrameHeader, FrameAck.Status.ValueType]]:
        for _ in range(NUM_STAGINGS):
            self._free.put(self._group.staging(RUN_BYTES))
        reader = threading.Thread(target=self._read, name="kv-collect-reader", daemon=True)
        reader.start()
        try:
            while (coming := self._coming.get()) is not None:
                if isinstance(coming, BaseException):
                    try:
                        raise coming
                    finally:
                        del coming  # Or else it and its traceback would keep each other.
                header = _header(coming.run)
                status = self._finish(coming, header)
                self._free.put(coming.staging)
                yield header, status
        finally:
            self._free.put(None)
            self._group.close()
            reader.join(_JOIN_S)
            while not self._coming.empty():  # Receives that nobody waits for keep gloo's threads.
                self._coming.get()

    def _read(self) -> None:
        """The thread that posts receives, until the stream ends."""
        try:
            for run in self._messages:
                if run.is_last:
                    self._coming.put(None)
                    return
                staging = self._free.get()
                if staging is None:
                    return
                if not 0 < run.num_bytes <= MAX_RUN_BYTES:
                    raise ValueError(f"a run of {run.num_bytes} bytes; at least 1 and {MAX_RUN_BYTES} at most")
                if run.num_bytes > len(staging.host):
                    staging = self._group.staging(run.num_bytes)
                self._coming.put(_Coming(run, staging, self._post(run, staging)))
            raise ConnectionError("the stream ended early")
        except BaseException as error:  # gRPC's own among them: for the thread that serves the stream.
            self._coming.put(error)

    def _post(self, run: CollectRun, staging: Staging) -> Transit | None:
        try:
            return None if self._is_broken else self._group.recv(staging, run.num_bytes)
        except GroupError as error:
            self._break(error)
            return None

    def _finish(self, coming: _Coming, header: FrameHeader) -> FrameAck.Status.ValueType:
        if coming.transit is None or self._is_broken:
            return FrameAck.STATUS_LOST
        try:
            coming.transit()
        except GroupError as error:
            self._break(error)
            return FrameAck.STATUS_LOST
        return self._receiver.place(header, coming.staging.host[: coming.run.num_bytes].data)

    def _break(self, error: GroupError) -> None:
        if not self._is_broken:
            self._is_broken = True
            self._group.close()
            _log.warning("a sender's process group failed", error=str(error))


def _header(run: CollectRun) -> FrameHeader:
    return FrameHeader(
        transfer_id=run.transfer_id,
        first_block=run.first_block,
        num_blocks=run.num_blocks,
        first_layer=run.first_layer,
        num_layers=run.num_layers,
        checksum=run.checksum,
    )
