"""Tensor-parallel engines of different sizes hand KV over: the answers are those of one engine with one rank."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from kvrelay import etcd, membership
from kvrelay.client import AsyncClient
from kvrelay.client.results import Generation
from tests.support.cluster_gauges import open_gauges
from tests.support.equality_cases import handover_cases
from tests.support.live_cluster import LiveCluster, live_cluster
from tests.support.random_model import HEAD_ELEMENTS, KV_HEADS, LAYERS, write_random_model
from tests.support.reference_engine import reference_answers

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("no_cluster")]

BLOCK_TOKENS = 32
BLOCK_BYTES = LAYERS * KV_HEADS * BLOCK_TOKENS * 2 * HEAD_ELEMENTS * 4
RANKS = [(2, 1), (1, 2)]
"""Of the prefill and of the decode worker."""


@pytest.fixture(scope="module")
def random_model(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("random-model")
    write_random_model(target, Path(model_path))
    return target


@pytest.fixture(scope="module")
def answers(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return reference_answers(str(random_model), "handover", tmp_path_factory.mktemp("random-reference"))


@pytest.fixture(scope="module", params=RANKS, ids=lambda ranks: f"prefill-{ranks[0]}-decode-{ranks[1]}")
def ranks(request: pytest.FixtureRequest) -> tuple[int, int]:
    assert isinstance(request.param, tuple)
    return request.param


@pytest.fixture(scope="module")
def cluster(
    ranks: tuple[int, int],
    random_model: Path,
    answers: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LiveCluster]:
    flags = ["--model", str(random_model), "--kv-host-bytes", "64MiB"]
    for role, size in zip(("prefill", "decode"), ranks, strict=True):
        flags += [f"--{role}-args", f"--tensor-parallel-size {size}"]
    options = ("--dtype", "float32", "--max-model-len", "4096")
    with live_cluster(tmp_path_factory.mktemp("ranks"), *flags, engine_options=options) as cluster:
        yield cluster


@pytest_asyncio.fixture
async def client(cluster: LiveCluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.state.grpc_address) as client:
        yield client


async def generate(client: AsyncClient, prompt: list[int], options: dict[str, Any]) -> Generation:
    return await client.generate(prompt, **options, include_timeline=True)


async def test_the_answers_are_one_engine_s(cluster: LiveCluster, client: AsyncClient, answers: dict[str, Any]) -> None:
    cases = handover_cases()
    async with asyncio.TaskGroup() as tasks, open_gauges(cluster.state) as gauges:
        asked = [tasks.create_task(generate(client, answers[c.name]["prompt_token_ids"], c.options)) for c in cases]
        await asyncio.wait(asked)
        await gauges.wait_idle(timeout_s=5)

    for case, task in zip(cases, asked, strict=True):
        generation, answer = task.result(), answers[case.name]
        assert list(generation.completions[0].token_ids) == answer["completions"][0]["token_ids"], case.name
        assert generation.completions[0].text == answer["completions"][0]["text"]
        num_blocks = math.ceil(len(answer["prompt_token_ids"]) / BLOCK_TOKENS)
        assert generation.timeline is not None
        assert generation.timeline.counters["decode.blocks_loaded"] == num_blocks
        assert generation.timeline.counters["decode.tokens_stored"] == len(answer["prompt_token_ids"])
        assert generation.timeline.counters["kv.received_bytes"] == num_blocks * BLOCK_BYTES


async def test_the_first_block_of_a_prompt_decides_the_answer(client: AsyncClient, answers: dict[str, Any]) -> None:
    """Otherwise equal answers would say nothing about the blocks that were handed over."""
    case = next(case for case in handover_cases() if case.num_tokens == 300)
    prompt = answers[case.name]["prompt_token_ids"]

    other = await generate(client, [*reversed(prompt[:BLOCK_TOKENS]), *prompt[BLOCK_TOKENS:]], case.options)

    assert list(other.completions[0].token_ids) != answers[case.name]["completions"][0]["token_ids"]


def num_ranks(cluster: LiveCluster, role: str) -> int:
    """As vLLM logs them; a single one has no number."""
    log = (Path(cluster.state.log_dir) / f"{role}-0.log").read_text()
    return max(1, len(set(re.findall(r"Worker_TP\d+", log))))


async def test_both_sides_have_one_layout_and_the_ranks_they_were_given(
    cluster: LiveCluster, ranks: tuple[int, int]
) -> None:
    async with etcd.connect(etcd.EtcdConfig(endpoints=cluster.state.etcd)) as etcd_client:
        workers = await membership.list_workers(etcd_client, cluster.state.cluster)

    assert len(workers) == 2
    assert len({worker.layout.fingerprint for worker in workers}) == 1
    assert {worker.layout.num_kv_heads for worker in workers} == {KV_HEADS}
    assert tuple(num_ranks(cluster, role) for role in ("prefill", "decode")) == ranks
