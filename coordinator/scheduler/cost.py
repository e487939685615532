"""Which plan costs least? The default policy.

    ttft(p, d) = wait(p) + prefill(tokens not stored at p) + what of the transfer to d is not hidden behind that
    cost(p, d) = ttft(p, d) + what others lose, weighted

Others lose when more prompts follow at p, when d's steps take longer with one more sequence, and when d computes the
prompt itself and its sequences stand still meanwhile. Prefill and decode workers are rated each for themselves, and
only the best few of each kind are paired.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from typing import TypeVar

from kvrelay.coordinator.scheduler.base import Scheduler
from kvrelay.coordinator.scheduler.cost_config import CostConfig
from kvrelay.coordinator.scheduler.decision import Decision
from kvrelay.coordinator.scheduler.eligible import Group, eligible_groups
from kvrelay.coordinator.scheduler.estimates import (
    DecodeEstimate,
    DecodeEstimator,
    PromptEstimate,
    PromptEstimator,
    fullest,
)
from kvrelay.coordinator.scheduler.option import Candidates, Option, local_option, split_option
from kvrelay.coordinator.scheduler.targets import within_targets
from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView

_Estimate = TypeVar("_Estimate", PromptEstimate, DecodeEstimate)
_by_cost = itemgetter(0)
_stored_tokens = attrgetter("num_stored_tokens")
_itl_s = attrgetter("itl_s")
_blocked_s = attrgetter("blocked_s")
_MAX_OTHERS = 5


def _computed_s(prompt: PromptEstimate) -> float:
    return prompt.wait_s + prompt.prefill_s


class CostScheduler(Scheduler):
    """Takes the cheapest plan that meets the targets; of plans as good as equal the less loaded of two at random."""

    name = "cost"

    def __init__(self, seed: int = 0, config: CostConfig | None = None) -> None:
        self._random = random.Random(seed).random  # noqa: S311
        self._config = config or CostConfig()

    def plan(self, request: RequestShape, workers: Sequence[WorkerView]) -> Decision:
        """See `Scheduler.plan`."""
        options: list[Option] = []
        for group in eligible_groups(request, workers):
            options += self._options(request, group)
        chosen = self._choose(within_targets(options, request))
        others = [option for option in sorted(options, key=_by_cost)[: _MAX_OTHERS + 1] if option is not chosen]
        return Decision(
            plan=chosen.plan(),
            policy=self.name,
            basis="lowest cost",
            num_prompt_tokens=request.num_prompt_tokens,
            chosen=chosen.candidate(),
            others=Candidates(others[:_MAX_OTHERS]),
        )

    def _options(self, request: RequestShape, group: Group) -> list[Option]:
        """At least one."""
        config = self._config
        holder = fullest(request, chain(group.prefillers, group.decoders))
        decodes = self._best_decodes(request, group.decoders)
        options: list[Option] = []
        if config.local_prefill != "always" and group.prefillers:
            prompts = self._best_prompts(request, group.prefillers, holder)
            options = [
                split_option(prompt, decode, config)
                for prompt in prompts
                for decode in decodes
                if prompt.worker is not decode.worker
            ]
        if config.local_prefill != "never" or not options:
            crowding = self._crowding(group.decoders)
            estimator = PromptEstimator(request, config, holder=holder, crowding=crowding)
            options += [local_option(estimator.at(decode.worker), decode) for decode in decodes]
        return options

    def _best_prompts(
        self, request: RequestShape, prefillers: Sequence[WorkerView], holder: WorkerView | None
    ) -> list[PromptEstimate]:
        estimator = PromptEstimator(request, self._config, holder=holder, crowding=self._crowding(prefillers))
        prompts = list(map(estimator.at, self._rotated(prefillers)))
        best = sorted(prompts, key=_by_cost)[: self._config.num_kept]
        if request.ttft_s is not None:
            best.append(min(prompts, key=_computed_s))
        return _once_each(best)

    def _best_decodes(self, request: RequestShape, decoders: Sequence[WorkerView]) -> list[DecodeEstimate]:
        """The one that has most of the prompt among them: it need not have most time."""
        decodes = list(map(DecodeEstimator(request, self._config).at, self._rotated(decoders)))
        best = sorted(decodes, key=_by_cost)[: self._config.num_kept]
        if request.num_stored_blocks:
            best.append(max(decodes, key=_stored_tokens))
        if request.itl_s is not None:
            best.append(min(decodes, key=_itl_s))
        if request.ttft_s is not None:
            best.append(min(decodes, key=_blocked_s))
        return _once_each(best)

    def _rotated(self, workers: Sequence[WorkerView]) -> Sequence[WorkerView]:
        """From a random one on: of many that are equal, coordinators do not all keep the same few."""
        first = int(self._random() * len(workers))
        return [*workers[first:], *workers[:first]]

    def _crowding(self, workers: Sequence[WorkerView]) -> float:
        """What a second of a worker's time costs those who come after: as many as wait now."""
        num_waiting = sum(worker.num_queued_prompts for worker in workers) / len(workers)
        return min(self._config.max_crowding, self._config.crowding_weight * num_waiting)

    def _choose(self, options: Sequence[Option]) -> Option:
        """Of two random ones that are near the best: all coordinators would send their requests to the very best."""
        best = min(options, key=_by_cost)
        limit = best.cost + max(self._config.near_s, self._config.near_share * best.ttft_s)
        near = [option for option in options if option.cost <= limit]
        if len(near) == 1:
            return best
        one, other = (near[int(self._random() * len(near))] for _ in range(2))
        return min(one, other, key=_load)


def _once_each(estimates: list[_Estimate]) -> list[_Estimate]:
    return list({estimate.worker.worker_id: estimate for estimate in estimates}.values())


def _load(option: Option) -> tuple[float, int, int]:
    prompt, decode = option.prompt.worker, option.decode.worker
    num_assigned = decode.num_assigned if option.is_local else prompt.num_assigned + decode.num_assigned
    return option.prompt.wait_s, decode.num_running_requests, num_assigned
