"""Which changes of a role make sense, and when is the old one over?"""

from __future__ import annotations

from typing import Any

import pytest

from kvrelay.client.roles import BOTH, DECODE, PREFILL, RoleChange, RoleRefusedError, checked, num_old
from kvrelay.v1.cluster_pb2 import WORKER_STATE_DRAINING, WORKER_STATE_READY, WorkerInfo
from kvrelay.v1.worker_pb2 import WorkerStatus


def worker(worker_id: str, role: int, **values: Any) -> WorkerInfo:
    return WorkerInfo(worker_id=worker_id, role=role, **{"model": "m", "state": WORKER_STATE_READY, **values})


def change(worker_id: str, role: int, **values: Any) -> RoleChange:
    return RoleChange(worker_id=worker_id, role=role, **values)


CLUSTER = [worker("p", PREFILL), worker("d1", DECODE), worker("d2", DECODE), worker("other", DECODE, model="n")]


@pytest.mark.parametrize(("worker_id", "role"), [("p", DECODE), ("p", BOTH), ("d1", PREFILL), ("d1", DECODE)])
def test_any_role_is_fine_as_long_as_somebody_decodes(worker_id: str, role: int) -> None:
    assert checked(change(worker_id, role), CLUSTER).worker_id == worker_id


@pytest.mark.parametrize(
    ("wanted", "workers", "message"),
    [
        (change("x", BOTH), CLUSTER, "there is no worker 'x'; there are: d1, d2, other, p"),
        (change("x", BOTH), [], "there are: none at all"),
        (change("p", BOTH), [worker("p", PREFILL, state=WORKER_STATE_DRAINING)], "p drains"),
        (change("other", PREFILL), CLUSTER, "other is the last worker that decodes for model 'n'"),
        (change("d", PREFILL), [worker("d", BOTH), worker("p", PREFILL)], "the last worker that decodes"),
        (
            change("d", PREFILL),
            [worker("d", DECODE), worker("leaving", DECODE, state=WORKER_STATE_DRAINING)],
            "the last worker that decodes",
        ),
    ],
)
def test_nonsense_is_refused(wanted: RoleChange, workers: list[WorkerInfo], message: str) -> None:
    with pytest.raises(RoleRefusedError, match=message):
        checked(wanted, workers)


def test_who_insists_may_leave_nobody_to_decode() -> None:
    assert checked(change("other", PREFILL, force=True), CLUSTER).worker_id == "other"


def test_another_one_that_does_both_is_enough() -> None:
    assert checked(change("d", PREFILL), [worker("d", DECODE), worker("b", BOTH)]).worker_id == "d"


@pytest.mark.parametrize(
    ("old", "new", "left"),
    [
        (PREFILL, DECODE, 3),
        (BOTH, DECODE, 3),
        (DECODE, PREFILL, 5),
        (BOTH, PREFILL, 5),
        (PREFILL, BOTH, 0),
        (DECODE, BOTH, 0),
        (DECODE, DECODE, 0),
        (PREFILL, PREFILL, 0),
    ],
)
def test_only_what_belongs_to_a_role_that_is_given_up_is_waited_for(old: int, new: int, left: int) -> None:
    assert num_old(WorkerStatus(num_prefill_jobs=3, num_decode_jobs=5, num_incoming_transfers=4), old, new) == left


def test_a_request_whose_blocks_come_in_will_be_decoded() -> None:
    assert num_old(WorkerStatus(num_incoming_transfers=2), DECODE, PREFILL) == 2
