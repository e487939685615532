"""Runs request flows over the worker pool: plans them, sends their parts, routes what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from kvrelay.coordinator.flow_request import FlowRequest
from kvrelay.coordinator.planner import Planned, Planner
from kvrelay.coordinator.prefix_index.index import PrefixIndex
from kvrelay.coordinator.prefix_index.prompt import IndexedPrompt
from kvrelay.coordinator.request_flow import Phase, RequestFlow
from kvrelay.coordinator.request_trace import RequestTrace
from kvrelay.coordinator.scheduler.base import Scheduler
from kvrelay.coordinator.timeline import RequestTimeline
from kvrelay.coordinator.token_sink import OutputSink
from kvrelay.coordinator.waiting_flows import WaitingFlows
from kvrelay.coordinator.worker_pool import WorkerPool
from kvrelay.errors import (
    GenerationFailedError,
    InvalidRequestError,
    KvrelayError,
    NoWorkersError,
    OverloadedError,
    WorkerLostError,
)
from kvrelay.v1 import common_pb2, worker_pb2

_log = structlog.get_logger(__name__)

_FAILURES: dict[int, type[KvrelayError]] = {
    worker_pb2.RequestFailed.REASON_INVALID: InvalidRequestError,
    worker_pb2.RequestFailed.REASON_UNAVAILABLE: NoWorkersError,
}


MAX_FAILED_PLANS = 10
"""Of one request, wherever they failed: one that kills each worker after some tokens must not go on for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatcherConfig:
    model: str
    kv_wait_ms: int = 10_000
    """How long the decode worker waits for blocks that were announced, after the first token."""
    max_plans: int = 3
    """Of one request, the first included, may fail at the same token: there it kills workers, perhaps."""
    wait_for_workers_s: float = 60.0
    """How long a request that has lost its worker waits for another to come."""


class Dispatcher:
    """Owns the requests in flight. Nothing here waits, so nothing here is cancelled half way."""

    def __init__(
        self, pool: WorkerPool, sink: OutputSink, scheduler: Scheduler, index: PrefixIndex, config: DispatcherConfig
    ) -> None:
        self._pool = pool
        self._planner = Planner(pool, scheduler, index, config.model)
        self._sink = sink
        self._config = config
        self._flows: dict[str, RequestFlow] = {}
        """By the ids of the request and its completions, the client's and those at the workers of its plan."""
        self._prompts: dict[str, IndexedPrompt] = {}
        """What was promised of requests, by their id."""
        self._waiting = WaitingFlows(self._go_on, self._fail, config.wait_for_workers_s)

    @property
    def num_requests(self) -> int:
        return len(self._distinct_flows())

    def submit(self, request: FlowRequest, timeline: RequestTimeline, trace: RequestTrace) -> None:
        """Plan and start a request.

        Raises `NoWorkersError`, `OverloadedError`, `WorkerLostError` or `InvalidRequestError`; then
        nothing of it is left.
        """
        planned = self._planner.plan(request, trace)
        timeline.mark("schedule.done")
        flow = RequestFlow(request, planned.decision.plan, timeline, trace, self._config.kv_wait_ms)
        for request_id in _ids(flow):
            self._flows[request_id] = flow
        try:
            self._launch(flow, planned)
        except KvrelayError:
            self._forget(flow)
            raise
        self._sink.started(flow, planned.decision, planned.schedule_s)
        if request.has_begun:
            self.cancel(self._sink.resume(flow))

    def _launch(self, flow: RequestFlow, planned: Planned) -> None:
        """Send what begins a plan. On failure nothing of the plan is left at the workers."""
        decode, decision, prompt = flow.plan.decode, planned.decision, planned.prompt
        self._prompts[flow.request.request_id] = prompt
        num_sequences, num_tokens = len(flow.open_ids), decision.num_prompt_tokens
        try:
            self._pool.reserve_sequences(decode.worker_id, flow.job_id, num_sequences, num_sequences * num_tokens)
            prompt.promise(decode)
            self._start(flow, prompt, num_tokens - decision.chosen.num_cached_tokens)
        except KvrelayError:
            prompt.retract(decode)
            self._leave(flow)
            raise

    def cancel(self, completion_ids: Sequence[str]) -> None:
        """The client needs no more tokens of these; what is unknown or over is ignored."""
        for completion_id in completion_ids:
            if flow := self._flows.get(completion_id):
                self._stop(flow, completion_id)

    def on_step(self, worker_id: str, step: worker_pb2.StepOutputs) -> None:
        """Hand all tokens of one message on at once, and then send what they made due."""
        outputs: list[worker_pb2.TokenDelta] = []
        touched: list[RequestFlow] = []
        aborted: list[RequestFlow] = []
        misled: dict[str, RequestFlow] = {}
        for delta in step.deltas:
            flow = self._flow_told_of(delta, misled)
            if flow is None:
                continue
            if delta.finish_reason == common_pb2.FINISH_REASON_ABORT and self._is_decoding_on(flow, worker_id):
                delta.ClearField("finish_reason")
                aborted.append(flow)
            output = self._advance(flow, worker_id, delta)
            if output is not None:
                outputs.append(output)
            if flow.done or flow.phase is Phase.DECODE_DUE:
                touched.append(flow)
        if outputs:
            self.cancel(self._sink.take(outputs))
        for flow in touched:
            self._settle(flow)
        for flow in aborted:
            self._aborted(flow, worker_id)
        for flow in misled.values():
            self._misled(flow, worker_id)

    def _flow_told_of(self, delta: worker_pb2.TokenDelta, misled: dict[str, RequestFlow]) -> RequestFlow | None:
        """None for what is over or was of an earlier plan, and for what cannot be: that goes to `misled`."""
        flow = self._flow_with_job(delta.request_id)
        if flow is None or flow.job_id in misled:
            return None
        if flow.is_too_much(delta):
            misled[flow.job_id] = flow
            return None
        return flow

    def _misled(self, flow: RequestFlow, worker_id: str) -> None:
        """The worker's account of the request is wrong: what it says of it cannot be used."""
        prefilling = self._is_prefilling_on(flow, worker_id)
        if prefilling or (self._is_decoding_on(flow, worker_id) and not flow.done):
            flow.unfit_worker_ids.add(worker_id)
            error = GenerationFailedError(
                f"worker {worker_id} has generated more tokens than were asked for; try again"
            )
            self._replan(flow, error, prefilling=prefilling)

    def _aborted(self, flow: RequestFlow, worker_id: str) -> None:
        """Nobody has cancelled it: the worker's engine has been told to stop."""
        if self._is_decoding_on(flow, worker_id) and not flow.done:
            flow.unfit_worker_ids.add(worker_id)
            error = WorkerLostError(f"decode worker {worker_id} has ended the request before it was done; try again")
            self._replan(flow, error, prefilling=False)

    def on_request_failed(self, worker_id: str, failed: worker_pb2.RequestFailed) -> None:
        flow = self._flow_with_job(failed.request_id)
        if flow is None:
            return
        if self._is_pushing_from(flow, worker_id):
            self._push_lost(flow)
            return
        prefilling = self._is_prefilling_on(flow, worker_id)
        decoding = self._is_decoding_on(flow, worker_id)
        if not prefilling and not (decoding and failed.request_id in flow.open_job_ids):
            return
        kind = _FAILURES.get(failed.reason, GenerationFailedError)
        error = kind(f"worker {worker_id}: {failed.message}")
        if kind is InvalidRequestError:
            self._fail(flow, error)
            return
        flow.unfit_worker_ids.add(worker_id)
        self._replan(flow, error, prefilling=prefilling)

    def on_worker_lost(self, worker_id: str, reason: str) -> None:
        """What was there goes on elsewhere."""
        for flow in self._distinct_flows():
            flow.unfit_worker_ids.discard(worker_id)
            if flow.phase is Phase.UNPLANNED:
                continue
            if flow.plan.decode.worker_id == worker_id:
                error = WorkerLostError(f"decode worker {worker_id} was lost: {reason}; try again")
                self._replan(flow, error, prefilling=False)
            elif self._is_prefilling_on(flow, worker_id):
                error = WorkerLostError(f"prefill worker {worker_id} was lost: {reason}; try again")
                self._replan(flow, error, prefilling=True)
            elif self._is_pushing_from(flow, worker_id):
                self._push_lost(flow)

    def on_worker_leaving(self, worker_id: str) -> None:
        """What it has goes on elsewhere, as far as there is somebody for it; a hand-over is no failed plan."""
        if not self._planner.has_decoder(without=[worker_id]):
            return
        error = WorkerLostError(f"worker {worker_id} leaves the cluster; try again")
        for flow in self._distinct_flows():
            decodes = flow.phase is not Phase.UNPLANNED and flow.plan.decode.worker_id == worker_id
            if decodes or self._is_prefilling_on(flow, worker_id):
                self._give_up(flow, error)
                self._go_on(flow, error)

    def on_workers_changed(self) -> None:
        """Somebody may have come for whom requests wait."""
        self._waiting.retry()

    def on_closed(self) -> None:
        """Nobody will come for whom requests wait."""
        self._waiting.give_up()

    def _flow_with_job(self, request_id: str) -> RequestFlow | None:
        """None for what is over, or was of an earlier plan."""
        flow = self._flows.get(request_id)
        return flow if flow is not None and flow.has_job(request_id) else None

    def _distinct_flows(self) -> list[RequestFlow]:
        return list({id(flow): flow for flow in self._flows.values()}.values())

    def _replan(self, flow: RequestFlow, error: KvrelayError, *, prefilling: bool) -> None:
        """A worker of its plan is lost, or has failed it: make another plan for the rest of it, or fail it.

        A prompt that prefill workers refuse once too often is computed by its decode worker, but not one that they die
        over.
        """
        _log.warning("plan failed", request_id=flow.job_id, prefilling=prefilling, reason=error.message)
        flow.plan_failed()
        if flow.num_failed_here < self._config.max_plans and flow.num_failed_plans < MAX_FAILED_PLANS:
            self._give_up(flow, error)
            self._go_on(flow, error)
        elif prefilling and not isinstance(error, WorkerLostError):
            self._release_prefill(flow)
            flow.on_prefill_lost()
            self._settle(flow)
        else:
            self._give_up(flow, error)
            self._fail(flow, error)

    def _give_up(self, flow: RequestFlow, error: KvrelayError) -> None:
        """Leave the plan. Nobody counts on its workers to have the prompt, but for a prefill worker that sampled."""
        self._leave(flow)
        if prompt := self._prompts.pop(flow.request.request_id, None):
            prompt.retract(flow.plan.decode)
            if flow.plan.prefill is not None and flow.phase is Phase.PREFILL:
                prompt.retract(flow.plan.prefill)
        for job_id in flow.job_ids - _ids(flow):
            del self._flows[job_id]
        flow.give_up(error.message)

    def _go_on(self, flow: RequestFlow, error: KvrelayError) -> None:
        """Plan the rest of a request, or let it wait until somebody has room for it, and then fail with `error`."""
        if not self._planner.has_decoder(without=flow.unfit_worker_ids):
            if self._planner.has_decoder() and not isinstance(error, WorkerLostError):
                self._fail(flow, error)  # They all live, and none of them can serve it.
            else:
                self._waiting.add(flow, error)
            return
        try:
            planned = self._planner.plan_rest(flow)
        except KvrelayError:  # Those who had room for it are gone, but may come back.
            self._waiting.add(flow, error)
            return
        flow.restart(planned.decision.plan)
        self._flows.update(dict.fromkeys(flow.job_ids, flow))
        try:
            self._launch(flow, planned)
        except KvrelayError as refusal:
            self._give_up(flow, refusal)
            self._waiting.add(flow, error)
            return
        self._waiting.discard(flow)
        self._sink.replanned(flow, planned.decision, planned.schedule_s)

    def _start(self, flow: RequestFlow, prompt: IndexedPrompt, num_uncached_tokens: int) -> None:
        prefill = flow.start()
        if prefill is None or flow.plan.prefill is None:
            self._pool.queue_prompt(flow.plan.decode.worker_id, flow.job_id, num_uncached_tokens)
            self._send_decodes(flow)
            return
        try:
            self._pool.assign_prefill(flow.plan.prefill.worker_id, prefill, num_uncached_tokens)
            prompt.promise(flow.plan.prefill)
        except (WorkerLostError, OverloadedError) as error:
            _log.warning("prefill not sent", request_id=prefill.request_id, reason=error.message)
            flow.on_prefill_lost()
            self._send_decodes(flow)

    def _advance(self, flow: RequestFlow, worker_id: str, delta: worker_pb2.TokenDelta) -> worker_pb2.TokenDelta | None:
        if flow.phase is Phase.DECODE:
            if flow.plan.decode.worker_id != worker_id:
                return None
            waited_for_blocks = flow.prefill_may_run
            if flow.plan.prefill is None:
                self._pool.end_prefill(worker_id, flow.job_id)
            output = flow.on_decode_delta(delta)
            if waited_for_blocks and not flow.prefill_may_run:
                self._release_prefill(flow)
            return output
        if self._is_prefilling_on(flow, worker_id) and delta.request_id == flow.job_id:
            self._pool.end_prefill(worker_id, flow.job_id)
            return flow.on_prefill_delta(delta)
        return None

    def _release_prefill(self, flow: RequestFlow) -> None:
        if flow.plan.prefill:
            self._pool.release_prefill(flow.plan.prefill.worker_id, flow.job_id)

    def _settle(self, flow: RequestFlow) -> None:
        """After the client has got its tokens: finish the request, or send its second half."""
        if flow.done:
            self._cancel_prefill(flow)
            self._forget(flow)
        elif flow.phase is Phase.DECODE_DUE:
            try:
                self._send_decodes(flow)
            except KvrelayError as error:
                self._replan(flow, error, prefilling=False)

    def _send_decodes(self, flow: RequestFlow) -> None:
        self._pool.send_decodes(flow.plan.decode.worker_id, flow.job_id, flow.decodes())

    def _push_lost(self, flow: RequestFlow) -> None:
        """The decode worker computes what has not arrived, at once."""
        self._release_prefill(flow)
        self._pool.send_kv_lost(flow.plan.decode.worker_id, flow.job_id)

    def _stop(self, flow: RequestFlow, completion_id: str) -> None:
        """End one completion early, on the workers too."""
        if completion_id not in flow.open_ids:
            return
        job_ids = flow.stop(completion_id)
        if flow.phase is Phase.DECODE:
            for job_id in job_ids:
                self._pool.send_cancel(flow.plan.decode.worker_id, job_id)
        if flow.done:
            self._cancel_prefill(flow)
            self._forget(flow)

    def _fail(self, flow: RequestFlow, error: KvrelayError) -> None:
        completion_ids = sorted(flow.open_ids)
        error.generated = flow.generated
        flow.trace.close(error.message)
        self._sink.fail(completion_ids, error)
        for completion_id in completion_ids:
            self._stop(flow, completion_id)

    def _cancel_prefill(self, flow: RequestFlow) -> None:
        """Of a request that is over: the prefill worker may push still, and the decode worker hold blocks for it."""
        if flow.prefill_may_run and flow.plan.prefill is not None:
            self._pool.send_cancel(flow.plan.prefill.worker_id, flow.job_id)
            if flow.phase is not Phase.DECODE:
                self._pool.send_cancel(flow.plan.decode.worker_id, flow.job_id)

    def _leave(self, flow: RequestFlow) -> None:
        """Let go of everything that the workers of a plan have of it, or may get still. Idempotent."""
        self._cancel_prefill(flow)
        for job_id in flow.job_ids:
            self._pool.send_cancel(flow.plan.decode.worker_id, job_id)
        self._release_prefill(flow)
        self._pool.release_sequences(flow.plan.decode.worker_id, flow.job_id)

    def _forget(self, flow: RequestFlow) -> None:
        """Drop every trace of a request that is over or was never sent. Idempotent."""
        if self._flows.pop(flow.request.request_id, None) is None:
            return
        for request_id in (*_ids(flow), *flow.job_ids):
            self._flows.pop(request_id, None)
        self._waiting.discard(flow)
        self._prompts.pop(flow.request.request_id, None)
        self._release_prefill(flow)
        self._pool.release_sequences(flow.plan.decode.worker_id, flow.job_id)
        flow.trace.close()
        self._sink.finished(flow)

    @staticmethod
    def _is_prefilling_on(flow: RequestFlow, worker_id: str) -> bool:
        prefill = flow.plan.prefill
        return flow.phase is Phase.PREFILL and prefill is not None and prefill.worker_id == worker_id

    @staticmethod
    def _is_decoding_on(flow: RequestFlow, worker_id: str) -> bool:
        return flow.phase is Phase.DECODE and flow.plan.decode.worker_id == worker_id

    @staticmethod
    def _is_pushing_from(flow: RequestFlow, worker_id: str) -> bool:
        """Whether the worker may still push blocks that a decode waits for."""
        prefill = flow.plan.prefill
        if prefill is None or prefill.worker_id != worker_id:
            return False
        return flow.phase is Phase.DECODE and flow.prefill_may_run


def _ids(flow: RequestFlow) -> set[str]:
    """By which the front end knows a request."""
    return {flow.request.request_id, *(completion.request_id for completion in flow.request.completions)}
