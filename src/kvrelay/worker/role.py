"""The contract between a worker's session and what it does with a request."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from kvrelay.v1 import worker_pb2
from kvrelay.worker.submission import Sink


class PrefillRunner(Protocol):
    """Carries out `Prefill` messages."""

    async def prefill(self, request: worker_pb2.Prefill, sink: Sink) -> None:
        """Until the request's KV has left, or the task is cancelled; frees everything either way.

        Raises `KvrelayError` when the request fails.
        """


class DecodeRunner(Protocol):
    """Carries out `Decode` messages."""

    async def decode(self, request: worker_pb2.Decode, sink: Sink) -> None:
        """Until the last token was given to `sink`, or the task is cancelled; frees everything either way.

        Raises `KvrelayError` when the request fails.
        """

    def forget(self, request_id: str) -> None:
        """The request is cancelled, perhaps before its `Decode` came: let go of blocks received for it."""

    def session(self, coordinator_id: str) -> AbstractContextManager[None]:
        """Around a session of this coordinator: only then may its requests come for blocks that are received."""

    def end_wait(self, request_id: str) -> None:
        """No more blocks come for the Prefill of this id: who waits for them goes on with what there is."""
