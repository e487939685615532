"""What does a simulated coordinator do with a request? Admit, match, plan, dispatch, account; the code is real."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from kvrelay.coordinator.admission.capacity import WorkerCapacity
from kvrelay.coordinator.admission.config import AdmissionConfig
from kvrelay.coordinator.prefix_index.index import PrefixIndex
from kvrelay.coordinator.prefix_index.keys import prefix_keys
from kvrelay.coordinator.scheduler.base import Scheduler
from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView
from kvrelay.coordinator.worker_load import WorkerLoad
from kvrelay.errors import InvalidRequestError, KvrelayError, OverloadedError
from kvrelay.simulator.admission import AdmissionCalls, SimulatedAdmission
from kvrelay.simulator.block_names import BlockNamer
from kvrelay.simulator.events import EventLoop
from kvrelay.simulator.host_store import StoreChange
from kvrelay.simulator.job import Job
from kvrelay.simulator.worker import SimulatedWorker
from kvrelay.v1 import worker_pb2
from kvrelay.workload.outcome import Outcome, Status
from kvrelay.workload.targets import Targets
from kvrelay.workload.trace import TraceRequest


@dataclass(slots=True, kw_only=True)
class PlanCounts:
    """What became of requests."""

    num_split: int = 0
    """Prefilled by one worker, decoded by another."""
    num_local: int = 0
    """Prefilled where they were decoded."""
    num_fetched: int = 0
    """Of both, those with blocks fetched from a third."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Of all requests."""

    targets: Targets
    """Plans are to meet them."""
    admission: AdmissionConfig
    on_waiting: Callable[[int], None]
    """Called with 1 when a request begins to wait for a worker's room, and with -1 when it does not any more."""


class _Known:
    """A worker, as far as a coordinator knows it."""

    def __init__(self, view: WorkerView) -> None:
        self.view = view
        self.load = WorkerLoad()

    @property
    def has_work(self) -> bool:
        view = self.view
        return bool(view.num_queued_prompts or view.num_queued_prompt_tokens or view.num_running_requests)


class SimulatedCoordinator:
    """Has its own scheduler, index and accounts, as a process has. What it knows of workers is as late as it is."""

    def __init__(
        self,
        loop: EventLoop,
        scheduler: Scheduler,
        workers: Sequence[SimulatedWorker],
        views: Sequence[WorkerView],
        namer: BlockNamer,
        terms: Terms,
        on_outcome: Callable[[Outcome], None],
    ) -> None:
        self._loop = loop
        self._scheduler = scheduler
        self._workers = {worker.worker_id: worker for worker in workers}
        hardware = workers[0].hardware
        self._message_s = hardware.message_s
        self._block_tokens = hardware.block_tokens
        self._views = views
        self._known = {view.worker_id: _Known(view) for view in views}
        self._index = PrefixIndex()
        self._namer = namer
        self._targets = terms.targets
        self._on_outcome = on_outcome
        calls = AdmissionCalls(start=self._start, refuse=self._refuse, waiting=terms.on_waiting)
        capacity = WorkerCapacity(
            lambda: views,
            views[0].model,
            dispatch_ahead_s=terms.admission.dispatch_ahead_s,
            may_prefill_locally=scheduler.may_prefill_locally,
        )
        self._admission = SimulatedAdmission(loop, capacity, terms.admission, calls)
        self.counts = PlanCounts()

    def submit(self, request: TraceRequest) -> None:
        """Serve a request, or refuse it; in any case its outcome follows, once."""
        try:
            _check_length(request, self._views)
        except InvalidRequestError as error:
            self._refuse(request, error)
            return
        self._admission.submit(request, self._targets.ttft_s)

    def _start(self, request: TraceRequest, ttft_s: float | None) -> None:
        """Its turn has come."""
        now_s, namer = self._loop.now_s, self._namer
        names = namer.prompt(request)
        keys = prefix_keys(names[: request.num_prompt_tokens // self._block_tokens])
        self._index.expire(now_s)
        shape = RequestShape(
            model="",
            num_prompt_tokens=request.num_prompt_tokens,
            max_tokens=request.num_output_tokens,
            num_stored_blocks=self._index.match(keys) if len(keys) else {},
            ttft_s=ttft_s,
            itl_s=self._targets.itl_s,
        )
        try:
            decision = self._scheduler.plan(shape, self._views)
        except KvrelayError as error:
            self._refuse(request, error)
            return
        plan = decision.plan
        for worker in (plan.decode, plan.prefill):
            if worker is not None:
                self._index.speculate(worker.worker_id, keys, now_s)
        self._dispatch(
            Job(
                request=request,
                names=names,
                answer_names=namer.answer(request),
                prefill=self._workers[plan.prefill.worker_id] if plan.prefill else None,
                decode=self._workers[plan.decode.worker_id],
                source=self._workers[plan.source.worker_id] if plan.source else None,
            ),
            request.num_prompt_tokens - decision.chosen.num_cached_tokens,
        )

    @property
    def is_idle(self) -> bool:
        """Whether it knows of nothing that any worker has to do."""
        return not any(known.has_work for known in self._known.values())

    def take_report(self, worker_id: str, status: worker_pb2.WorkerStatus) -> None:
        """What a worker tells of its load."""
        known = self._known[worker_id]
        known.load.report(status)
        self._changed(known)

    def take_change(self, worker_id: str, change: StoreChange) -> None:
        """What a worker tells of its blocks."""
        self._index.remove(worker_id, prefix_keys(change.removed))
        self._index.add(worker_id, prefix_keys(change.added))

    def _refuse(self, request: TraceRequest, error: KvrelayError) -> None:
        rejected = isinstance(error, OverloadedError)
        self._on_outcome(
            Outcome(
                index=request.index,
                arrived_s=request.arrived_s,
                status=Status.REJECTED if rejected else Status.FAILED,
                num_prompt_tokens=request.num_prompt_tokens,
                error="" if rejected else error.message,
            )
        )

    def _changed(self, known: _Known) -> None:
        known.load.fill(known.view)
        self._admission.changed()

    def _dispatch(self, job: Job, num_uncached_tokens: int) -> None:
        self.counts.num_fetched += job.source is not None
        decoding, computing = self._known[job.decode.worker_id], self._known[job.computing.worker_id]
        decoding.load.add_sequences(job.request_id, 1, job.request.num_prompt_tokens)
        computing.load.add_prompt(job.request_id, num_uncached_tokens)
        for known in (decoding, computing):
            known.view.num_assigned += 1
            known.load.fill(known.view)
        if job.prefill is None:
            self.counts.num_local += 1
            self._send_decode(job)
        else:
            self.counts.num_split += 1
            self._loop.after(self._message_s, job.prefill.prefill, job, partial(self._on_prefilled, job))

    def _send_decode(self, job: Job) -> None:
        on_first, on_finished = partial(self._on_first_token, job), partial(self._on_finished, job)
        self._known[job.decode.worker_id].load.sent_sequences(job.request_id)
        self._loop.after(self._message_s, job.decode.decode, job, on_first, on_finished)

    def _on_first_token(self, job: Job) -> None:
        known = self._known[job.computing.worker_id]
        known.load.remove_prompt(job.request_id)
        self._changed(known)

    def _on_prefilled(self, job: Job) -> None:
        self._on_first_token(job)
        if job.request.num_output_tokens > 1:
            self._send_decode(job)
        else:
            job.when_settled(partial(job.decode.let_go, job))
            self._on_finished(job)

    def _on_finished(self, job: Job) -> None:
        known = self._known[job.decode.worker_id]
        known.load.remove_sequences(job.request_id)
        self._changed(known)
        self._on_outcome(job.outcome(self._message_s))


def _check_length(request: TraceRequest, views: Sequence[WorkerView]) -> None:
    """What the prompt and its answer need together; workers would cut the answer, which compares with nothing."""
    longest = max(view.max_model_len_tokens for view in views)
    num_tokens = request.num_prompt_tokens + request.num_output_tokens
    if num_tokens > longest:
        raise InvalidRequestError(f"prompt and answer are longer than the {longest} tokens that engines have room for")
