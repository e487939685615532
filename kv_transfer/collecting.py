"""Do the blocks for one peer go through a process group just now? One is made on demand, none soon after one failed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import structlog

from kvrelay.kv_transfer.collect_stream import CollectStream, Sent
from kvrelay.kv_transfer.collectives import Collectives
from kvrelay.kv_transfer.frame_order import FrameOrder
from kvrelay.v1.kv_transfer_pb2 import CollectiveBackend, FrameAck, Want

_log = structlog.get_logger(__name__)


class Collecting:
    """Belongs to the event loop."""

    def __init__(
        self,
        collectives: Collectives,
        counters: Counter[str],
        on_ack: Callable[[FrameAck], None],
        send_otherwise: Callable[[Want, FrameOrder], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`send_otherwise` gets what a group that ended has not brought."""
        self._collectives = collectives
        self._counters = counters
        self._on_ack = on_ack
        self._send_otherwise = send_otherwise
        self._clock = clock
        self._not_before_s = 0.0
        self._stream: CollectStream | None = None

    def offered(self) -> Sequence[CollectiveBackend.ValueType]:
        """Backends to tell the peer; none while a failure is fresh."""
        return self._collectives.backends if self._clock() >= self._not_before_s else ()

    async def follow(self, want: Want) -> None:
        """Begin to build a group where the peer invites to one, and give up one that was for another receiver."""
        stream = self._stream
        if stream is not None and (stream.push_address, stream.invitation) != (want.push_address, want.collective):
            self._stream = None
            await stream.close()
        if self._stream is None and want.HasField("collective") and self.offered():
            self._stream = CollectStream(
                want.push_address, want.collective, self._collectives, self._on_ack, self._on_end
            )

    def takes(self, want: Want) -> bool:
        """Whether an order of this transfer can go through the group."""
        return self.is_ready and want.HasField("collective")

    @property
    def is_ready(self) -> bool:
        return self._stream is not None and self._stream.is_ready

    @property
    def name(self) -> str:
        """Of the backend, in lower case."""
        backend = self._stream.invitation.backend if self._stream else CollectiveBackend.COLLECTIVE_BACKEND_UNSPECIFIED
        return CollectiveBackend.Name(backend).removeprefix("COLLECTIVE_BACKEND_").lower()

    def put(self, want: Want, order: FrameOrder) -> None:
        """Send it through the group, which is ready."""
        assert self._stream is not None
        self._stream.put(want, order)

    def _on_end(self, stream: CollectStream, left: Sequence[Sent], error: str) -> None:
        if self._stream is stream:
            self._stream = None
        if error:
            self._not_before_s = self._clock() + self._collectives.config.backoff_s
            self._counters["collective_fallbacks"] += 1
            _log.warning("a process group failed", peer=stream.push_address, error=error, runs_sent_again=len(left))
        for want, order in left:
            self._send_otherwise(want, order)

    async def close(self) -> None:
        """End the group."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close()
