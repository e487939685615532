"""vLLM's EngineClient over a cluster: its front end here, its engines on the workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm.inputs import EngineInput, PromptType
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.renderers.inputs.preprocess import extract_prompt_components
from vllm.sampling_params import SamplingParams
from vllm.tasks import SupportedTask
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.parallel_sampling import ParentRequest

from kvrelay.coordinator.admission.capacity import WorkerCapacity
from kvrelay.coordinator.admission.config import AdmissionConfig
from kvrelay.coordinator.admitting import Admitting
from kvrelay.coordinator.dispatcher import Dispatcher, DispatcherConfig
from kvrelay.coordinator.engine_controls import EngineControls
from kvrelay.coordinator.flow_request import FlowRequest
from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.metrics.requests import RequestMetrics
from kvrelay.coordinator.output_queue import OutputQueue
from kvrelay.coordinator.output_sink import EngineOutputSink, TokenReceiver
from kvrelay.coordinator.prefix_index.index import PrefixIndex
from kvrelay.coordinator.prompt_limits import MAX_N
from kvrelay.coordinator.request_intake import TASKS, RequestIntake
from kvrelay.coordinator.request_terms import current_terms
from kvrelay.coordinator.request_trace import RequestTrace
from kvrelay.coordinator.scheduler.base import Scheduler
from kvrelay.coordinator.timeline import RequestTimeline
from kvrelay.coordinator.vllm_errors import from_vllm_error, to_vllm_error
from kvrelay.coordinator.worker_pool import WorkerPool
from kvrelay.errors import InvalidRequestError, KvrelayError, NoWorkersError, OverloadedError
from kvrelay.tracing import Tracing, context_from_headers, current_context
from kvrelay.v1 import common_pb2, inference_pb2, worker_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterEngineConfig:
    kv_wait_ms: int = 10_000
    """How long a decode worker waits for announced KV blocks before it computes what is missing."""
    max_plans: int = 3
    """See `DispatcherConfig`."""
    wait_for_workers_s: float = 60.0
    """How long a request that has lost its worker, or is queued, waits for another to come."""
    max_requests: int = 4096
    """Completions in flight; more are refused with RESOURCE_EXHAUSTED."""
    max_completions_per_request: int = MAX_N
    max_kept_requests: int = 4096
    """The latest ones, whose decision and timeline can still be asked for."""
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    """What may wait for workers, and in which order."""


class ClusterEngine(EngineControls):
    """Generates on the workers of a pool, to which it listens: `async with pool.running(engine)`.

    vLLM's serving classes and our gRPC service use it like a local engine. All of it belongs to one
    event loop. `close()` ends the front end's threads.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        pool: WorkerPool,
        *,
        scheduler: Scheduler,
        index: PrefixIndex | None = None,
        tracing: Tracing | None = None,
        config: ClusterEngineConfig | None = None,
    ) -> None:
        """`index` says which worker has what of a prompt; without one only this engine's own requests tell that."""
        self.vllm_config = front_end.vllm_config
        self.model_config = front_end.model_config
        self.renderer = front_end.renderer
        self.input_processor = front_end.input_processor
        self.served_model_name = front_end.served_model_name
        self._front_end = front_end
        self._pool = pool
        self._tracing = tracing or Tracing()
        self._config = config or ClusterEngineConfig()
        self._outputs = front_end.output_processor
        self.metrics = RequestMetrics()
        self._sink = EngineOutputSink(self._outputs, self.metrics, self._config.max_kept_requests)
        dispatcher_config = DispatcherConfig(
            model=front_end.served_model_name,
            kv_wait_ms=self._config.kv_wait_ms,
            max_plans=self._config.max_plans,
            wait_for_workers_s=self._config.wait_for_workers_s,
        )
        self._dispatcher = Dispatcher(pool, self._sink, scheduler, index or PrefixIndex(), dispatcher_config)
        admission = self._config.admission
        capacity = WorkerCapacity(
            pool.views,
            front_end.served_model_name,
            dispatch_ahead_s=admission.dispatch_ahead_s,
            may_prefill_locally=scheduler.may_prefill_locally,
        )
        self._admitting = Admitting(
            self._dispatcher,
            self._sink.refuse,
            admission,
            capacity,
            wait_for_workers_s=self._config.wait_for_workers_s,
        )
        self._workers_changed = asyncio.Event()
        self.intake = RequestIntake(front_end, max_completions_per_request=self._config.max_completions_per_request)

    @property
    def is_ready(self) -> bool:
        """Whether a decode worker serves the model now."""
        return any(view.serves(self.served_model_name) for view in self._pool.views())

    async def watch_ready(self) -> AsyncIterator[bool]:
        """`is_ready` now and whenever the workers have changed; for one reader."""
        while True:
            self._workers_changed.clear()
            yield self.is_ready
            await self._workers_changed.wait()

    @property
    def num_requests(self) -> int:
        """Requests in flight, those that wait for workers included."""
        return self._dispatcher.num_requests + self.num_queued

    @property
    def num_queued(self) -> int:
        """Requests that wait for workers."""
        return self._admitting.queue.num_requests

    def timeline(self, request_id: str) -> common_pb2.Timeline | None:
        """What happened to a request that has ended, by the id that `generate` was given."""
        return self._sink.timeline(request_id)

    def decision(self, request_id: str) -> inference_pb2.Decision | None:
        """Why a request of late went where it went, by its id or that of its answer."""
        return self._sink.decisions.find(request_id)

    async def generate(
        self,
        prompt: EngineCoreRequest | PromptType | EngineInput | AsyncGenerator[Any, None],
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        kv_hints: Any = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
        resume: Sequence[inference_pb2.Resume] = (),
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield outputs as `AsyncLLM.generate` does.

        With `resume` it goes on after what that says; this comes out again first.
        Closing or cancelling the generator ends the request on the workers. Raises
        `VLLMValidationError` for what can never work and `ClusterRequestError` for the rest.
        """
        timeline, trace = self._begin(request_id, trace_headers)
        queue: OutputQueue | None = None
        finished = False
        try:
            if lora_request is not None:
                raise InvalidRequestError("LoRA adapters are not offered", field="model")
            if sampling_params.structured_outputs and reasoning_parser_kwargs and not reasoning_ended:
                raise InvalidRequestError("structured output after reasoning is not offered", field="response_format")
            self._admit(sampling_params.n)
            request = await self.intake.process(
                prompt, sampling_params, request_id, tokenization_kwargs=tokenization_kwargs, priority=priority
            )
            text = prompt_text or self._text_of(prompt)
            queue = self._submit(request, text, timeline, trace, resume)
            while not finished:
                output = await queue.next()
                finished = output.finished
                yield output
        except KvrelayError as error:
            self.metrics.refused(error)
            trace.close(error.message)
            raise to_vllm_error(error) from error
        except Exception as error:
            if queue is None:
                self.metrics.refused(from_vllm_error(error))
            trace.close(str(error))
            raise
        finally:
            trace.close("" if finished else "cancelled")
            if queue is not None and not finished:
                self._abort([queue.request_id], internal=True)

    async def open_stream(
        self, request: FlowRequest, receiver: TokenReceiver, trace_headers: Mapping[str, str]
    ) -> Callable[[], None]:
        """Generate the only completion of a request that was checked into a receiver.

        Returns what ends it: to be called in any case, also when the receiver has got everything. Raises
        `KvrelayError`; then the receiver is not called. One that waits for workers first may fail later.
        """
        timeline, trace = self._begin(request.external_id, trace_headers)
        try:
            self._admit(1)
            self._sink.receivers[request.request_id] = receiver
            try:
                self._admitting.submit(request, timeline, trace)
            except BaseException:
                self._sink.receivers.pop(request.request_id)
                raise
        except Exception as error:
            self.metrics.refused(from_vllm_error(error))
            trace.close(str(error))
            raise
        return partial(self._close_stream, request.request_id, trace)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Refuse at once what `generate` would refuse now for want of room or workers."""
        try:
            if not self.is_ready:
                raise NoWorkersError(f"no decode worker serves model {self.served_model_name!r} now; try again later")
            self._admit(n)
            self._admitting.check(current_terms.get())
        except KvrelayError as error:
            self.metrics.refused(error)
            raise to_vllm_error(error) from error

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests by the ids that `generate` was given."""
        self._abort([request_id] if isinstance(request_id, str) else list(request_id), internal=False)

    async def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        return TASKS

    async def is_tracing_enabled(self) -> bool:
        return self._tracing.enabled

    async def check_health(self) -> None:
        """The coordinator lives as long as it answers; `is_ready` tells whether workers do."""

    @property
    def is_running(self) -> bool:
        return True

    @property
    def is_stopped(self) -> bool:
        return False

    @property
    def errored(self) -> bool:
        return False

    @property
    def dead_error(self) -> BaseException:
        return RuntimeError("a cluster engine does not die with a worker")

    def shutdown(self, timeout: float | None = None) -> None:
        self._front_end.close()

    def on_step(self, worker_id: str, step: worker_pb2.StepOutputs) -> None:
        self._dispatcher.on_step(worker_id, step)

    def on_request_failed(self, worker_id: str, failed: worker_pb2.RequestFailed) -> None:
        self._dispatcher.on_request_failed(worker_id, failed)

    def on_worker_lost(self, worker_id: str, reason: str) -> None:
        self._dispatcher.on_worker_lost(worker_id, reason)

    def on_worker_leaving(self, worker_id: str) -> None:
        self._dispatcher.on_worker_leaving(worker_id)

    def on_workers_changed(self) -> None:
        """Accept only what every worker of the model can hold."""
        limits = [view.max_model_len_tokens for view in self._serving() if view.max_model_len_tokens]
        self._front_end.limit_model_len(min(limits, default=None))
        self._workers_changed.set()
        self._dispatcher.on_workers_changed()

    def on_closed(self) -> None:
        self._admitting.give_up()
        self._dispatcher.on_closed()

    def _serving(self) -> list[Any]:
        return [view for view in self._pool.views() if view.model == self.served_model_name]

    def _admit(self, num_completions: int) -> None:
        in_flight = self._outputs.get_num_unfinished_requests() + len(self._sink.receivers)
        if in_flight + num_completions > self._config.max_requests:
            raise OverloadedError(
                f"{in_flight} completions are in flight and at most {self._config.max_requests} are taken; try later"
            )

    def _submit(
        self,
        request: EngineCoreRequest,
        prompt_text: str | None,
        timeline: RequestTimeline,
        trace: RequestTrace,
        resume: Sequence[inference_pb2.Resume],
    ) -> OutputQueue:
        """Register the completions with the output processor and start them; on failure nothing is left."""
        self.input_processor.assign_request_id(request)
        assert request.sampling_params is not None
        request_id = request.request_id
        queue = OutputQueue(request.sampling_params.output_kind, request_id)
        parent = ParentRequest(request) if request.sampling_params.n > 1 else None
        children = _children(request, parent) if parent else [request]
        for index, child in enumerate(children):
            self._outputs.add_request(child, prompt_text, parent, index, queue)
        try:
            flow_request = self.intake.flow_request(request, children, current_terms.get(), resume)
            self._admitting.submit(flow_request, timeline, trace)
        except BaseException:
            self._outputs.abort_requests([request_id], internal=True)
            raise
        return queue

    def _begin(self, request_id: str, trace_headers: Mapping[str, str] | None) -> tuple[RequestTimeline, RequestTrace]:
        timeline = RequestTimeline()
        timeline.mark("gateway.received")
        parent = context_from_headers(trace_headers) if trace_headers else current_context()
        return timeline, RequestTrace(self._tracing, parent, {"request.id": request_id})

    def _close_stream(self, request_id: str, trace: RequestTrace) -> None:
        if self._sink.receivers.pop(request_id, None) is not None:
            trace.close("cancelled")
            self._admitting.cancel([request_id])

    def _abort(self, request_ids: list[str], *, internal: bool) -> None:
        self._admitting.cancel(self._outputs.abort_requests(request_ids, internal))

    def _text_of(self, prompt: Any) -> str | None:
        return extract_prompt_components(self.model_config, prompt).text


def _children(request: EngineCoreRequest, parent: ParentRequest) -> list[EngineCoreRequest]:
    """One request per completion, as `AsyncLLM.add_request` makes them: own ids, own seeds."""
    children = []
    for index in range(parent.n):
        child = copy(request)
        child.request_id, child.sampling_params = parent.get_child_info(index)
        children.append(child)
    return children
