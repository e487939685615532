"""Which plan does the cost policy take, and when?"""

from __future__ import annotations

from collections import Counter

import pytest

from kvrelay.coordinator.scheduler.cost import CostScheduler
from kvrelay.coordinator.scheduler.cost_config import CostConfig
from kvrelay.coordinator.scheduler.decision import Plan
from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView
from kvrelay.errors import OverloadedError
from kvrelay.step_times.model import StepTimes
from tests.support.scheduling import DECODE, PREFILL, shape, view

SPLIT = CostConfig(local_prefill="never")


def plan(request: RequestShape, workers: list[WorkerView], config: CostConfig | None = None) -> Plan:
    return CostScheduler(config=config).plan(request, workers).plan


def test_a_stored_prefix_draws_a_request_until_its_worker_is_too_busy() -> None:
    workers = [view("p1", PREFILL), view("p2", PREFILL), view("d1", DECODE)]
    request = shape(10_000, num_stored_blocks={"p1": 250})
    assert plan(request, workers, SPLIT).prefill is workers[0]
    workers[0].num_queued_prompt_tokens = 20_000
    assert plan(request, workers, SPLIT).prefill is workers[1]


def test_a_prefix_is_fetched_where_that_is_faster_than_computing() -> None:
    busy = view("p1", PREFILL, num_queued_prompt_tokens=20_000, token_bytes=1000, link_bytes_per_s={"p2:1": 1e9})
    workers = [busy, view("p2", PREFILL, token_bytes=1000), view("d1", DECODE, token_bytes=1000)]
    chosen = plan(shape(10_000, num_stored_blocks={"p1": 250}), workers, SPLIT)
    assert (chosen.prefill, chosen.source) == (workers[1], busy)
    busy.link_bytes_per_s = {"p2:1": 1e6}
    chosen = plan(shape(10_000, num_stored_blocks={"p1": 250}), workers, SPLIT)
    assert (chosen.prefill, chosen.source) == (workers[1], None)


def test_a_decode_worker_that_has_the_prompt_needs_no_transfer() -> None:
    slow = {"d1:1": 1e6, "d2:1": 1e6}
    workers = [
        view("p1", PREFILL, token_bytes=1000, link_bytes_per_s=slow),
        view("d1", DECODE, token_bytes=1000),
        view("d2", DECODE, token_bytes=1000, num_running_requests=3),
    ]
    assert plan(shape(3200), workers, SPLIT).decode is workers[1]
    assert plan(shape(3200, num_stored_blocks={"d2": 100}), workers, SPLIT).decode is workers[2]


def test_the_transfer_counts_where_computing_does_not_hide_it() -> None:
    link = {"d1:1": 1e6}
    workers = [view("p1", PREFILL, link_bytes_per_s=link, token_bytes=1000), view("d1", DECODE, token_bytes=1000)]
    chosen = CostScheduler(config=SPLIT).plan(shape(1000), workers).chosen
    assert chosen.prefill_s == pytest.approx(0.11)
    assert chosen.transfer_s == pytest.approx(1.0 - 0.9 * 0.11)
    assert chosen.ttft_s == pytest.approx(0.11 + chosen.transfer_s)


def test_an_idle_decode_worker_computes_what_it_has_nearly_all_of() -> None:
    workers = [view("p1", PREFILL, token_bytes=100_000), view("d1", DECODE, token_bytes=100_000)]
    request = shape(3201, num_stored_blocks={"d1": 100})
    assert plan(request, workers).prefill is None
    assert plan(request, workers, SPLIT).prefill is workers[0]


def test_a_busy_decode_worker_is_spared_a_long_prompt() -> None:
    workers = [view("p1", PREFILL), view("d1", DECODE, num_running_requests=20)]
    assert plan(shape(3000), workers).prefill is workers[0]
    workers[0].num_queued_prompt_tokens = 90_000
    assert plan(shape(3000), workers, CostConfig(decode_weight=0.01)).prefill is None


def test_decode_workers_compute_all_prompts_if_told_so() -> None:
    workers = [view("p1", PREFILL), view("d1", DECODE, num_running_requests=20)]
    assert plan(shape(3000), workers, CostConfig(local_prefill="always")).prefill is None


def test_of_plans_near_the_best_one_without_a_queue_is_taken() -> None:
    queued = view("p1", PREFILL, num_queued_prompt_tokens=100, num_queued_prompts=1)
    for seed in range(10):
        workers = [queued, view("p2", PREFILL), view("d1", DECODE)]
        request = shape(10_000)
        assert CostScheduler(seed, SPLIT).plan(request, workers).plan.prefill is workers[1]


def test_sequences_go_where_steps_stay_short() -> None:
    slow = StepTimes(step_fixed_s=0.05)
    workers = [view("d1", DECODE, times=slow), view("d2", DECODE, num_running_requests=3)]
    assert plan(shape(), workers).decode is workers[1]


@pytest.mark.parametrize(
    "full",
    [
        {"num_running_requests": 8, "max_running_requests": 8},
        {"num_running_requests": 1, "num_context_tokens": 9_500, "capacity_tokens": 10_000},
    ],
    ids=["sequences", "memory"],
)
def test_a_decode_worker_without_room_is_passed_over(full: dict[str, int]) -> None:
    workers = [view("p1", PREFILL), view("d1", DECODE, **full), view("d2", DECODE, num_running_requests=12)]
    assert plan(shape(1000), workers, SPLIT).decode is workers[2]
    assert plan(shape(1000), workers[:2], SPLIT).decode is workers[1]


def test_a_target_for_the_gap_between_tokens_is_kept_where_that_can_be() -> None:
    crowded = StepTimes(step_fixed_s=0.01, step_request_s=0.01)
    workers = [
        view("d1", DECODE, times=crowded, num_running_requests=4),
        view("d2", DECODE, num_queued_prompt_tokens=50_000),
    ]
    assert plan(shape(), workers).decode is workers[0]
    assert plan(shape(itl_s=0.03), workers).decode is workers[1]
    assert plan(shape(itl_s=0.001), workers).decode is workers[1]


def test_a_plan_in_time_is_taken_though_others_cost_less() -> None:
    stalling = view("d1", DECODE, num_running_requests=50)
    workers = [view("p1", PREFILL, num_queued_prompt_tokens=5000), stalling]
    assert plan(shape(2000), workers).prefill is workers[0]
    assert plan(shape(2000, ttft_s=0.3), workers).prefill is None


def test_a_request_that_would_be_late_is_told_when_to_come_back() -> None:
    workers = [view("p1", PREFILL, num_queued_prompt_tokens=50_000, num_queued_prompts=1), view("d1", DECODE)]
    scheduler = CostScheduler(config=SPLIT)
    late = shape(1000, ttft_s=1.0)
    with pytest.raises(OverloadedError, match=r"ttft_s allows 1\.000") as raised:
        scheduler.plan(late, workers)
    retry_after_s = raised.value.retry_after_s or 0.0
    assert retry_after_s == pytest.approx(5.01 + 0.11 - 1.0)
    workers[0].num_queued_prompt_tokens -= int(retry_after_s * 10_000) + 1
    assert scheduler.plan(late, workers).plan.prefill is workers[0]


def test_what_is_to_be_fetched_does_not_come_sooner_by_waiting() -> None:
    """The idler worker would need 2 s for the prefix and 0.4 s without it: only the one that has it can be in time."""
    workers = [
        view(
            "p1",
            PREFILL,
            num_queued_prompt_tokens=60_000,
            num_queued_prompts=1,
            token_bytes=10_000,
            link_bytes_per_s={"p2:1": 1.6e7},
        ),
        view("p2", PREFILL, num_queued_prompt_tokens=30_000, num_queued_prompts=1, token_bytes=10_000),
        view("d1", DECODE),
    ]
    late = shape(4000, num_stored_blocks={"p1": 100}, ttft_s=0.3)
    with pytest.raises(OverloadedError) as raised:
        plan(late, workers, SPLIT)
    assert raised.value.retry_after_s == pytest.approx(6.01 + 0.09 - 0.3)
    workers[0].num_queued_prompt_tokens -= 58_001
    workers[1].num_queued_prompt_tokens = 0
    assert plan(late, workers, SPLIT).prefill is workers[0]


def test_a_short_answer_is_not_handed_over_when_loading_would_be_felt() -> None:
    """Loading the prompt at the decode worker takes 0.2 s of the gap between the first token and the second."""
    busy = view("d1", DECODE, token_bytes=500_000, num_running_requests=40)
    workers = [view("p1", PREFILL, token_bytes=500_000), busy]
    stored = {"p1": 624, "d1": 624}
    assert plan(shape(20_000, max_tokens=3, num_stored_blocks=stored), workers).prefill is None
    assert plan(shape(20_000, max_tokens=300, num_stored_blocks=stored), workers).prefill is workers[0]


def test_what_waiting_does_not_help_gets_no_time_to_come_back() -> None:
    with pytest.raises(OverloadedError, match="even when idle") as raised:
        plan(shape(50_000, ttft_s=1.0), [view("p1", PREFILL), view("d1", DECODE)])
    assert raised.value.retry_after_s is None


def test_coordinators_that_see_the_same_do_not_choose_the_same() -> None:
    """Their views are as old as the last report: what one of them has just sent is not in the others'."""
    workers = [view(f"p{i}", PREFILL) for i in range(8)] + [view(f"d{i}", DECODE) for i in range(8)]
    chosen = [CostScheduler(seed, SPLIT).plan(shape(1000), workers).plan for seed in range(200)]
    for counts in (
        Counter(plan.prefill.worker_id for plan in chosen if plan.prefill),
        Counter(plan.decode.worker_id for plan in chosen),
    ):
        assert len(counts) == 8
        assert max(counts.values()) < 3 * 200 / 8


def test_others_are_explained_with_what_they_cost() -> None:
    workers = [view("p1", PREFILL), view("p2", PREFILL, num_queued_prompt_tokens=8000), view("d1", DECODE)]
    decision = CostScheduler(config=SPLIT).plan(shape(1000), workers)
    assert [(other.prefill_worker_id, other.decode_worker_id) for other in decision.others] == [("p2", "d1")]
    assert decision.others[0].cost > decision.chosen.cost
    assert decision.reason.startswith("lowest cost: p1 computes 1000 of 1000 tokens in 0.110 s after a wait of 0.000 s")
    assert "next best is p2 with d1" in decision.reason
