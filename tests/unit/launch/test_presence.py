"""Who of the expected processes is registered, and where do coordinators answer alone?"""

from __future__ import annotations

import asyncio

from kvrelay.launch.readiness import Presence
from kvrelay.v1.cluster_pb2 import CoordinatorInfo, WorkerInfo


async def test_it_is_complete_when_all_are_there_at_the_same_time() -> None:
    registered: list[str] = []
    presence = Presence(["c-0", "c-1", "w"], registered.append)
    presence.join(CoordinatorInfo(coordinator_id="c-0"))
    presence.join(WorkerInfo(worker_id="somebody else"))
    presence.leave("c-0")
    presence.join(WorkerInfo(worker_id="w"))
    presence.join(CoordinatorInfo(coordinator_id="c-1"))
    waiting = asyncio.create_task(presence.wait_complete())
    await asyncio.sleep(0)
    assert not waiting.done()
    presence.join(CoordinatorInfo(coordinator_id="c-0"))
    await waiting
    assert registered == ["c-0", "w", "c-1", "c-0"]


def test_replicas_are_told_apart_by_their_own_ports() -> None:
    presence = Presence(["c-0", "c-1", "w"], lambda _: None)
    for number in range(2):
        presence.join(
            CoordinatorInfo(
                coordinator_id=f"c-{number}", http_url="http://h:8000", own_http_url=f"http://[::1]:900{number}"
            )
        )
    presence.join(WorkerInfo(worker_id="w"))
    assert presence.own_http_ports() == [9000, 9001]
    presence.leave("c-0")
    assert presence.own_http_ports() == [9001]
