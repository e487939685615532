"""Why did a request of late go where it went?"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from kvrelay.coordinator.scheduler.decision import Candidate, Decision
from kvrelay.v1 import inference_pb2


class _Entry(NamedTuple):
    decision: Decision
    queued_s: float
    unix_ns: int


class DecisionLog:
    """The decisions about the latest requests; made readable only for who asks."""

    def __init__(self, max_decisions: int, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._max_decisions = max_decisions
        self._clock_ns = clock_ns
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def add(self, request_id: str, decision: Decision, queued_s: float) -> None:
        """An id that is used again names the later request."""
        self._entries[request_id] = _Entry(decision, queued_s, self._clock_ns())
        self._entries.move_to_end(request_id)
        if len(self._entries) > self._max_decisions:
            self._entries.popitem(last=False)

    def find(self, request_id: str) -> inference_pb2.Decision | None:
        """By the id of the request, or of its answer: the OpenAI API makes `chatcmpl-ID` and `cmpl-ID` of ID."""
        for known_id in (request_id, f"chatcmpl-{request_id}", f"cmpl-{request_id}-0", f"{request_id}-0"):
            if entry := self._entries.get(known_id):
                return _to_proto(known_id, entry)
        return None


def _to_proto(request_id: str, entry: _Entry) -> inference_pb2.Decision:
    decision = entry.decision
    return inference_pb2.Decision(
        request_id=request_id,
        policy=decision.policy,
        prefill_worker_id=decision.chosen.prefill_worker_id,
        decode_worker_id=decision.chosen.decode_worker_id,
        reason=decision.reason,
        num_prompt_tokens=decision.num_prompt_tokens,
        queued_s=entry.queued_s,
        unix_ns=entry.unix_ns,
        candidates=[_candidate(candidate) for candidate in (decision.chosen, *decision.others)],
    )


def _candidate(candidate: Candidate) -> inference_pb2.Candidate:
    return inference_pb2.Candidate(
        prefill_worker_id=candidate.prefill_worker_id,
        decode_worker_id=candidate.decode_worker_id,
        ttft_s=candidate.ttft_s,
        wait_s=candidate.wait_s,
        prefill_s=candidate.prefill_s,
        transfer_s=candidate.transfer_s,
        itl_s=candidate.itl_s,
        num_cached_tokens=candidate.num_cached_tokens,
        num_stored_tokens=candidate.num_stored_tokens,
        cost=candidate.cost,
        excluded=candidate.excluded,
    )
