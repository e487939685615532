"""How is a decision explained in a sentence?"""

from __future__ import annotations

from kvrelay.coordinator.scheduler.decision import Candidate, Decision, Plan
from tests.support.scheduling import DECODE, PREFILL, view

P1, P2, D1 = view("p1", PREFILL), view("p2", PREFILL), view("d1", DECODE)
SPLIT = Candidate(
    prefill_worker_id="p1",
    decode_worker_id="d1",
    wait_s=0.5,
    prefill_s=0.25,
    transfer_s=0.125,
    itl_s=0.02,
    num_cached_tokens=60,
    num_stored_tokens=30,
    cost=1.5,
)
LOCAL = Candidate(decode_worker_id="d1", prefill_s=0.25, itl_s=0.02, cost=2.0)


def decision(plan: Plan, chosen: Candidate, *others: Candidate) -> Decision:
    return Decision(plan=plan, policy="cost", basis="lowest cost", num_prompt_tokens=100, chosen=chosen, others=others)


def test_the_first_token_comes_after_wait_prefill_and_transfer() -> None:
    assert SPLIT.ttft_s == 0.875


def test_a_split_plan_is_told_with_both_workers() -> None:
    assert decision(Plan(prefill=P1, decode=D1), SPLIT).reason == (
        "lowest cost: p1 computes 40 of 100 tokens in 0.250 s after a wait of 0.500 s, d1 has 30 of them and waits "
        "0.125 s for the rest, then a token every 0.020 s"
    )


def test_a_plan_of_one_worker_names_no_other() -> None:
    assert decision(Plan(prefill=None, decode=D1), LOCAL).reason == (
        "lowest cost: d1 computes 100 of 100 tokens in 0.250 s after a wait of 0.000 s, then a token every 0.020 s"
    )


def test_the_source_and_the_next_best_are_told() -> None:
    reason = decision(Plan(prefill=P1, decode=D1, source=P2), SPLIT, LOCAL, SPLIT).reason
    assert "tokens, fetched from p2 in 0.250 s" in reason
    assert reason.endswith("; next best is no prefill worker with d1, cost 2.000 to 1.500")
