"""What do the policies look at that look at one thing only?"""

from __future__ import annotations

from collections import Counter

import pytest

from kvrelay.coordinator.scheduler.policies import make_scheduler
from tests.support.scheduling import DECODE, PREFILL, shape, view


@pytest.mark.parametrize("policy", ["least-loaded", "round-robin", "weighted", "random", "prefix-only"])
def test_splits_wherever_a_prefill_worker_is(policy: str) -> None:
    workers = [view("p1", PREFILL, num_queued_prompt_tokens=90_000), view("d1", DECODE)]
    plan = make_scheduler(policy).plan(shape(32, num_stored_blocks={"d1": 1}), workers).plan
    assert (plan.prefill, plan.decode, plan.source) == (workers[0], workers[1], None)


def test_least_loaded_counts_tokens_at_one_role_and_sequences_at_the_other() -> None:
    workers = [
        view("p1", PREFILL, num_queued_prompt_tokens=500),
        view("p2", PREFILL, num_queued_prompt_tokens=20, num_running_requests=9),
        view("d1", DECODE, num_running_requests=3),
        view("d2", DECODE, num_running_requests=2, num_queued_prompt_tokens=900),
    ]
    plan = make_scheduler("least-loaded").plan(shape(), workers).plan
    assert (plan.prefill, plan.decode) == (workers[1], workers[3])


def test_round_robin_goes_on_when_workers_come_and_go() -> None:
    scheduler = make_scheduler("round-robin")
    workers = [view(name, DECODE) for name in ("c", "a", "b")]
    order = [scheduler.plan(shape(), workers).plan.decode.worker_id for _ in range(4)]
    assert order == ["a", "b", "c", "a"]
    workers = [view(name, DECODE) for name in ("c", "d", "aa")]
    order = [scheduler.plan(shape(), workers).plan.decode.worker_id for _ in range(4)]
    assert order == ["aa", "c", "d", "aa"]


def test_weighted_gives_each_worker_its_share() -> None:
    workers = [view("d1", DECODE, weight=3.0), view("d2", DECODE), view("d3", DECODE, weight=0.0)]
    scheduler = make_scheduler("weighted", seed=1)
    counts = Counter(scheduler.plan(shape(), workers).plan.decode.worker_id for _ in range(2000))
    assert counts["d1"] / counts["d2"] == pytest.approx(3, rel=0.2)
    assert not counts["d3"]


def test_prefix_only_takes_the_fullest_however_loaded_and_the_idlest_of_equals() -> None:
    workers = [
        view("p1", PREFILL, num_queued_prompt_tokens=9000),
        view("p2", PREFILL),
        view("d1", DECODE, num_running_requests=3),
        view("d2", DECODE, num_running_requests=2),
    ]
    plan = make_scheduler("prefix-only").plan(shape(num_stored_blocks={"p1": 1}), workers).plan
    assert (plan.prefill, plan.decode) == (workers[0], workers[3])
