"""An engine without room for all sequences takes them out and computes them again: nobody sees it in an answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from kvrelay.client import AsyncClient
from kvrelay.client.results import Generation
from tests.support.cluster_gauges import open_gauges
from tests.support.live_cluster import LiveCluster, live_cluster
from tests.support.sampler_cases import all_at_once, one_by_one, tokens_and_texts

pytestmark = pytest.mark.timeout(600)

NUM_BLOCKS = 20
"""Of 32 tokens. All cases together need 39, each one 7."""
NUM_TOKENS = 96


@pytest.fixture(scope="module")
def cluster(no_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    options = ("--dtype", "float32", "--max-model-len", "512")
    few = f"--decode-args=--num-gpu-blocks-override {NUM_BLOCKS}"
    with live_cluster(tmp_path_factory.mktemp("few-blocks"), few, engine_options=options) as cluster:
        yield cluster


def num_preempted(answers: Mapping[str, Generation]) -> int:
    """Completions that lost their blocks on the way."""
    timelines = [answer.timeline for answer in answers.values() if answer.timeline is not None]
    assert len(timelines) == len(answers)
    return sum(name == "decode.preempted" for timeline in timelines for name, _ in timeline.events)


async def test_answers_are_those_of_an_engine_with_room_also_after_a_worker_was_lost(cluster: LiveCluster) -> None:
    victim = cluster.process_of("decode-worker")
    async with AsyncClient(cluster.state.grpc_address) as client, open_gauges(cluster.state) as gauges:
        wanted = await one_by_one(client, NUM_TOKENS)
        assert num_preempted(wanted) == 0
        async with all_at_once(client, NUM_TOKENS, begun=1) as streams:
            got = {name: await stream for name, stream in streams.items()}
        assert num_preempted(got) > 0
        assert tokens_and_texts(got) == tokens_and_texts(wanted)
        await gauges.wait_idle(timeout_s=10)
        async with all_at_once(client, NUM_TOKENS, begun=6, num_begun=3) as streams:
            victim.kill()
            resumed = {name: await stream for name, stream in streams.items()}
        assert num_preempted(resumed) > 0
        assert tokens_and_texts(resumed) == tokens_and_texts(wanted)
