"""Where do the tokens of requests go, and what else is told of them?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvrelay.coordinator.request_flow import RequestFlow
from kvrelay.coordinator.scheduler.decision import Decision
from kvrelay.errors import KvrelayError
from kvrelay.v1 import worker_pb2


class OutputSink(Protocol):
    """Where tokens go. Called in the event loop; must not block."""

    def started(self, flow: RequestFlow, decision: Decision, schedule_s: float) -> None:
        """A request is on its way, after the scheduler has thought for so long."""

    def resume(self, flow: RequestFlow) -> Sequence[str]:
        """Like `take`, of the tokens that the request had before it came here."""

    def take(self, deltas: Sequence[worker_pb2.TokenDelta]) -> Sequence[str]:
        """Take the tokens of one message; returns the ids of completions that need no more of them."""

    def replanned(self, flow: RequestFlow, decision: Decision, schedule_s: float) -> None:
        """What was lost of it goes on elsewhere."""

    def fail(self, completion_ids: Sequence[str], error: KvrelayError) -> None:
        """No more tokens will come for these."""

    def finished(self, flow: RequestFlow) -> None:
        """The last completion of a request is over, whichever way."""
