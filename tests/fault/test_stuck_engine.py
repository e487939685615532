"""A worker whose engine does nothing any more leaves the cluster and ends. Only the engine is simulated."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrelay.grpc_options import open_channel
from kvrelay.launch.worker import EXIT_ENGINE_DEAD
from kvrelay.v1 import worker_pb2
from tests.support.worker_link import Link, open_link, over
from tests.support.worker_pair import sampling
from tests.support.worker_process import worker_process

pytestmark = pytest.mark.timeout(120)

STUCK_S = 1.0
POISON = 13
_WORKER = f"""
import asyncio, sys
from kvrelay.engine.simulated import SimulatedEngine
from kvrelay.engine.simulated_model import SimulatedConfig
from kvrelay.launch import worker
from kvrelay.launch.engines import EngineChoice
from kvrelay.v1 import cluster_pb2
from kvrelay.worker.engine_watch import WatchConfig
from kvrelay.worker.store_config import StoreConfig

endpoint, first = sys.argv[1:]

class HangingEngine(SimulatedEngine):
    def __init__(self):
        super().__init__(SimulatedConfig(), sleep=self.sleep)
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def sleep(self, seconds):
        await asyncio.sleep(seconds)
        await self.may_go_on.wait()

    async def submit(self, request):
        if request.prompt_token_ids[0] == {POISON} or first == "hangs":
            self.may_go_on.clear()
        await super().submit(request)

worker.make_engine = lambda choice: HangingEngine()
config = worker.WorkerConfig(
    role=cluster_pb2.ROLE_DECODE, worker_id="w", etcd=[endpoint], watch=WatchConfig(stuck_s={STUCK_S}),
    engine=EngineChoice(model="m", served_model_name="m"), store=StoreConfig(size_bytes=1 << 20),
)
sys.exit(worker.run_worker(config))
"""


def command(first: str) -> Callable[[str], Sequence[str]]:
    return lambda endpoint: [sys.executable, "-c", _WORKER, endpoint, first]


def decode(link: Link, request_id: str, token: int) -> worker_pb2.Decode:
    return worker_pb2.Decode(request_id=request_id, prompt_token_ids=[token, 1, 2], sampling=sampling(3))


async def test_a_worker_whose_engine_hangs_leaves_and_ends(tmp_path: Path) -> None:
    async with worker_process(tmp_path, command("works")) as one:
        worker = await one.joined()
        async with open_link(worker.address) as link:
            answer = await over(link.decode(decode(link, "fine", 1)))
            assert len(answer.token_ids) == 3
            poisoned = link.decode(decode(link, "poison", POISON))
            began_s = time.monotonic()
            while await one.workers():
                await asyncio.sleep(0.02)
            left_s = time.monotonic() - began_s
        assert STUCK_S / 2 < left_s < STUCK_S + 2.0
        assert not poisoned.is_over
        assert await one.ended() == EXIT_ENGINE_DEAD
        assert time.monotonic() - began_s < STUCK_S + 4.0
        assert "ended no step for 1 s" in one.log.read_text()


async def test_a_worker_whose_engine_never_works_is_never_in_the_list(tmp_path: Path) -> None:
    async with worker_process(tmp_path, command("hangs")) as one:
        seen = []
        while one.process.poll() is None:
            seen += await one.workers()
            await asyncio.sleep(0.02)
        assert await one.ended() == EXIT_ENGINE_DEAD
        assert not seen
        assert "serving" not in one.log.read_text()


async def test_health_says_whether_the_engine_generates(tmp_path: Path) -> None:
    async with worker_process(tmp_path, command("works")) as one:
        worker = await one.joined()
        async with open_channel(worker.address) as channel, open_link(worker.address) as link:
            stub = health_pb2_grpc.HealthStub(channel)
            statuses = stub.Watch(health_pb2.HealthCheckRequest(service="kvrelay.v1.Worker"))
            async with asyncio.timeout(20):
                assert (await statuses.read()).status == health_pb2.HealthCheckResponse.SERVING
                link.decode(decode(link, "poison", POISON))
                assert (await statuses.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await one.ended() == EXIT_ENGINE_DEAD
