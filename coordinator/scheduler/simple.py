"""Which workers do the policies take that look at one thing only? "cost" is compared with them."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from kvrelay.coordinator.scheduler.base import Scheduler
from kvrelay.coordinator.scheduler.cost_config import CostConfig
from kvrelay.coordinator.scheduler.decision import Decision
from kvrelay.coordinator.scheduler.eligible import eligible_groups
from kvrelay.coordinator.scheduler.estimates import DecodeEstimator, PromptEstimator
from kvrelay.coordinator.scheduler.option import local_option, split_option
from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView


class _OneThing(Scheduler):
    """Takes a decode worker, then another worker that can prefill for it; it splits wherever there is one."""

    basis: ClassVar[str]

    def __init__(self, seed: int = 0, config: CostConfig | None = None) -> None:
        """What the plan costs is predicted for those who want to know; nothing depends on it."""
        self._random = random.Random(seed)  # noqa: S311
        self._config = config or CostConfig()

    def plan(self, request: RequestShape, workers: Sequence[WorkerView]) -> Decision:
        """See `Scheduler.plan`. Targets are not looked at."""
        groups = eligible_groups(request, workers)
        decode = self._decode(request, [worker for group in groups for worker in group.decoders])
        prefillers = [
            worker
            for group in groups
            for worker in group.prefillers
            if request.may_split and worker is not decode and worker.fingerprint == decode.fingerprint
        ]
        prefill = self._prefill(request, prefillers) if prefillers else decode
        prompt = PromptEstimator(request, self._config).at(prefill)
        decoding = DecodeEstimator(request, self._config).at(decode)
        option = split_option(prompt, decoding, self._config) if prefillers else local_option(prompt, decoding)
        return Decision(
            plan=option.plan(),
            policy=self.name,
            basis=self.basis,
            num_prompt_tokens=request.num_prompt_tokens,
            chosen=option.candidate(),
        )

    @abstractmethod
    def _prefill(self, request: RequestShape, workers: Sequence[WorkerView]) -> WorkerView:
        """Choose one; there is at least one."""

    @abstractmethod
    def _decode(self, request: RequestShape, workers: Sequence[WorkerView]) -> WorkerView:
        """Choose one; there is at least one."""


class LeastLoadedScheduler(_OneThing):
    """Equal workers take turns."""

    name = "least-loaded"
    basis = "fewest queued tokens, fewest sequences"

    def _prefill(self, request: RequestShape, workers: Sequence[WorkerView]) -> WorkerView:
        return min(workers, key=_prefill_load)

    def _decode(self, request: RequestShape, workers: Sequence[WorkerView]) -> WorkerView:
        return min(workers, key=_decode_load)


class RoundRobinScheduler(_OneThing):
    """In the order of worker ids; one who joins gets a turn in his place."""

    name = "round-robin"
    basis = "next in turn"

    def __init__(self, seed: int = 0, config: CostConfig | None = None) -> None:
        super().__init__(seed, config)
        self._last_prefill_id = self._last_decode_id = ""

    def _prefill(self, request: RequestShape, workers: Sequence[WorkerView]) -> WorkerView:
        chosen = _next(workers, self._last_prefill_id)
        self._last_prefill_id = chosen.worker_id
        return chosen

    def _decode(self, request: RequestShape, workers: Sequence[WorkerView]) -> WorkerView:
        chosen = _next(workers, self._last_decode_id)
        self._last_decode_id = chosen.worker_id
        return chosen


class WeightedScheduler(_OneThing):
    """At random, each worker as often as its weight says."""

    name = "weighted"
    basis = "at random by weight"

    def _prefill(self, request: RequestShape, workers: Sequence[WorkerView]) -> WorkerView:
        return self._random.choices(workers, [worker.weight for worker in workers])[0]

    _decode = _prefill


class RandomScheduler(_OneThing):
    name = "random"
    basis = "at random"

    def _prefill(self, request: RequestShape, workers: Sequence[WorkerView]) -> WorkerView:
        return self._random.choice(workers)

    _decode = _prefill


class PrefixOnlyScheduler(_OneThing):
    """Of those that have equally much the least loaded."""

    name = "prefix-only"
    basis = "most of the prefix stored"

    def _prefill(self, request: RequestShape, workers: Sequence[WorkerView]) -> WorkerView:
        return min(_fullest(request, workers), key=_prefill_load)

    def _decode(self, request: RequestShape, workers: Sequence[WorkerView]) -> WorkerView:
        return min(_fullest(request, workers), key=_decode_load)


def _fullest(request: RequestShape, workers: Sequence[WorkerView]) -> Sequence[WorkerView]:
    stored = request.num_stored_blocks
    most = max(stored.get(worker.worker_id, 0) for worker in workers)
    return [worker for worker in workers if stored.get(worker.worker_id, 0) == most]


def _next(workers: Sequence[WorkerView], last_id: str) -> WorkerView:
    return min(workers, key=lambda worker: (worker.worker_id <= last_id, worker.worker_id))


def _decode_load(worker: WorkerView) -> tuple[int, int, str]:
    return worker.num_running_requests, worker.num_assigned, worker.worker_id


def _prefill_load(worker: WorkerView) -> tuple[int, int, str]:
    return worker.num_queued_prompt_tokens, worker.num_assigned, worker.worker_id
