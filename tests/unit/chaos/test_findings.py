"""A run is good only when nothing at all is bad, and what is bad is attributed to the faults of that time."""

from __future__ import annotations

import itertools
import random

from kvrelay.client import WorkerLostError
from tests.chaos.faults.clients import CancelBurst
from tests.chaos.faults.processes import KillDecode
from tests.chaos.findings import Findings, Injection, judge, percentile, rows
from tests.chaos.load import Answer
from tests.chaos.plans import RequestPlan, request_plans
from tests.chaos.report import print_report, to_json

PLANS = [plan for plan in itertools.islice(request_plans(1), 100) if plan.way == "grpc" and plan.n == 1]


def _answer(plan: RequestPlan, tokens: list[int], began_s: float = 0.0, every_s: float = 0.1) -> Answer:
    times_s = [began_s + every_s * (number + 1) for number in range(len(tokens))]
    ended_s = times_s[-1] if times_s else began_s
    return Answer(plan, plan.coordinator, began_s, ended_s=ended_s, tokens=[tokens], token_times_s=times_s)


def _findings(answers: list[Answer], injections: list[Injection]) -> Findings:
    return Findings(seed=1, seconds=10.0, judged=judge(answers, injections), injections=injections)


def test_all_right_is_good_and_the_report_adds_up() -> None:
    injection = Injection(CancelBurst(random.Random(1)), began_s=0.2, num_in_flight=2, healed_s=0.3)
    findings = _findings([_answer(plan, plan.expected()) for plan in PLANS[:5]], [injection])
    assert findings.is_good
    report = to_json(findings)
    assert (report["requests"], report["completed"], report["lost"]) == (5, 5, 0)
    assert report["faults"]["cancel-burst"]["completed"] == 5
    print_report(findings)


def test_a_broken_expectation_is_seen() -> None:
    plan, other = PLANS[0], PLANS[1]
    for tokens in (other.expected()[: plan.num_tokens], plan.expected()[:-1], plan.expected() * 2):
        findings = _findings([_answer(plan, tokens)], [])
        assert not findings.is_good
        assert len(findings.bad()) == 1
        assert plan.request_id in findings.bad()[0].text()


def test_what_never_ends_is_lost() -> None:
    answer = _answer(PLANS[0], [])
    answer.abandoned = True
    assert not _findings([answer], []).is_good


def test_leaks_and_deaths_that_nobody_asked_for_are_bad() -> None:
    for name in ("leaks", "unexpected_ends"):
        findings = _findings([], [])
        setattr(findings, name, ["something"])
        assert not findings.is_good
    assert not _findings([], [Injection(CancelBurst(random.Random(1)), 0.0, 0, error="not healed")]).is_good


def test_a_fault_counts_for_what_it_met_and_for_nothing_else() -> None:
    met, later = _answer(PLANS[0], PLANS[0].expected()), _answer(PLANS[1], PLANS[1].expected(), began_s=100.0)
    met.error = WorkerLostError("decode worker decode-1 was lost; try again")
    injection = Injection(CancelBurst(random.Random(1)), began_s=0.2, num_in_flight=1, healed_s=0.3)
    findings = _findings([met, later], [injection])
    (row,) = rows(findings)
    assert (row["lost"], row["completed"]) == (1, 0)
    assert findings.errors() == {"WorkerLostError: decode worker decode-N was lost; try again": 1}


def test_recovery_is_the_pause_from_the_kill_on() -> None:
    stream = _answer(PLANS[0], PLANS[0].expected())
    stream.token_times_s = [0.1, 0.2, 0.9, 1.0, 1.1]
    kill = KillDecode(random.Random(1))
    kill.streams, kill.killed_s = [stream], 0.25
    findings = _findings([stream], [Injection(kill, began_s=0.25, num_in_flight=1, healed_s=3.0)])
    assert [round(pause, 3) for pause in findings.recovery_s()] == [0.65]


def test_percentiles_are_of_the_nearest_rank() -> None:
    assert percentile([], 0.5) is None
    assert [percentile([1.0, 2.0, 3.0, 4.0], share) for share in (0.5, 0.9, 1.0)] == [2.0, 4.0, 4.0]
