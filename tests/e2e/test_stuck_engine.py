"""A real engine core that stops ends its worker, and nothing of either is left. Health checks are in no account."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvrelay.grpc_options import open_channel
from kvrelay.launch.worker import EXIT_ENGINE_DEAD
from kvrelay.step_times.fit import StepTimesFit
from kvrelay.v1 import worker_pb2, worker_pb2_grpc
from tests.support.processes import gone
from tests.support.worker_link import open_link, over
from tests.support.worker_pair import sampling
from tests.support.worker_process import WorkerProcess, worker_process

pytestmark = pytest.mark.timeout(300)

STUCK_S = 4.0
HEALTH_INTERVAL_S = 1.0
GAUGES: list[Callable[[worker_pb2.WorkerStatus], float]] = [
    lambda status: status.num_running_requests,
    lambda status: status.num_waiting_requests,
    lambda status: status.num_context_tokens,
    lambda status: status.num_queued_prompt_tokens,
    lambda status: status.num_decode_jobs,
    lambda status: status.engine_kv_usage,
    lambda status: status.store.num_pinned,
    lambda status: status.store.num_reserved,
    lambda status: status.store.num_evictable,
]
PROMPT = list(range(7000, 7040))


def command(endpoint: str) -> Sequence[str]:
    return [
        *(sys.executable, "-m", "kvrelay.cli", "decode-worker", "--etcd", endpoint, "--kv-host-bytes", "64MiB"),
        *("--engine-stuck-s", str(STUCK_S), "--health-interval-s", str(HEALTH_INTERVAL_S)),
        *("--", "--dtype", "float32", "--max-model-len", "512"),
    ]


async def _never_busy(one: WorkerProcess, seconds: float) -> None:
    """Health checks are made meanwhile, and seen by nobody."""
    worker = await one.joined()
    async with open_channel(worker.address) as channel:
        stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(channel)
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            status = await stub.GetStatus(worker_pb2.GetStatusRequest())
            assert not any(status.counters.values())
            assert not any(gauge(status) for gauge in GAUGES)
            assert status.step_times == StepTimesFit().times.to_proto()


@pytest.mark.usefixtures("no_cluster")
async def test_an_engine_core_that_stops_ends_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    async with worker_process(tmp_path, command) as one:
        worker = await one.joined()
        await _never_busy(one, 3 * HEALTH_INTERVAL_S)
        async with open_link(worker.address) as link:
            request = worker_pb2.Decode(request_id="r", prompt_token_ids=PROMPT, sampling=sampling(8))
            assert len((await over(link.decode(request))).token_ids) == 8
        cores = one.engine_processes()
        assert cores
        for core in cores:
            core.suspend()
        assert await one.ended() == EXIT_ENGINE_DEAD
        assert not await one.workers()
        assert gone(core.pid for core in cores)
        assert f"ended no step for {STUCK_S:g} s" in one.log.read_text()
