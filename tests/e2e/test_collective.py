"""Between real engines KV blocks go through a gloo group when that is asked for, and the group ends with them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from kvrelay.v1.worker_pb2 import WorkerStatus
from tests.support.cluster_gauges import open_gauges
from tests.support.live_cluster import LiveCluster, live_cluster

pytestmark = pytest.mark.timeout(600)

PROMPT_TOKENS = 1500
BLOCK_TOKENS = 32


def generate(cluster: LiveCluster, num_tokens: int) -> None:
    """A prompt that nobody has seen before."""
    body = {
        "model": httpx.get(f"{cluster.state.http_url}/v1/models").json()["data"][0]["id"],
        "prompt": random.choices(range(1000, 40_000), k=num_tokens),
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
    }
    httpx.post(f"{cluster.state.http_url}/v1/completions", json=body, timeout=60).raise_for_status()


def of_role(statuses: Mapping[str, WorkerStatus], role: str) -> WorkerStatus:
    return next(status for worker_id, status in statuses.items() if worker_id.startswith(role))


@pytest.mark.usefixtures("no_cluster")
async def test_a_prompts_blocks_go_through_the_group(tmp_path: Path) -> None:
    """The prompts before it go by gRPC until both workers have the group."""
    with live_cluster(tmp_path, "--kv-transport", "collective", engine_options=("--max-model-len", "2048")) as cluster:
        async with open_gauges(cluster.state) as gauges:
            for _ in range(20):
                generate(cluster, 2 * BLOCK_TOKENS)
                before = await gauges.read()
                if of_role(before, "prefill").counters["bytes_pushed_gloo"]:
                    break
            generate(cluster, PROMPT_TOKENS)
            await gauges.wait_idle(timeout_s=10)
            after = await gauges.read()
    sent = {
        name: of_role(after, "prefill").counters[name] - of_role(before, "prefill").counters[name]
        for name in ("bytes_pushed_gloo", "bytes_pushed_grpc", "bytes_pushed_shm", "collective_fallbacks")
    }
    num_blocks = -(-PROMPT_TOKENS // BLOCK_TOKENS)
    num_bytes = num_blocks * of_role(after, "prefill").store.slot_bytes
    assert sent == {
        "bytes_pushed_gloo": num_bytes,
        "bytes_pushed_grpc": 0,
        "bytes_pushed_shm": 0,
        "collective_fallbacks": 0,
    }
    loaded = [of_role(statuses, "decode").counters["blocks_loaded"] for statuses in (before, after)]
    assert loaded[1] - loaded[0] == num_blocks
