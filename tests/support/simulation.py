"""Small clusters and loads for the simulator, with times that can be added up in the head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kvrelay.coordinator.admission.config import AdmissionConfig
from kvrelay.coordinator.scheduler.base import Scheduler
from kvrelay.coordinator.scheduler.decision import Candidate, Decision, Plan
from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView
from kvrelay.simulator.config import ClusterConfig, EngineLimits, Hardware
from kvrelay.simulator.simulation import Simulated, simulate
from kvrelay.simulator.timing import FormulaTimes
from kvrelay.step_times.model import StepTimes
from kvrelay.workload.targets import Targets
from kvrelay.workload.trace import TraceRequest

BLOCK = 10
STEP_TIMES = StepTimes(
    prefill_fixed_s=0.5,
    prefill_token_s=0.01,
    prefill_pair_s=0.0,
    step_fixed_s=0.1,
    step_request_s=0.01,
    step_context_token_s=0.0,
)
"""A prompt of 100 tokens takes 1.5 s, a step of 1 sequence 0.11 s."""
HARDWARE = Hardware(
    block_tokens=BLOCK,
    token_bytes=1,
    store_bytes=1000 * BLOCK,
    load_bytes_per_s=1e12,
    link_bytes_per_s=100.0,
    message_s=0.001,
)
"""A block travels for 0.1 s."""
LIMITS = EngineLimits(max_batched_tokens=100, max_running_requests=8, capacity_tokens=1000)
NO_WAITING = AdmissionConfig(dispatch_ahead_s=math.inf)

Choose = Callable[[RequestShape, dict[str, WorkerView]], tuple[str | None, str, str | None]]
"""Ids of the prefill worker, the decode worker and the source."""


class ChosenScheduler(Scheduler):
    """Does what a test says, and keeps what it was asked."""

    name = "chosen"

    def __init__(self, choose: Choose) -> None:
        self._choose = choose
        self.shapes: list[RequestShape] = []

    def plan(self, request: RequestShape, workers: Sequence[WorkerView]) -> Decision:
        self.shapes.append(request)
        views = {view.worker_id: view for view in workers}
        prefill, decode, source = self._choose(request, views)
        return Decision(
            plan=Plan(
                prefill=views[prefill] if prefill else None,
                decode=views[decode],
                source=views[source] if source else None,
            ),
            policy=self.name,
            basis="the test says so",
            num_prompt_tokens=request.num_prompt_tokens,
            chosen=Candidate(decode_worker_id=decode),
        )


def cluster(num_prefill: int = 1, num_decode: int = 1, **changed: object) -> ClusterConfig:
    """Nothing waits in a coordinator, unless its admission is among what is changed."""
    fields: dict[str, object] = {"engine": LIMITS, "hardware": HARDWARE, "admission": NO_WAITING} | changed
    return ClusterConfig(num_prefill=num_prefill, num_decode=num_decode, **fields)  # type: ignore[arg-type]


def request(index: int, arrived_s: float, num_prompt: int, num_output: int, *block_ids: int) -> TraceRequest:
    return TraceRequest(
        index=index,
        arrived_s=arrived_s,
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
        block_ids=block_ids,
        block_tokens=BLOCK,
    )


def run(
    requests: Sequence[TraceRequest], config: ClusterConfig, *schedulers: Scheduler, ttft_s: float | None = None
) -> Simulated:
    return simulate(requests, config, FormulaTimes(STEP_TIMES), schedulers, Targets(ttft_s=ttft_s))
