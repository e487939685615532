"""A real engine gives the same tokens after blocks that came back from disk."""

from __future__ import annotations

import random
from pathlib import Path

import httpx
import pytest

from tests.support.cluster_gauges import open_gauges
from tests.support.live_cluster import LiveCluster, live_cluster

pytestmark = pytest.mark.timeout(600)

NUM_PROMPTS = 14
PROMPT_TOKENS = 400


def prompt_of(seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000, 40_000), k=PROMPT_TOKENS)


def generate(cluster: LiveCluster, seed: int) -> str:
    body = {
        "model": httpx.get(f"{cluster.state.http_url}/v1/models").json()["data"][0]["id"],
        "prompt": prompt_of(seed),
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
    }
    reply = httpx.post(f"{cluster.state.http_url}/v1/completions", json=body, timeout=60).raise_for_status()
    text = reply.json()["choices"][0]["text"]
    assert isinstance(text, str)
    return text


@pytest.mark.usefixtures("no_cluster")
async def test_a_prompt_comes_back_from_disk(tmp_path: Path) -> None:
    """Many more prompts than the store has room for, and engines that remember nothing themselves."""
    flags = ("--kv-host-bytes", "64MiB", "--kv-disk-bytes", "512MiB", "--kv-disk-path", str(tmp_path))
    options = ("--dtype", "float32", "--max-model-len", "1024", "--no-enable-prefix-caching")
    with live_cluster(tmp_path, *flags, engine_options=options) as cluster:
        answers = [generate(cluster, seed) for seed in range(NUM_PROMPTS)]
        assert [generate(cluster, seed) for seed in range(NUM_PROMPTS)] == answers
        async with open_gauges(cluster.state) as gauges:
            await gauges.wait_idle(timeout_s=10)
            statuses = await gauges.read()
        assert len(statuses) == 2
        for status in statuses.values():
            assert status.store.disk_bytes == 512 << 20
            assert status.counters["disk_blocks_written"] > 0
            assert status.counters["disk_errors"] == 0
        prefill = next(status for worker_id, status in statuses.items() if worker_id.startswith("prefill"))
        assert prefill.counters["blocks_loaded"] >= prefill.counters["disk_blocks_read"] > 0
