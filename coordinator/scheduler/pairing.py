"""Which pairs of workers are rated? The best few of each kind; all that may be in time, before a request is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from typing import TypeVar

from kvrelay.coordinator.scheduler.cost_config import CostConfig
from kvrelay.coordinator.scheduler.eligible import Group
from kvrelay.coordinator.scheduler.estimates import (
    DecodeEstimate,
    DecodeEstimator,
    PromptEstimate,
    PromptEstimator,
    fullest,
)
from kvrelay.coordinator.scheduler.option import Option, local_option, split_option
from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView

_Estimate = TypeVar("_Estimate", PromptEstimate, DecodeEstimate)
_by_cost = itemgetter(0)
_stored_tokens = attrgetter("num_stored_tokens")
_itl_s = attrgetter("itl_s")
_blocked_s = attrgetter("blocked_s")


def _computed_s(prompt: PromptEstimate) -> float:
    return prompt.wait_s + prompt.prefill_s


class Pairing:
    """The ways in which one group of workers can serve one request.

    Prefill and decode workers are rated each for themselves, in an order that begins at a random one: of many that are
    equal, coordinators do not all keep the same few.
    """

    __slots__ = ("_config", "_decodes", "_group", "_holder", "_prompts", "_request")

    def __init__(self, request: RequestShape, group: Group, config: CostConfig, random: Callable[[], float]) -> None:
        self._request = request
        self._config = config
        self._holder = fullest(request, chain(group.prefillers, group.decoders))
        self._group = Group(_rotated(group.decoders, random), _rotated(group.prefillers, random))
        self._decodes = list(map(DecodeEstimator(request, config).at, self._group.decoders))
        self._prompts: list[PromptEstimate] = []
        if config.local_prefill != "always" and request.may_split and group.prefillers:
            self._prompts = self._prompts_at(self._group.prefillers, self._holder)

    def best(self) -> list[Option]:
        """The best few of each kind with each other; at least one."""
        decodes = self._best_decodes()
        options = self._split(self._best_prompts(), decodes)
        return options + self._local(decodes, self._holder, bool(options))

    def all_in_time(self) -> list[Option]:
        """All that may be in time for the first token, and each worker with the best few, fetching or not.

        A prompt that is late by itself is late with every decode worker: under overload there are few pairs.
        """
        prompts, decodes, ttft_s = self._prompts, self._decodes, self._request.ttft_s
        in_time = [prompt for prompt in prompts if ttft_s is None or _computed_s(prompt) <= ttft_s]
        options = self._split(in_time, decodes)
        late = [prompt for prompt in prompts if prompt not in in_time]
        if self._holder and prompts:
            late += self._prompts_at(self._group.prefillers, None)
        options += self._split(late, self._best_decodes())
        is_split = bool(options)
        for holder in {id(holder): holder for holder in (self._holder, None)}.values():
            options += self._local(decodes, holder, is_split)
        return options

    def _split(self, prompts: Sequence[PromptEstimate], decodes: Sequence[DecodeEstimate]) -> list[Option]:
        config = self._config
        return [
            split_option(prompt, decode, config)
            for prompt in prompts
            for decode in decodes
            if prompt.worker is not decode.worker
        ]

    def _local(self, decodes: Sequence[DecodeEstimate], holder: WorkerView | None, is_split: bool) -> list[Option]:
        """Prompts computed by decode workers, if they may or nobody else can."""
        if self._config.local_prefill == "never" and is_split:
            return []
        crowding = self._crowding(self._group.decoders)
        estimator = PromptEstimator(self._request, self._config, holder=holder, crowding=crowding)
        return [local_option(estimator.at(decode.worker), decode) for decode in decodes]

    def _prompts_at(self, workers: Sequence[WorkerView], holder: WorkerView | None) -> list[PromptEstimate]:
        estimator = PromptEstimator(self._request, self._config, holder=holder, crowding=self._crowding(workers))
        return list(map(estimator.at, workers))

    def _best_prompts(self) -> list[PromptEstimate]:
        prompts = self._prompts
        best = sorted(prompts, key=_by_cost)[: self._config.num_kept]
        if prompts and self._request.ttft_s is not None:
            best.append(min(prompts, key=_computed_s))
        return _once_each(best)

    def _best_decodes(self) -> list[DecodeEstimate]:
        """The one that has most of the prompt among them: it need not have most time."""
        decodes, request = sorted(self._decodes, key=_by_cost), self._request
        best = decodes[: self._config.num_kept]
        if request.num_stored_blocks:
            best.append(max(decodes, key=_stored_tokens))
        if request.itl_s is not None:
            best.append(min(decodes, key=_itl_s))
        if request.ttft_s is not None:
            best.append(min(decodes, key=_blocked_s))
        return _once_each(best)

    def _crowding(self, workers: Sequence[WorkerView]) -> float:
        """What a second of a worker's time costs those who come after: as many as wait now."""
        num_waiting = sum(worker.num_queued_prompts for worker in workers) / len(workers)
        return min(self._config.max_crowding, self._config.crowding_weight * num_waiting)


def _rotated(workers: Sequence[WorkerView], random: Callable[[], float]) -> list[WorkerView]:
    first = int(random() * len(workers))
    return [*workers[first:], *workers[:first]]


def _once_each(estimates: list[_Estimate]) -> list[_Estimate]:
    return list({estimate.worker.worker_id: estimate for estimate in estimates}.values())
