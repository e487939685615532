"""Tokens into vLLM's output processor, which makes text of them and fills the queues of the callers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import structlog
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import OutputProcessor

from kvrelay.coordinator.decision_log import DecisionLog
from kvrelay.coordinator.metrics.requests import RequestMetrics
from kvrelay.coordinator.request_flow import RequestFlow
from kvrelay.coordinator.scheduler.decision import Decision
from kvrelay.coordinator.token_outputs import to_engine_output
from kvrelay.coordinator.vllm_errors import to_vllm_error
from kvrelay.errors import GenerationFailedError, KvrelayError
from kvrelay.v1 import common_pb2, worker_pb2

_log = structlog.get_logger(__name__)


class TokenReceiver(Protocol):
    """Takes the tokens of one completion itself. Called in the event loop; must not block."""

    def take(self, delta: worker_pb2.TokenDelta) -> bool:
        """Returns whether it needs no more of them."""

    def fail(self, error: KvrelayError) -> None:
        """No more tokens will come."""


class EngineOutputSink:
    """Implements the dispatcher's `OutputSink`; keeps the timelines of the latest requests."""

    def __init__(self, output_processor: OutputProcessor, metrics: RequestMetrics, max_kept: int) -> None:
        """Timelines and decisions of `max_kept` requests can still be asked for."""
        self._output_processor = output_processor
        self._metrics = metrics
        self._max_timelines = max_kept
        self.decisions = DecisionLog(max_kept)
        self._timelines: OrderedDict[str, common_pb2.Timeline] = OrderedDict()
        self.receivers: dict[str, TokenReceiver] = {}
        """By completion; the output processor has the others. One that has got its last token is taken out."""

    def started(self, flow: RequestFlow, decision: Decision, schedule_s: float) -> None:
        self._metrics.decided(decision.policy, "local" if flow.plan.prefill is None else "split", schedule_s)
        self.decisions.add(
            flow.request.external_id, decision, flow.timeline.between_s("admission.queued", "schedule.done")
        )
        self._metrics.started(
            flow.request.request_id,
            [completion.request_id for completion in flow.request.completions],
            arrived_s=flow.timeline.began_s,
            num_prompt_tokens=len(flow.request.prompt_token_ids),
        )

    def replanned(self, flow: RequestFlow, decision: Decision, schedule_s: float) -> None:
        """`kvrelay explain` tells of the last plan."""
        self._metrics.decided(decision.policy, "local" if flow.plan.prefill is None else "split", schedule_s)
        self._metrics.num_replanned += 1
        queued_s = flow.timeline.between_s("admission.queued", "schedule.done")
        self.decisions.add(flow.request.external_id, decision, queued_s)

    def resume(self, flow: RequestFlow) -> Sequence[str]:
        """Of what the client has the detokenizer must know. How a completion ended that has is nobody's question."""
        deltas = []
        for completion in flow.request.completions:
            if had := completion.generated_token_ids:
                delta = worker_pb2.TokenDelta(request_id=completion.request_id, token_ids=had)
                if completion.is_finished:
                    delta.finish_reason = common_pb2.FINISH_REASON_LENGTH
                deltas.append(delta)
        return self._process(deltas)

    def take(self, deltas: Sequence[worker_pb2.TokenDelta]) -> Sequence[str]:
        """Detokenize and hand out a whole message; returns the completions that a stop string has ended.

        A delta that contradicts itself fails its own completion; what vLLM's processor raises fails all of the message,
        because nobody knows how far it came.
        """
        self._metrics.take(deltas)
        stopped = self._process(deltas)
        self._metrics.stopped(stopped)
        return stopped

    def _process(self, deltas: Sequence[worker_pb2.TokenDelta]) -> list[str]:
        stopped: list[str] = []
        outputs: list[EngineCoreOutput] = []
        for delta in deltas:
            if receiver := self.receivers.get(delta.request_id):
                if self._hand_over(receiver, delta):
                    stopped.append(delta.request_id)
                continue
            try:
                outputs.append(to_engine_output(delta))
            except ValueError as error:
                stopped += self._drop(delta.request_id, error)
        if not outputs:
            return stopped
        try:
            stopped += self._output_processor.process_outputs(outputs).reqs_to_abort
        except Exception as error:
            _log.exception("outputs could not be processed", completions=len(outputs))
            for output in outputs:
                stopped += self._drop(output.request_id, error)
        return stopped

    def fail(self, completion_ids: Sequence[str], error: KvrelayError) -> None:
        """The caller reads what it has not read yet, and then the error."""
        self._metrics.failed(completion_ids)
        for completion_id in completion_ids:
            if receiver := self.receivers.pop(completion_id, None):
                receiver.fail(error)
                continue
            state = self._output_processor.request_states.get(completion_id)
            if state is None:
                continue
            # Without a queue the processor does not tell of an abort, which would come before the error.
            queue, state.queue = state.queue, None
            self._output_processor.abort_requests([completion_id], internal=True)
            if queue is not None:
                queue.put(to_vllm_error(error))

    def refuse(self, completion_ids: Sequence[str], error: KvrelayError) -> None:
        """Like `fail`, for a request that no worker got."""
        self._metrics.refused(error)
        self.fail(completion_ids, error)

    def finished(self, flow: RequestFlow) -> None:
        self._metrics.finished(flow.request.request_id)
        self._timelines[flow.request.external_id] = flow.timeline.to_proto()
        if len(self._timelines) > self._max_timelines:
            self._timelines.popitem(last=False)

    def timeline(self, external_id: str) -> common_pb2.Timeline | None:
        """The timeline of a request that is over, unless many others have ended since."""
        return self._timelines.get(external_id)

    def _hand_over(self, receiver: TokenReceiver, delta: worker_pb2.TokenDelta) -> bool:
        try:
            stopped = receiver.take(delta)
        except Exception as error:
            _log.exception("a token could not be processed", request_id=delta.request_id)
            self._drop(delta.request_id, error)
            return True
        if stopped or delta.finish_reason:
            del self.receivers[delta.request_id]
        return stopped

    def _drop(self, completion_id: str, error: Exception) -> list[str]:
        reason = str(error) or type(error).__name__
        self.fail([completion_id], GenerationFailedError(f"the output could not be processed: {reason}"))
        return [completion_id]
