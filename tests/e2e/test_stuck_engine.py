"""A real engine core stops in the middle of a stream: its worker is started again, and the client sees a pause."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kvrelay.client import AsyncClient
from tests.support.cluster_gauges import ClusterGauges, open_gauges
from tests.support.live_cluster import live_cluster
from tests.support.processes import gone

pytestmark = pytest.mark.timeout(600)

PROMPT = list(range(7000, 7100))
NUM_TOKENS = 48
STUCK_S = 4.0
HEALTH_INTERVAL_S = 1.0


async def _never_busy(gauges: ClusterGauges, seconds: float) -> None:
    """Health checks are made meanwhile, and seen by nobody."""
    before, until_s = await gauges.read(), time.monotonic() + seconds
    while time.monotonic() < until_s:
        assert await gauges.read() == before


@pytest.mark.usefixtures("no_cluster")
async def test_a_stream_outlives_an_engine_core_that_stops(tmp_path: Path) -> None:
    watch = ("--engine-stuck-s", str(STUCK_S), "--health-interval-s", str(HEALTH_INTERVAL_S))
    options = ("--dtype", "float32", "--max-model-len", "1024")
    with live_cluster(tmp_path, *watch, engine_options=options) as cluster:
        sampling = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        async with AsyncClient(cluster.state.grpc_address) as client, open_gauges(cluster.state) as gauges:
            undisturbed = await client.generate(PROMPT, **sampling)
            await gauges.wait_idle(timeout_s=5)
            await _never_busy(gauges, 3 * HEALTH_INTERVAL_S)
            victim = cluster.process_of("decode-worker")
            (core,) = [child for child in victim.children() if "EngineCore" in child.name() + str(child.cmdline())]
            tokens: list[int] = []
            async with client.stream(PROMPT, **sampling) as stream:
                async for chunk in stream:
                    tokens.extend(chunk.token_ids)
                    if len(tokens) >= NUM_TOKENS // 4 and victim.is_running() and core.status() != "stopped":
                        core.suspend()
        assert gone([victim.pid, core.pid])
        assert tokens == list(undisturbed.completions[0].token_ids)
