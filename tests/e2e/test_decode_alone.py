"""A cluster without prefill workers computes prompts where it decodes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from kvrelay.client import AsyncClient
from tests.support.live_cluster import live_cluster

pytestmark = [pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]

STEP_TOKENS = 256


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(no_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncClient]:
    options = ("--dtype", "float32", "--max-model-len", "2048", "--max-num-batched-tokens", str(STEP_TOKENS))
    with live_cluster(tmp_path_factory.mktemp("decode"), "--prefill", "0", engine_options=options) as cluster:
        async with AsyncClient(cluster.state.grpc_address) as client:
            yield client


@pytest.mark.parametrize("num_tokens", [STEP_TOKENS + 1, 3 * STEP_TOKENS])
async def test_a_seed_counts_tokens_and_not_the_steps_of_the_prompt(client: AsyncClient, num_tokens: int) -> None:
    prompt = list(range(1000, 1000 + num_tokens))

    async def tokens(seed: int) -> list[int]:
        generation = await client.generate(prompt, max_tokens=12, temperature=1.0, seed=seed, ignore_eos=True)
        return list(generation.completions[0].token_ids)

    in_steps = await tokens(7)
    from_cache = await tokens(7)

    assert in_steps == from_cache
    assert in_steps != await tokens(8)
