"""How well was a load served? Figures over the outcomes of its requests, for a cluster and for the simulator alike."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvrelay.workload.latencies import Latencies, latencies_of
from kvrelay.workload.outcome import Outcome, Status
from kvrelay.workload.targets import Targets

_MOST_ERRORS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Of one figure, linearly interpolated between samples; None where there is no sample."""

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Requests that were completed and kept all targets."""

    targets: Targets
    num_requests: int
    requests_per_s: float | None
    share: float | None
    """Of all requests: one that was rejected or failed did not keep its targets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One load. Latencies are of completed requests and count from when each was due.

    A rate or share of nothing is None.
    """

    num_requests: int
    num_completed: int
    num_rejected: int
    num_failed: int
    duration_s: float
    """From the first arrival to the last token or arrival."""
    offered_requests_per_s: float | None
    """Arrivals per second, between the first and the last one."""
    requests_per_s: float | None
    """Completed."""
    prompt_tokens_per_s: float | None
    """Of completed requests, cached ones included."""
    output_tokens_per_s: float | None
    """Of all requests."""
    num_prompt_tokens: int
    """Of completed requests."""
    num_cached_tokens: int | None
    """Of these; None when nobody told."""
    prefix_hit_rate: float | None
    """Cached prompt tokens over prompt tokens."""
    num_output_tokens: int
    """Of all requests."""
    goodput: Goodput
    ttft_s: Percentiles
    itl_s: Percentiles
    """Every gap between two tokens of a request is a sample; tokens that came together have a gap of 0."""
    tpot_s: Percentiles
    """The mean gap of each request of two tokens or more is a sample."""
    e2e_s: Percentiles
    errors: Mapping[str, int] = field(default_factory=dict)
    """Message -> number of requests that failed with it; the most frequent ones."""

    def to_json(self) -> dict[str, Any]:
        """The fields by their names, nested as they are."""
        return dataclasses.asdict(self)


def summarize(
    outcomes: Iterable[Outcome],
    targets: Targets | None = None,
    *,
    duration_s: float | None = None,
    caching_known: bool = True,
) -> Summary:
    """The figures of a load, in any order of its outcomes.

    `duration_s` overrides the duration that follows from the outcomes; `caching_known` is false when the server does
    not tell what it had cached.
    """
    outcomes = list(outcomes)
    completed = [outcome for outcome in outcomes if outcome.status is Status.COMPLETED]
    latencies = latencies_of(completed)
    statuses = Counter(outcome.status for outcome in outcomes)
    duration_s = _duration_s(outcomes) if duration_s is None else duration_s
    num_prompt_tokens = sum(outcome.num_prompt_tokens for outcome in completed)
    num_cached_tokens = sum(outcome.num_cached_tokens for outcome in completed) if caching_known else None
    num_output_tokens = sum(outcome.num_output_tokens for outcome in outcomes)
    return Summary(
        num_requests=len(outcomes),
        num_completed=len(completed),
        num_rejected=statuses[Status.REJECTED],
        num_failed=statuses[Status.FAILED],
        duration_s=duration_s,
        offered_requests_per_s=_offered_per_s(outcomes),
        requests_per_s=_ratio(len(completed), duration_s),
        prompt_tokens_per_s=_ratio(num_prompt_tokens, duration_s),
        output_tokens_per_s=_ratio(num_output_tokens, duration_s),
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=num_cached_tokens,
        prefix_hit_rate=None if num_cached_tokens is None else _ratio(num_cached_tokens, num_prompt_tokens),
        num_output_tokens=num_output_tokens,
        goodput=_goodput(latencies, targets or Targets(), len(outcomes), duration_s),
        ttft_s=_percentiles(latencies.ttft_s),
        itl_s=_percentiles(latencies.itl_s),
        tpot_s=_percentiles(latencies.tpot_s),
        e2e_s=_percentiles(latencies.e2e_s),
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common(_MOST_ERRORS)),
    )


def _goodput(latencies: Latencies, targets: Targets, num_offered: int, duration_s: float) -> Goodput:
    num_good = int(np.count_nonzero(_good(latencies, targets)))
    return Goodput(
        targets=targets,
        num_requests=num_good,
        requests_per_s=_ratio(num_good, duration_s),
        share=_ratio(num_good, num_offered),
    )


def _good(latencies: Latencies, targets: Targets) -> npt.NDArray[np.bool_]:
    """Of each completed request. One without a token has no TTFT to keep; one of a single token has no gap to break."""
    good = np.ones(len(latencies.ttft_s), dtype=np.bool_)
    if targets.ttft_s is not None:
        good &= latencies.ttft_s <= targets.ttft_s
    if targets.tpot_s is not None:
        good &= np.nan_to_num(latencies.tpot_s) <= targets.tpot_s
    if targets.itl_s is not None:
        good &= np.nan_to_num(latencies.longest_itl_s) <= targets.itl_s
    if targets.e2e_s is not None:
        good &= latencies.e2e_s <= targets.e2e_s
    return good


def _percentiles(samples: npt.NDArray[np.float64]) -> Percentiles:
    samples = samples[~np.isnan(samples)]
    if not samples.size:
        return Percentiles()
    p50, p90, p99 = np.percentile(samples, (50, 90, 99)).tolist()
    return Percentiles(mean=float(samples.mean()), p50=p50, p90=p90, p99=p99, max=float(samples.max()))


def _duration_s(outcomes: Sequence[Outcome]) -> float:
    if not outcomes:
        return 0.0
    ends_s = (outcome.token_times_s[-1] if len(outcome.token_times_s) else outcome.arrived_s for outcome in outcomes)
    return float(max(ends_s) - min(outcome.arrived_s for outcome in outcomes))


def _offered_per_s(outcomes: Sequence[Outcome]) -> float | None:
    """Arrivals are intervals' ends, so the first one does not count."""
    if not outcomes:
        return None
    arrivals_s = [outcome.arrived_s for outcome in outcomes]
    return _ratio(len(outcomes) - 1, max(arrivals_s) - min(arrivals_s))


def _ratio(number: float, divisor: float) -> float | None:
    return float(number / divisor) if divisor > 0 else None
