"""What a worker says of itself changes in one place, and the cluster hears of every change."""

from __future__ import annotations

import pytest

from kvrelay.errors import InvalidRequestError
from kvrelay.v1 import cluster_pb2
from kvrelay.worker.record import WorkerRecord


class List:
    """The cluster's list, which keeps copies."""

    def __init__(self) -> None:
        self.heard: list[cluster_pb2.WorkerInfo] = []

    async def publish(self, info: cluster_pb2.WorkerInfo) -> None:
        copy = cluster_pb2.WorkerInfo()
        copy.CopyFrom(info)
        self.heard.append(copy)


def record(published: List) -> WorkerRecord:
    info = cluster_pb2.WorkerInfo(
        worker_id="w", role=cluster_pb2.ROLE_PREFILL, state=cluster_pb2.WORKER_STATE_READY, address="a:1"
    )
    return WorkerRecord(info, published.publish)


@pytest.mark.parametrize("role", [cluster_pb2.ROLE_PREFILL, cluster_pb2.ROLE_DECODE, cluster_pb2.ROLE_BOTH])
async def test_a_new_role_is_published_with_all_the_rest(role: cluster_pb2.Role) -> None:
    published = List()
    own = record(published)
    await own.set_role(role)
    assert published.heard == [own.info]
    assert (own.info.role, own.info.worker_id, own.info.address) == (role, "w", "a:1")


@pytest.mark.parametrize("role", [0, 4, -1])
async def test_what_is_no_role_changes_nothing(role: int) -> None:
    published = List()
    own = record(published)
    with pytest.raises(InvalidRequestError, match=f"role {role} is unknown"):
        await own.set_role(role)
    assert (own.info.role, published.heard) == (cluster_pb2.ROLE_PREFILL, [])


async def test_who_drains_takes_no_other_role() -> None:
    published = List()
    own = record(published)
    await own.drain(4.0)
    with pytest.raises(InvalidRequestError, match="worker w drains"):
        await own.set_role(cluster_pb2.ROLE_DECODE)
    assert [(info.state, info.role) for info in published.heard] == [
        (cluster_pb2.WORKER_STATE_DRAINING, cluster_pb2.ROLE_PREFILL)
    ]
