"""One request on its way over two workers: a state machine without I/O.

    start() -> Prefill -> on_prefill_delta() -> decodes() -> on_decode_delta() ... -> done
                      \\-> on_prefill_lost() -> decodes()

Without a prefill worker the decodes follow `start()` at once. When a worker is lost, `give_up()` and then `restart()`
with another plan: it goes on with the prompt and all that was generated, so that the client gets no token twice and
misses none.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from kvrelay.coordinator.flow_request import Completion, FlowRequest
from kvrelay.coordinator.handoff_params import decode_params, exact_on_prefill, keeps_sampler_state, prefill_params
from kvrelay.coordinator.request_trace import RequestTrace
from kvrelay.coordinator.scheduler.decision import Plan
from kvrelay.coordinator.timeline import RequestTimeline
from kvrelay.v1 import common_pb2, worker_pb2

_BROKEN = (common_pb2.FINISH_REASON_ABORT, common_pb2.FINISH_REASON_ERROR)


class Phase(enum.Enum):
    UNPLANNED = enum.auto()
    PREFILL = enum.auto()
    DECODE_DUE = enum.auto()
    DECODE = enum.auto()


class RequestFlow:
    """The caller sends what the methods return, in order, and feeds back what arrives.

    A completion leaves `open_ids` when its last token is known; the flow is over when none is open.
    """

    plan: Plan
    job_id: str
    """What the request is called at the workers of the plan. Every plan has names of its own: what was sent under older
    ones may still be under way."""
    phase: Phase

    def __init__(
        self, request: FlowRequest, plan: Plan, timeline: RequestTimeline, trace: RequestTrace, kv_wait_ms: int
    ) -> None:
        self.request = request
        self.timeline = timeline
        self.trace = trace
        self.open_ids = {completion.request_id for completion in request.open_completions}
        self.num_plans = 0
        self.num_failed_plans = 0
        """Those that a worker had a part of and failed; a plan that nobody got does not count."""
        self.num_failed_here = 0
        """Of them, those that failed since the last token came."""
        self.unfit_worker_ids: set[str] = set()
        """They live and could not serve it."""
        self._full_kv_wait_ms = kv_wait_ms
        self._generated = {each.request_id: list(each.generated_token_ids) for each in request.completions}
        """What the client has, by completion."""
        self._seen = {each.request_id for each in request.completions if each.generated_token_ids}
        self._prompt_logprobs: common_pb2.Logprobs | None = None
        self._begin(plan)

    def _begin(self, plan: Plan) -> None:
        self.plan = plan
        self.num_plans += 1
        suffix = f"#{self.num_plans}" if self.num_plans > 1 else ""
        self.job_id = f"{self.request.request_id}{suffix}"
        self._jobs = {
            f"{completion.request_id}{suffix}": completion
            for completion in self.request.completions
            if completion.request_id in self.open_ids
        }
        self._first = next(iter(self._jobs.values()))
        self.phase = Phase.PREFILL if plan.prefill else Phase.DECODE_DUE
        self._kv_wait_ms = self._full_kv_wait_ms if plan.prefill else 0
        self._exact = exact_on_prefill(self._first.sampling, len(self._jobs))
        self._num_cached_tokens: int | None = None
        self._decoding = False
        self._has_brought_tokens = False

    @property
    def done(self) -> bool:
        return not self.open_ids

    @property
    def job_ids(self) -> AbstractSet[str]:
        """What it and its completions are called at the workers of the plan."""
        return {self.job_id, *self._jobs}

    def has_job(self, job_id: str) -> bool:
        """Whether it or one of its completions is called so at the workers of the plan."""
        return job_id in self._jobs or job_id == self.job_id

    @property
    def open_job_ids(self) -> Sequence[str]:
        """The same of the completions that are open."""
        return [job_id for job_id, completion in self._jobs.items() if completion.request_id in self.open_ids]

    @property
    def prefill_may_run(self) -> bool:
        """Whether the prefill worker may still compute or push."""
        is_planned = self.phase is not Phase.UNPLANNED
        return is_planned and self.plan.prefill is not None and not self._decoding

    @property
    def longest(self) -> Sequence[int]:
        """The prompt, and what was generated of the longest open completion."""
        return [*self.request.prompt_token_ids, *max((self._generated[each] for each in self.open_ids), key=len)]

    @property
    def generated(self) -> dict[int, Sequence[int]]:
        """What the client has of the open completions, by their index; those that have not begun left out."""
        open_ids = (each.request_id if each.request_id in self.open_ids else "" for each in self.request.completions)
        generated = {index: self._generated.get(each) for index, each in enumerate(open_ids)}
        return {index: token_ids for index, token_ids in generated.items() if token_ids}

    @property
    def may_split(self) -> bool:
        """Whether one prefill serves all that is left: completions that have begun differ."""
        return len(self.open_ids) == 1 or not any(self._generated[each] for each in self.open_ids)

    def plan_failed(self) -> None:
        """Count it."""
        self.num_failed_plans += 1
        self.num_failed_here = 1 if self._has_brought_tokens else self.num_failed_here + 1

    def give_up(self, reason: str) -> None:
        """The plan has failed; `restart` follows, or nothing."""
        self.timeline.mark("request.replanned")
        self.trace.end("prefill", reason)
        self.trace.end("decode", reason)
        self.phase = Phase.UNPLANNED

    def restart(self, plan: Plan) -> None:
        """Go on with another plan; `start()` follows."""
        self._begin(plan)

    def start(self) -> worker_pb2.Prefill | None:
        """What the prefill worker is sent, if there is one."""
        if self.plan.prefill is None:
            return None
        self.timeline.mark("prefill.sent")
        context = self.trace.begin("prefill", {"worker.id": self.plan.prefill.worker_id})
        sampling = prefill_params(self._first.sampling, exact=self._exact)
        if self._first.request_id in self._seen:  # The client has the prompt's log probabilities.
            sampling.ClearField("prompt_logprobs")
        return worker_pb2.Prefill(
            request_id=self.job_id,
            prompt_token_ids=self._tokens(self._first),
            sampling=sampling,
            cache_salt=self.request.cache_salt,
            priority=self.request.priority,
            decode_address=self.plan.decode.address,
            decode_worker_id=self.plan.decode.worker_id,
            trace=context,
            prefix_address=self.plan.source.address if self.plan.source else "",
            timeout_ms=self.request.terms.timeout_ms(),
        )

    def is_too_much(self, delta: worker_pb2.TokenDelta) -> bool:
        """Whether a worker says that there are more tokens than were asked for."""
        if self.phase is Phase.PREFILL:
            return len(delta.token_ids) > 1
        completion = self._jobs.get(delta.request_id, self._first)
        num_generated = len(self._generated[completion.request_id])
        return num_generated + len(delta.token_ids) > completion.sampling.max_tokens

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
        first = worker_pb2.TokenDelta()
        first.CopyFrom(delta)
        self._take(first, self._first)
        if delta.finish_reason == common_pb2.FINISH_REASON_LENGTH and not self._is_full():
            first.finish_reason = common_pb2.FINISH_REASON_UNSPECIFIED
        self._close_if_finished(first)
        return first

    def on_prefill_lost(self) -> None:
        """The prefill worker cannot have it: the decode worker computes the prompt."""
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
        source = self.plan.source if self.plan.prefill is None else None
        decodes = []
        for job_id in self.open_job_ids:
            completion = self._jobs[job_id]
            num_generated = len(self._generated[completion.request_id])
            knows_prompt = prefilled or completion.request_id in self._seen
            decodes.append(
                worker_pb2.Decode(
                    request_id=job_id,
                    prompt_token_ids=self._tokens(completion),
                    sampling=decode_params(completion.sampling, num_sampled=num_generated, prefilled=knows_prompt),
                    cache_salt=self.request.cache_salt,
                    priority=self.request.priority,
                    kv_wait_ms=self._kv_wait_ms,
                    trace=context,
                    prefill_request_id="" if job_id == self.job_id else self.job_id,
                    prefix_address=source.address if source else "",
                    timeout_ms=self.request.terms.timeout_ms(),
                    num_generated_tokens=num_generated if keeps_sampler_state(completion.sampling) else 0,
                )
            )
        return decodes

    def on_decode_delta(self, delta: worker_pb2.TokenDelta) -> worker_pb2.TokenDelta | None:
        """Take tokens of one completion; returns what the client gets, None when nobody waits for them."""
        completion = self._jobs.get(delta.request_id)
        if completion is None or completion.request_id not in self.open_ids:
            return None
        self._take(delta, completion)
        if not self._decoding:
            self._decoding = True
            self.timeline.mark("decode.first_token")
        self._close_if_finished(delta)
        return delta

    def stop(self, completion_id: str) -> Sequence[str]:
        """The front end ended this completion by itself: a stop string, or nobody reads it any more.

        Returns what it is called at the workers.
        """
        self.open_ids.discard(completion_id)
        return [job_id for job_id, completion in self._jobs.items() if completion.request_id == completion_id]

    def _tokens(self, completion: Completion) -> list[int]:
        return [*self.request.prompt_token_ids, *self._generated[completion.request_id]]

    def _take(self, delta: worker_pb2.TokenDelta, completion: Completion) -> None:
        """The client gets it under the name that it knows, and sees the prompt as prefilled once, wherever that was."""
        completion_id = completion.request_id
        self._generated[completion_id].extend(delta.token_ids)
        self._has_brought_tokens |= bool(delta.token_ids)
        if self.num_plans > 1:
            delta.request_id = completion_id
        if completion_id not in self._seen:
            self._seen.add(completion_id)
            if self._prompt_logprobs is not None:
                delta.prompt_logprobs.CopyFrom(self._prompt_logprobs)
            if self._num_cached_tokens is not None:
                delta.num_cached_tokens = self._num_cached_tokens
        elif self.num_plans > 1:
            delta.ClearField("prompt_logprobs")
            delta.ClearField("num_cached_tokens")

    def _close_if_finished(self, delta: worker_pb2.TokenDelta) -> None:
        if delta.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED:
            self.timeline.mark("request.finished")
            if delta.HasField("timeline") and self.phase is Phase.DECODE:
                self.timeline.merge(delta.timeline)
            self.open_ids.discard(delta.request_id)

    def _is_full(self) -> bool:
        """Whether the first token was also the last one that was asked for or has room."""
        num_generated = len(self._generated[self._first.request_id])
        num_tokens = len(self.request.prompt_token_ids) + num_generated
        return self._first.sampling.max_tokens <= num_generated or num_tokens >= self.request.max_model_len_tokens
