"""A process that is stopped keeps its connections, and is taken for lost all the same. Engines are simulated."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import psutil
import pytest

from tests.support.cluster_gauges import open_gauges
from tests.support.live_cluster import LiveCluster, live_cluster

pytestmark = pytest.mark.timeout(180)

SLOW = ("--decode-step-s", "0.05")
NUM_TOKENS = 100
"""5 s at least."""
NUM_STREAMS = 8
SILENCE_S = 2.0
NOTICED_S = SILENCE_S + 1.0
GAP_S = NOTICED_S + 1.0
"""Another worker computes the prompt again."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    flags = ("--engine", "simulated", "--decode", "2", "--policy", "round-robin")
    with live_cluster(tmp_path_factory.mktemp("up"), *flags, engine_options=SLOW) as cluster:
        yield cluster


class Stream:
    """A completion that is read as it comes."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.longest_gap_s = 0.0
        self.error = ""

    async def read(self, http: httpx.AsyncClient, body: dict[str, object]) -> None:
        latest_s = time.monotonic()
        async with http.stream("POST", "/v1/completions", json=body, timeout=60) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                if '"error"' in line:
                    self.error = line
                now_s = time.monotonic()
                self.longest_gap_s = max(self.longest_gap_s, now_s - latest_s)
                latest_s = now_s
                self.num_tokens += '"finish_reason":null' in line or '"finish_reason":"length"' in line


@contextlib.asynccontextmanager
async def streams(cluster: LiveCluster) -> AsyncIterator[tuple[list[Stream], asyncio.Task[object]]]:
    """All of them have tokens, and are being read; cancelled at the end."""
    bodies = [
        {
            "model": cluster.state.model,
            "prompt": [7 + index] * 100,
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "stream": True,
        }
        for index in range(NUM_STREAMS)
    ]
    async with httpx.AsyncClient(base_url=cluster.state.http_url) as http:
        begun = [Stream() for _ in bodies]

        async def read_all() -> None:
            await asyncio.gather(*(stream.read(http, body) for stream, body in zip(begun, bodies, strict=True)))

        reading = asyncio.create_task(read_all())
        try:
            async with asyncio.timeout(20):
                while not all(stream.num_tokens for stream in begun):
                    await asyncio.sleep(0.01)
            yield begun, reading
        finally:
            reading.cancel()
            await asyncio.wait([reading])


@contextlib.contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


async def test_streams_of_a_worker_that_is_stopped_go_on_elsewhere(cluster: LiveCluster) -> None:
    async with open_gauges(cluster.state) as gauges:
        async with streams(cluster) as (begun, reading):
            assert (await gauges.read())["decode-0"].num_decode_jobs
            with stopped(cluster.process_of("decode-0")):
                async with asyncio.timeout(30):
                    await reading
        print("longest gap", max(stream.longest_gap_s for stream in begun))
        assert [(stream.num_tokens, stream.error) for stream in begun] == [(NUM_TOKENS, "")] * NUM_STREAMS
        gaps = sorted(stream.longest_gap_s for stream in begun)
        assert SILENCE_S / 2 < gaps[-1] < GAP_S
        assert gaps[0] < SILENCE_S / 2, "the other worker's streams did not wait"
        await gauges.wait_idle(timeout_s=NOTICED_S)
    await _serves_with(cluster, num_workers=3)


async def test_workers_are_idle_when_their_coordinator_is_stopped(cluster: LiveCluster) -> None:
    async with open_gauges(cluster.state) as gauges, streams(cluster):
        with stopped(cluster.process_of("coordinator")):
            await gauges.wait_busy()
            began_s = time.monotonic()
            await gauges.wait_idle(timeout_s=NOTICED_S)
            took_s = time.monotonic() - began_s
            print("idle after", took_s)
            assert took_s > SILENCE_S / 2, "they waited for heartbeats"
    await _serves_with(cluster, num_workers=3)


async def _serves_with(cluster: LiveCluster, num_workers: int) -> None:
    """Until the coordinator has all workers again, and answers."""
    async with asyncio.timeout(30), httpx.AsyncClient(base_url=cluster.state.http_url) as http:
        while (await http.get("/metrics")).text.count("kvrelay_worker_info{") != num_workers:
            await asyncio.sleep(0.05)
        body = {"model": cluster.state.model, "prompt": [9], "max_tokens": 1}
        assert (await http.post("/v1/completions", json=body)).status_code == 200
