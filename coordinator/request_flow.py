"""One request on its way over two workers: a state machine without I/O.

    start() -> Prefill -> on_prefill_delta() -> decodes() -> on_decode_delta() ... -> done
                      \\-> on_prefill_lost() -> decodes()

Without a prefill worker the decodes follow `start()` at once.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.coordinator.handoff_params import decode_params, exact_on_prefill, prefill_params
from kvrelay.coordinator.request_terms import STANDARD_TERMS, RequestTerms
from kvrelay.coordinator.request_trace import RequestTrace
from kvrelay.coordinator.scheduler.decision import Plan
from kvrelay.coordinator.timeline import RequestTimeline
from kvrelay.v1 import common_pb2, worker_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sequence that is asked for; `sampling` has max_tokens and everything else resolved."""

    request_id: str
    sampling: common_pb2.SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRequest:
    """A prompt and the completions of it, as the coordinator's front end has validated them."""

    request_id: str
    """Unique; the id of the only completion, or else of their parent."""
    external_id: str
    prompt_token_ids: Sequence[int]
    completions: Sequence[Completion]
    max_model_len_tokens: int
    cache_salt: str = ""
    priority: int = 0
    terms: RequestTerms = STANDARD_TERMS
    """Its `ttft_s` counts from when the request is dispatched."""


_BROKEN = (common_pb2.FINISH_REASON_ABORT, common_pb2.FINISH_REASON_ERROR)


class Phase(enum.Enum):
    PREFILL = enum.auto()
    DECODE_DUE = enum.auto()
    DECODE = enum.auto()
    DONE = enum.auto()


class RequestFlow:
    """The caller sends what the methods return, in order, and feeds back what arrives.

    A completion leaves `open_ids` when its last token is known; the flow is over when none is open.
    """

    def __init__(
        self, request: FlowRequest, plan: Plan, timeline: RequestTimeline, trace: RequestTrace, kv_wait_ms: int
    ) -> None:
        self.request = request
        self.plan = plan
        self.timeline = timeline
        self.trace = trace
        self.open_ids = {completion.request_id for completion in request.completions}
        self.phase = Phase.PREFILL if plan.prefill else Phase.DECODE_DUE
        self._kv_wait_ms = kv_wait_ms if plan.prefill else 0
        self._exact = exact_on_prefill(request.completions[0].sampling, len(request.completions))
        self._first_token: list[int] = []
        self._prompt_logprobs: common_pb2.Logprobs | None = None
        self._num_cached_tokens: int | None = None
        self._seen: set[str] = set()
        self._decoding = False

    @property
    def done(self) -> bool:
        return not self.open_ids

    @property
    def prefill_may_run(self) -> bool:
        """Whether the prefill worker may still compute or push."""
        return self.plan.prefill is not None and not self._decoding

    def start(self) -> worker_pb2.Prefill | None:
        """What the prefill worker is sent, if there is one."""
        if self.plan.prefill is None:
            return None
        self.timeline.mark("prefill.sent")
        context = self.trace.begin("prefill", {"worker.id": self.plan.prefill.worker_id})
        return worker_pb2.Prefill(
            request_id=self.request.request_id,
            prompt_token_ids=self.request.prompt_token_ids,
            sampling=prefill_params(self.request.completions[0].sampling, exact=self._exact),
            cache_salt=self.request.cache_salt,
            priority=self.request.priority,
            decode_address=self.plan.decode.address,
            decode_worker_id=self.plan.decode.worker_id,
            trace=context,
            prefix_address=self.plan.source.address if self.plan.source else "",
        )

    def on_prefill_delta(self, delta: worker_pb2.TokenDelta) -> worker_pb2.TokenDelta | None:
        """Take the prefill worker's only delta; returns what the client gets of it, if anything yet.

        Afterwards `decodes()` is due unless the request is done.
        """
        if self.phase is not Phase.PREFILL:
            return None
        if delta.finish_reason in _BROKEN:
            self.on_prefill_lost()
            return None
        self.timeline.mark("prefill.first_token")
        self.trace.end("prefill")
        self.timeline.merge(delta.timeline)
        self.phase = Phase.DECODE_DUE
        if delta.kv_failed:
            self._kv_wait_ms = 0
        self._num_cached_tokens = delta.num_cached_tokens if delta.HasField("num_cached_tokens") else 0
        if delta.HasField("prompt_logprobs"):
            self._prompt_logprobs = delta.prompt_logprobs
        if not self._exact:
            return None
        self._first_token = list(delta.token_ids)
        first = worker_pb2.TokenDelta()
        first.CopyFrom(delta)
        if delta.finish_reason == common_pb2.FINISH_REASON_LENGTH and not self._is_full():
            first.finish_reason = common_pb2.FINISH_REASON_UNSPECIFIED
        self._seen.add(delta.request_id)
        self._close_if_finished(first)
        return first

    def on_prefill_lost(self) -> None:
        """The prefill worker failed before its token: the decode worker computes the prompt."""
        if self.phase is Phase.PREFILL:
            self.timeline.mark("prefill.lost")
            self.trace.end("prefill", "the prefill worker failed")
            self.phase = Phase.DECODE_DUE
            self._kv_wait_ms = 0
            self._num_cached_tokens = None

    def decodes(self) -> list[worker_pb2.Decode]:
        """What the decode worker is sent; call it once, when the phase is DECODE_DUE."""
        self.phase = Phase.DECODE
        self.timeline.mark("decode.sent")
        context = self.trace.begin("decode", {"worker.id": self.plan.decode.worker_id})
        prefilled = self._num_cached_tokens is not None
        prompt = [*self.request.prompt_token_ids, *self._first_token]
        sampled = len(self._first_token)
        source = self.plan.source if self.plan.prefill is None else None
        return [
            worker_pb2.Decode(
                request_id=completion.request_id,
                prompt_token_ids=prompt,
                sampling=decode_params(completion.sampling, num_sampled=sampled, prefilled=prefilled),
                cache_salt=self.request.cache_salt,
                priority=self.request.priority,
                kv_wait_ms=self._kv_wait_ms,
                trace=context,
                prefill_request_id="" if completion.request_id == self.request.request_id else self.request.request_id,
                prefix_address=source.address if source else "",
            )
            for completion in self.request.completions
            if completion.request_id in self.open_ids
        ]

    def on_decode_delta(self, delta: worker_pb2.TokenDelta) -> worker_pb2.TokenDelta | None:
        """Take tokens of one completion; returns what the client gets, None when nobody waits for them."""
        if delta.request_id not in self.open_ids:
            return None
        if delta.request_id not in self._seen:
            self._seen.add(delta.request_id)
            self._add_what_prefill_knew(delta)
        if not self._decoding:
            self._decoding = True
            self.timeline.mark("decode.first_token")
        self._close_if_finished(delta)
        return delta

    def stop(self, completion_id: str) -> None:
        """The front end ended this completion by itself: a stop string, or nobody reads it any more."""
        self.open_ids.discard(completion_id)

    def _add_what_prefill_knew(self, delta: worker_pb2.TokenDelta) -> None:
        """The client sees the prompt as prefilled once, wherever that was."""
        if self._prompt_logprobs is not None:
            delta.prompt_logprobs.CopyFrom(self._prompt_logprobs)
        if self._num_cached_tokens is not None:
            delta.num_cached_tokens = self._num_cached_tokens

    def _close_if_finished(self, delta: worker_pb2.TokenDelta) -> None:
        if delta.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED:
            self.timeline.mark("request.finished")
            if delta.HasField("timeline") and self.phase is Phase.DECODE:
                self.timeline.merge(delta.timeline)
            self.open_ids.discard(delta.request_id)

    def _is_full(self) -> bool:
        """Whether the first token was also the last one that was asked for or has room."""
        num_tokens = len(self.request.prompt_token_ids) + len(self._first_token)
        wanted = self.request.completions[0].sampling.max_tokens
        return wanted <= len(self._first_token) or num_tokens >= self.request.max_model_len_tokens
