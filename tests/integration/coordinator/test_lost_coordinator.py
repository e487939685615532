"""A coordinator is lost in mid generation: does the client get the rest from the next one, and no token twice?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from kvrelay.client import AsyncClient, Client
from kvrelay.client.async_client import AsyncStream
from kvrelay.client.connection import UnreachableError
from kvrelay.client.options import GenerateOptions
from kvrelay.client.results import Chunk, Collector, Generation
from kvrelay.coordinator.cluster_engine import ClusterEngine
from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.inference_service import InferenceService
from kvrelay.coordinator.scheduler.policies import make_scheduler
from kvrelay.engine.simulated_model import SimulatedConfig
from kvrelay.errors import InvalidRequestError
from kvrelay.grpc_options import server_options
from kvrelay.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.support.simulated_cluster import SimulatedCluster, simulated_cluster, simulated_coordinator

Resume = inference_pb2.Resume
PROMPT = list(range(1000, 1100))
NUM_TOKENS = 24
SLOW = SimulatedConfig(time_scale=0.5)
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 1.0, "seed": 7, "n": 3},
    {"temperature": 0.0, "min_tokens": 20},
    {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 0.0, "stop": ["no such words in here"]},
]


class Coordinators:
    """One after the other at one address, over the same workers."""

    def __init__(self, front_end: FrontEnd, cluster: SimulatedCluster) -> None:
        self.address = "127.0.0.1:0"
        self._front_end = front_end
        self._cluster = cluster
        self._server: grpc.aio.Server | None = None
        self._stack = contextlib.AsyncExitStack()

    async def start(self) -> ClusterEngine:
        opened = simulated_coordinator(self._front_end, self._cluster.workers, make_scheduler("least-loaded"))
        engine, _ = await self._stack.enter_async_context(opened)
        self._server = grpc.aio.server(options=server_options())
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(engine), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(self.address)}"
        await self._server.start()
        return engine

    async def lose(self) -> None:
        assert self._server is not None
        await self._server.stop(None)
        await self._stack.aclose()


@contextlib.asynccontextmanager
async def coordinators(front_end: FrontEnd) -> AsyncIterator[Coordinators]:
    async with simulated_cluster(front_end, config=SLOW) as cluster:
        found = Coordinators(front_end, cluster)
        await found.start()
        try:
            yield found
        finally:
            await found.lose()
            await cluster.wait_idle()


async def whole(client: AsyncClient, **sampling: Any) -> Generation:
    return await client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, **sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 10])
async def test_a_stream_goes_on_with_the_next(front_end: FrontEnd, num_tokens: int, sampling: dict[str, Any]) -> None:
    async with coordinators(front_end) as found, AsyncClient(found.address) as client:
        wanted = await whole(client, **sampling)
        collector, has_some = Collector(), asyncio.Event()

        async def read() -> None:
            async for chunk in client.stream(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, **sampling):
                collector.add(chunk)
                if sum(map(len, collector.token_ids.values())) >= num_tokens:
                    has_some.set()

        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            tasks.create_task(read())
            if num_tokens:
                await has_some.wait()
            else:
                await asyncio.sleep(0.05)
            await found.lose()
            engine = await found.start()
        got = collector.result()
        assert got.completions == wanted.completions
        assert got.usage == wanted.usage
        assert engine.num_requests == 0


async def test_a_completion_that_has_ended_does_not_come_again(front_end: FrontEnd) -> None:
    async with coordinators(front_end) as found, AsyncClient(found.address) as client:
        options: GenerateOptions = {"n": 2, "seed": 1, "temperature": 1.0, "max_tokens": NUM_TOKENS}
        wanted = await client.generate(PROMPT, **options)
        collector = Collector()
        stream = client.stream(PROMPT, **options)
        await stream.aclose()
        first = wanted.completions[0]
        stream._resumption.took(
            inference_pb2.GenerateResponse(
                token_ids=first.token_ids, text=first.text, finish_reason=common_pb2.FINISH_REASON_LENGTH
            )
        )
        stream._closed = False
        stream._start()
        async for chunk in stream:
            assert chunk.index == 1
            collector.add(chunk)
        got = collector.result()
        assert got.completions == wanted.completions[1:]
        assert got.usage == wanted.usage


async def test_the_blocking_client_goes_on_as_well(front_end: FrontEnd) -> None:
    async with coordinators(front_end) as found:
        async with AsyncClient(found.address) as client:
            wanted = await whole(client, temperature=0.0)
        with Client(found.address) as blocking:
            stream = blocking.stream(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.0)
            chunks: list[Chunk] = [await asyncio.to_thread(next, stream)]
            await found.lose()
            reading = asyncio.create_task(asyncio.to_thread(list, stream))
            await found.start()
            async with asyncio.timeout(30):
                chunks += await reading
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == wanted.token_ids
        assert "".join(chunk.text for chunk in chunks) == wanted.text


async def test_who_does_not_want_to_go_on_gets_the_error(front_end: FrontEnd) -> None:
    async with coordinators(front_end) as found, AsyncClient(found.address, reconnect_for_s=0) as client:
        chunks = client.stream(PROMPT, max_tokens=NUM_TOKENS, temperature=0.0)
        await _fails_with_its_coordinator(chunks, found)


async def _fails_with_its_coordinator(chunks: AsyncStream, found: Coordinators) -> None:
    assert (await anext(chunks)).token_ids
    await found.lose()
    with pytest.raises(UnreachableError):
        async for _ in chunks:
            pass
    await found.start()


@pytest.mark.parametrize(
    ("resume", "sampling", "message"),
    [
        (Resume(index=2, token_ids=[5]), {"n": 2}, "index 2, and n is 2"),
        (Resume(token_ids=[5] * 8), {"max_tokens": 8}, "nothing would be left"),
        (Resume(token_ids=[10**6]), {}, "token id 1000000"),
        (Resume(token_ids=[5] * 8000), {"max_tokens": 9000}, "tokens"),
        (Resume(token_ids=[5], is_finished=True), {}, "all completions have ended"),
        (Resume(is_finished=True), {"n": 2}, "without a token"),
    ],
)
async def test_what_cannot_go_on_is_refused(
    front_end: FrontEnd, resume: Resume, sampling: dict[str, Any], message: str
) -> None:
    async with coordinators(front_end) as found, AsyncClient(found.address) as client:
        stream = client.stream(PROMPT, **({"max_tokens": 20} | sampling))
        await stream.aclose()
        stream._resumption.request.resume.append(resume)
        stream._closed = False
        stream._start()
        with pytest.raises(InvalidRequestError, match=message):
            await anext(stream)
