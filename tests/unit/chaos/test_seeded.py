"""A seed says what is sent and what is broken, when and where."""

from __future__ import annotations

import itertools

import pytest

from tests.chaos.faults.base import Fault
from tests.chaos.faults.schedule import CATALOGUE, COORDINATOR_REST_S, schedule
from tests.chaos.plans import request_plans


def _facts(fault: Fault) -> tuple[str, str, float]:
    return fault.name, fault.target, fault.hold_s


def test_the_same_seed_breaks_the_same_and_another_one_does_not() -> None:
    runs = [[(due.at_s, _facts(due.fault)) for due in schedule(seed, 600)] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_the_same_seed_asks_the_same_and_another_one_does_not() -> None:
    runs = [list(itertools.islice(request_plans(seed), 200)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert max(len(plan.prompt) for plan in runs[0]) + 150 <= 2048


def test_ten_minutes_bring_every_fault_and_a_pause_between_lost_coordinators() -> None:
    due = schedule(1, 600)
    assert len(due) == 120
    assert {each.fault.name for each in due} == set(CATALOGUE)
    ends = [each.at_s for each in due if each.fault.name in ("kill-coordinator", "drain-coordinator")]
    assert min(late - early for early, late in itertools.pairwise(ends)) >= COORDINATOR_REST_S


def test_only_the_named_faults_strike() -> None:
    assert {due.fault.name for due in schedule(1, 60, ["kill-decode", "stop-etcd"])} == {"kill-decode", "stop-etcd"}
    with pytest.raises(KeyError):
        schedule(1, 60, ["no-such"])
