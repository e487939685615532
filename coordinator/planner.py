"""Which workers get a request, or what is left of one that has lost its own?"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvrelay.coordinator.flow_request import FlowRequest
from kvrelay.coordinator.prefix_index.index import PrefixIndex
from kvrelay.coordinator.prefix_index.prompt import IndexedPrompt
from kvrelay.coordinator.request_flow import RequestFlow
from kvrelay.coordinator.request_trace import RequestTrace
from kvrelay.coordinator.scheduler.base import Scheduler
from kvrelay.coordinator.scheduler.decision import Decision
from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView
from kvrelay.coordinator.worker_pool import WorkerPool


@dataclass(frozen=True, slots=True)
class Planned:
    """What the scheduler has decided, on which knowledge of the prompt, and how long that took."""

    decision: Decision
    prompt: IndexedPrompt
    schedule_s: float


class Planner:
    """Asks one scheduler about the workers of a pool, for one model."""

    def __init__(self, pool: WorkerPool, scheduler: Scheduler, index: PrefixIndex, model: str) -> None:
        self._pool = pool
        self._scheduler = scheduler
        self._index = index
        self._model = model

    def plan(self, request: FlowRequest, trace: RequestTrace) -> Planned:
        """Raises what `Scheduler.plan` raises."""
        began_s = time.perf_counter()
        with trace.span("schedule"):
            views = self._pool.views()
            prompt = self._indexed(request, request.longest, views)
            decision = self._scheduler.plan(self._shape(request, prompt), views)
        return Planned(decision, prompt, time.perf_counter() - began_s)

    def plan_rest(self, flow: RequestFlow) -> Planned:
        """Of the workers that are not known to be unfit for it. Raises what `Scheduler.plan` raises."""
        began_s = time.perf_counter()
        with flow.trace.span("schedule"):
            views = self._fit(flow.unfit_worker_ids)
            prompt = self._indexed(flow.request, flow.longest, views)
            decision = self._scheduler.plan(self._shape_of_rest(flow, prompt), views)
        return Planned(decision, prompt, time.perf_counter() - began_s)

    def has_decoder(self, without: Collection[str] = ()) -> bool:
        """Whether a decode worker serves the model, those left out that are called so."""
        return any(view.serves(self._model) for view in self._fit(without))

    def _fit(self, without: Collection[str]) -> Sequence[WorkerView]:
        return [view for view in self._pool.views() if view.worker_id not in without]

    def _indexed(self, request: FlowRequest, token_ids: Sequence[int], views: Sequence[WorkerView]) -> IndexedPrompt:
        serving = [view for view in views if view.model == self._model]
        return IndexedPrompt(self._index, request.cache_salt, token_ids, serving, time.monotonic())

    def _shape(self, request: FlowRequest, prompt: IndexedPrompt) -> RequestShape:
        return RequestShape(
            model=self._model,
            num_prompt_tokens=len(request.longest),
            num_sequences=len(request.open_completions),
            max_tokens=request.completions[0].sampling.max_tokens,
            num_stored_blocks=prompt.num_stored_blocks(),
            ttft_s=request.terms.ttft_s,
            itl_s=request.terms.itl_s,
            may_split=len(request.open_completions) == 1 or not request.has_begun,
        )

    def _shape_of_rest(self, flow: RequestFlow, prompt: IndexedPrompt) -> RequestShape:
        """Its client has been promised an answer: no target refuses it."""
        num_tokens = len(flow.longest)
        num_generated = num_tokens - len(flow.request.prompt_token_ids)
        return RequestShape(
            model=self._model,
            num_prompt_tokens=num_tokens,
            num_sequences=len(flow.open_ids),
            max_tokens=max(0, flow.request.completions[0].sampling.max_tokens - num_generated),
            num_stored_blocks=prompt.num_stored_blocks(),
            may_split=flow.may_split,
        )
