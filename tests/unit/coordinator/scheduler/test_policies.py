"""What does every policy keep to?"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.coordinator.scheduler.base import Scheduler
from kvrelay.coordinator.scheduler.cost_config import CostConfig
from kvrelay.coordinator.scheduler.decision import Plan
from kvrelay.coordinator.scheduler.policies import POLICIES, make_scheduler
from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView
from kvrelay.errors import InvalidRequestError, NoWorkersError
from tests.support.scheduling import BLOCK_SIZE_TOKENS, BOTH, DECODE, PREFILL, shape, view

pytestmark = pytest.mark.parametrize("policy", POLICIES)

VIEWS = st.builds(
    view,
    st.just(""),
    st.sampled_from([PREFILL, DECODE, BOTH]),
    model=st.sampled_from(["m", "m", "other"]),
    fingerprint=st.sampled_from([b"f", b"g"]),
    draining=st.booleans(),
    max_model_len_tokens=st.sampled_from([64, 1000, 100_000]),
    token_bytes=st.sampled_from([0, 1000]),
    capacity_tokens=st.sampled_from([0, 2000]),
    max_running_requests=st.sampled_from([0, 4]),
    num_queued_prompt_tokens=st.integers(0, 5000),
    num_queued_prompts=st.integers(0, 5),
    num_running_requests=st.integers(0, 9),
    num_context_tokens=st.integers(0, 5000),
)
SHAPES = st.builds(
    shape,
    st.integers(1, 2000),
    num_sequences=st.integers(1, 3),
    max_tokens=st.integers(0, 100),
    num_stored_blocks=st.dictionaries(st.sampled_from(["w0", "w1", "w2"]), st.integers(0, 100)),
)


def named(workers: list[WorkerView]) -> list[WorkerView]:
    for index, worker in enumerate(workers):
        worker.worker_id, worker.address = f"w{index}", f"host{index % 3}:{index}"
    return workers


def ids(plan: Plan) -> tuple[str | None, str, str | None]:
    return (
        plan.prefill.worker_id if plan.prefill else None,
        plan.decode.worker_id,
        plan.source.worker_id if plan.source else None,
    )


def assign(plan: Plan, num_tokens: int) -> None:
    """As a coordinator accounts for what it sent."""
    plan.decode.num_running_requests += 1
    plan.decode.num_assigned += 1
    computing = plan.prefill or plan.decode
    computing.num_queued_prompt_tokens += num_tokens
    computing.num_queued_prompts += 1
    if plan.prefill:
        plan.prefill.num_assigned += 1


def plans(scheduler: Scheduler, workers: list[WorkerView], request: RequestShape, num_requests: int) -> list[Plan]:
    chosen = []
    for _ in range(num_requests):
        chosen.append(scheduler.plan(request, workers).plan)
        assign(chosen[-1], request.num_prompt_tokens)
    return chosen


def fits(worker: WorkerView, request: RequestShape) -> bool:
    serves = worker.model == request.model and not worker.draining
    return serves and request.num_prompt_tokens < worker.max_model_len_tokens


@given(workers=st.lists(VIEWS, max_size=8).map(named), request=SHAPES)
def test_plans_are_of_workers_that_can_serve_them(
    policy: str, workers: list[WorkerView], request: RequestShape
) -> None:
    decoders = [worker for worker in workers if worker.decodes and fits(worker, request)]
    try:
        decision = make_scheduler(policy).plan(request, workers)
    except (NoWorkersError, InvalidRequestError):
        assert not decoders
        return
    plan = decision.plan
    assert plan.decode in decoders
    if plan.prefill:
        assert plan.prefill.prefills
        assert plan.prefill is not plan.decode
        assert fits(plan.prefill, request)
        assert plan.prefill.fingerprint == plan.decode.fingerprint
        assert request.num_prompt_tokens >= BLOCK_SIZE_TOKENS
    if plan.source:
        assert plan.source is not (plan.prefill or plan.decode)
        assert plan.source.fingerprint == plan.decode.fingerprint
        assert fits(plan.source, request)


@given(workers=st.lists(VIEWS, min_size=1, max_size=8).map(named), request=SHAPES)
def test_a_decision_explains_its_plan(policy: str, workers: list[WorkerView], request: RequestShape) -> None:
    try:
        decision = make_scheduler(policy).plan(request, workers)
    except (NoWorkersError, InvalidRequestError):
        return
    chosen, plan = decision.chosen, decision.plan
    assert (chosen.prefill_worker_id, chosen.decode_worker_id) == (
        plan.prefill.worker_id if plan.prefill else "",
        plan.decode.worker_id,
    )
    assert decision.policy == policy
    assert chosen.decode_worker_id in decision.reason
    assert min(chosen.wait_s, chosen.prefill_s, chosen.transfer_s, chosen.itl_s, chosen.cost) >= -1e-9
    assert chosen.num_cached_tokens < request.num_prompt_tokens
    costs = [other.cost for other in decision.others]
    assert costs == sorted(costs)


@given(workers=st.lists(VIEWS, min_size=1, max_size=6).map(named), request=SHAPES, seed=st.integers(0, 9))
def test_the_same_seed_leads_to_the_same_plans(
    policy: str, workers: list[WorkerView], request: RequestShape, seed: int
) -> None:
    def first_plans() -> list[Any]:
        scheduler = make_scheduler(policy, seed)
        return [ids(scheduler.plan(request, workers).plan) for _ in range(5)]

    try:
        assert first_plans() == first_plans()
    except (NoWorkersError, InvalidRequestError):
        return


@pytest.mark.parametrize("num_workers", [2, 4, 16])
def test_equal_workers_get_equally_much(policy: str, num_workers: int) -> None:
    workers = [view(f"p{i}", PREFILL) for i in range(num_workers)] + [view(f"d{i}", DECODE) for i in range(num_workers)]
    per_worker = 50
    config = CostConfig(local_prefill="never")
    chosen = plans(make_scheduler(policy, 1, config), workers, shape(1000), per_worker * num_workers)
    for counts in (
        Counter(plan.prefill.worker_id for plan in chosen if plan.prefill),
        Counter(plan.decode.worker_id for plan in chosen),
    ):
        assert len(counts) == num_workers
        assert per_worker / 2 <= min(counts.values()) <= max(counts.values()) <= per_worker * 2


def test_a_prompt_without_a_full_block_is_not_handed_over(policy: str) -> None:
    workers = [view("p1", PREFILL), view("d1", DECODE)]
    assert make_scheduler(policy).plan(shape(BLOCK_SIZE_TOKENS - 1), workers).plan.prefill is None


def test_decode_workers_compute_prompts_when_there_is_nobody_else(policy: str) -> None:
    config = CostConfig(local_prefill="never")
    for unfit in ({"draining": True}, {"fingerprint": b"g"}, {"model": "other"}, {"max_model_len_tokens": 100}):
        plan = make_scheduler(policy, config=config).plan(shape(), [view("p1", PREFILL, **unfit), view("d1", DECODE)])
        assert plan.plan.prefill is None


def test_one_worker_of_both_roles_is_not_split_with_itself(policy: str) -> None:
    config = CostConfig(local_prefill="never")
    plan = make_scheduler(policy, config=config).plan(shape(), [view("b1", BOTH)]).plan
    assert ids(plan) == (None, "b1", None)


def test_two_workers_of_both_roles_serve_each_other(policy: str) -> None:
    config = CostConfig(local_prefill="never")
    plan = make_scheduler(policy, config=config).plan(shape(), [view("b1", BOTH), view("b2", BOTH)]).plan
    assert {plan.prefill.worker_id if plan.prefill else "", plan.decode.worker_id} == {"b1", "b2"}


@pytest.mark.parametrize("unfit", [{"draining": True}, {"model": "other"}], ids=lambda values: next(iter(values)))
def test_without_a_decode_worker_there_is_no_plan(policy: str, unfit: dict[str, Any]) -> None:
    with pytest.raises(NoWorkersError, match="'m'"):
        make_scheduler(policy).plan(shape(), [view("p1", PREFILL), view("d1", DECODE, **unfit)])


def test_a_prompt_too_long_for_every_decode_worker_is_a_bad_request(policy: str) -> None:
    workers = [
        view("p1", PREFILL, max_model_len_tokens=1000),
        view("d1", DECODE, max_model_len_tokens=64),
        view("d2", DECODE, max_model_len_tokens=100),
    ]
    scheduler = make_scheduler(policy)
    with pytest.raises(InvalidRequestError, match="fit into 100") as raised:
        scheduler.plan(shape(100), workers)
    assert raised.value.field == "prompt"
    assert scheduler.plan(shape(99), workers).plan.decode is workers[2]


def test_an_unknown_policy_is_named(policy: str) -> None:
    with pytest.raises(ValueError, match=rf"'{policy}s' is unknown.*{policy}"):
        make_scheduler(policy + "s")
