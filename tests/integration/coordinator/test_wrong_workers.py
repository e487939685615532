"""What a worker says that cannot be costs its own requests at most."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.vllm_errors import ClusterRequestError
from kvrelay.v1 import common_pb2
from tests.support.fake_cluster import fake_cluster, until
from tests.support.fake_worker import delta

_LENGTH = common_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize("at", ["prefill", "decode"])
async def test_a_worker_that_generates_more_than_was_asked_for_fails_the_request(front_end: FrontEnd, at: str) -> None:
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(cluster.generate([1] * 20, temperature=0.0, max_tokens=3))
        (prefill,) = await cluster.prefill.wait_for("prefill")
        job_id = prefill.request_id
        if at == "prefill":
            cluster.prefill.send(delta(job_id, [40, 41], _LENGTH))
        else:
            cluster.prefill.send(delta(job_id, [40], _LENGTH))
            await cluster.decode.wait_for("decode")
            cluster.decode.send(delta(job_id, [41]), delta(job_id, [42, 43]), delta(job_id, [44]))
        worker = getattr(cluster, at)
        if at == "prefill":  # The decode worker can have it alone.
            (decode,) = await cluster.decode.wait_for("decode")
            cluster.decode.send(delta(decode.request_id, [40, 41, 42], _LENGTH))
            assert (await generating).token_ids[0] == [40, 41, 42]
        else:
            with pytest.raises(ClusterRequestError, match="d1 has generated more tokens than were asked for"):
                await generating
        await until(lambda: "cancel" in worker.kinds())
        cluster.assert_idle()


async def test_a_message_that_nobody_can_take_ends_the_session_of_its_worker_only(
    front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fake_cluster(front_end) as cluster:
        take = cluster.pool.on_status

        def on_status(link: Any, status: Any) -> None:
            if status.num_running_requests == 99:
                raise ZeroDivisionError
            take(link, status)

        monkeypatch.setattr(cluster.pool, "on_status", on_status)
        cluster.prefill.send_status(num_running_requests=99)
        await until(lambda: cluster.prefill.num_ended == 1)
        assert [worker.worker_id for worker in cluster.pool.workers()] == ["d1"]
        await until(lambda: len(cluster.pool.workers()) == 2)
        assert (cluster.prefill.num_sessions, cluster.decode.num_sessions) == (2, 1)
