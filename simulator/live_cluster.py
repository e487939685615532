"""What are running workers like, for the simulator? The times that they have measured, and their sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from kvrelay.coordinator.worker_view import view_of
from kvrelay.simulator.config import EngineLimits, Hardware
from kvrelay.step_times.model import StepTimes
from kvrelay.v1 import cluster_pb2, worker_pb2

Asked = tuple[cluster_pb2.WorkerInfo, worker_pb2.WorkerStatus | None]
"""A worker's record and what it says of itself; None when it does not answer."""


class NotMeasuredError(ValueError):
    """The workers tell too little; the message says what is missing, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveWorkers:
    """What each simulated worker is to be."""

    times: StepTimes
    engine: EngineLimits
    hardware: Hardware


def like_workers(asked: Sequence[Asked]) -> LiveWorkers:
    """Means of the measured times, medians of links, and the least of each size, for simulated workers are all alike.

    Who has measured more counts for more.

    What prompts take is asked of workers that prefill, where there are any, and what steps take of those that decode.
    Raises `NotMeasuredError`.
    """
    answered = [(info, status) for info, status in asked if status is not None]
    if not answered:
        raise NotMeasuredError("no worker of the cluster answers; `kvrelay workers` shows which there are")
    if len(models := {info.model for info, _ in answered}) > 1:
        raise NotMeasuredError(
            f"the cluster serves several models, {', '.join(sorted(models))}; simulated workers have one"
        )
    views = [view_of(info) for info, _ in answered]
    if not views[0].token_bytes:
        raise NotMeasuredError(f"how large KV of {answered[0][0].layout.dtype} is, is not known")
    defaults, engine = Hardware(), EngineLimits()
    links = [link.bytes_per_s for _, status in answered for link in status.links]
    return LiveWorkers(
        times=_times(answered),
        engine=EngineLimits(
            max_batched_tokens=_least((info.max_batched_tokens for info, _ in answered), engine.max_batched_tokens),
            max_running_requests=_least((view.max_running_requests for view in views), engine.max_running_requests),
            capacity_tokens=_least((view.capacity_tokens for view in views), engine.capacity_tokens),
        ),
        hardware=Hardware(
            block_tokens=views[0].block_size_tokens,
            token_bytes=views[0].token_bytes,
            store_bytes=_least((s.store.num_slots * s.store.slot_bytes for _, s in answered), defaults.store_bytes),
            link_bytes_per_s=median(links) if links else defaults.link_bytes_per_s,
        ),
    )


def _times(answered: Sequence[tuple[cluster_pb2.WorkerInfo, worker_pb2.WorkerStatus]]) -> StepTimes:
    measured = [(info.role, StepTimes.of(status.step_times)) for info, status in answered]
    prompts = [(role, times) for role, times in measured if times.num_prefills]
    steps = [times for role, times in measured if times.num_steps and role != cluster_pb2.ROLE_PREFILL]
    prefills = [times for role, times in prompts if role != cluster_pb2.ROLE_DECODE] or [times for _, times in prompts]
    if not prefills or not steps:
        what = "decoded anything" if prefills else "computed a prompt"
        raise NotMeasuredError(
            f"no worker has {what} yet; how long that takes is measured under load: apply some first"
        )
    return StepTimes(
        prefill_fixed_s=_mean((times.prefill_fixed_s, times.num_prefills) for times in prefills),
        prefill_token_s=_mean((times.prefill_token_s, times.num_prefills) for times in prefills),
        prefill_pair_s=_mean((times.prefill_pair_s, times.num_prefills) for times in prefills),
        num_prefills=sum(times.num_prefills for times in prefills),
        step_fixed_s=_mean((times.step_fixed_s, times.num_steps) for times in steps),
        step_request_s=_mean((times.step_request_s, times.num_steps) for times in steps),
        step_context_token_s=_mean((times.step_context_token_s, times.num_steps) for times in steps),
        num_steps=sum(times.num_steps for times in steps),
    )


def _mean(weighted: Iterable[tuple[float, int]]) -> float:
    """Of values with weights above 0."""
    values, weights = zip(*weighted, strict=True)
    return fmean(values, weights)


def _least(values: Iterable[int], default: int) -> int:
    """Of those that are known, which is what 0 is not."""
    return min((value for value in values if value), default=default)
