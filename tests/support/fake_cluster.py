"""A coordinator's engine over fake workers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from kvrelay.coordinator.breaker import BreakerConfig
from kvrelay.coordinator.cluster_engine import ClusterEngine, ClusterEngineConfig
from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.scheduler.policies import make_scheduler
from kvrelay.coordinator.worker_pool import WorkerPool
from kvrelay.tracing import Tracing
from kvrelay.v1 import cluster_pb2
from tests.support.fake_worker import FakeWorker, ScriptedModel


@dataclass(slots=True)
class Generated:
    """Everything that one generation yielded, put together per completion."""

    text: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    finish_reason: dict[int, str | None] = field(default_factory=dict)
    stop_reason: dict[int, Any] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    prompt_logprobs: list[list[Any]] = field(default_factory=list)
    outputs: list[RequestOutput] = field(default_factory=list)

    def add(self, output: RequestOutput) -> None:
        self.outputs.append(output)
        if output.prompt_logprobs:
            self.prompt_logprobs.append(list(output.prompt_logprobs))
        for part in output.outputs:
            self.text[part.index] = self.text.get(part.index, "") + part.text
            self.token_ids.setdefault(part.index, []).extend(part.token_ids)
            self.logprobs.setdefault(part.index, []).extend(part.logprobs or [])
            self.finish_reason[part.index] = part.finish_reason
            self.stop_reason[part.index] = part.stop_reason


class FakeCluster:
    """One prefill and one decode worker; `with_prefill=False` leaves the first one away."""

    def __init__(self, engine: ClusterEngine, pool: WorkerPool, prefill: FakeWorker, decode: FakeWorker) -> None:
        self.engine = engine
        self.pool = pool
        self.prefill = prefill
        self.decode = decode

    def stream(
        self, prompt: Sequence[int], request_id: str = "request", **sampling: Any
    ) -> AsyncIterator[RequestOutput]:
        params = SamplingParams(output_kind=RequestOutputKind.DELTA, **sampling)
        return self.engine.generate(tokens_input(list(prompt)), params, request_id)

    async def generate(self, prompt: Sequence[int], request_id: str = "request", **sampling: Any) -> Generated:
        generated = Generated()
        async with asyncio.timeout(20):
            async for output in self.stream(prompt, request_id, **sampling):
                generated.add(output)
        return generated

    def assert_idle(self) -> None:
        """Nothing of any request is left in the coordinator, nor is any told by the workers."""
        self.assert_nothing_requested()
        for view in self.pool.views():
            assert (view.num_queued_prompt_tokens, view.num_running_requests) == (0, 0)

    def assert_nothing_requested(self) -> None:
        """Nothing of any request is left in the coordinator, whatever the workers say."""
        assert self.engine.num_requests == 0
        assert not self.engine._outputs.request_states
        assert not self.engine._outputs.parent_requests
        assert not self.engine._outputs.external_req_ids
        for member in self.pool._members.values():
            assert not member.load._prompts
            assert not member.load.has_sequences
            assert not member.prefills


@contextlib.asynccontextmanager
async def fake_cluster(
    front_end: FrontEnd,
    tokens: Sequence[int] | None = None,
    *,
    with_prefill: bool = True,
    tracing: Tracing | None = None,
    config: ClusterEngineConfig | None = None,
    breaker: BreakerConfig | None = None,
) -> AsyncIterator[FakeCluster]:
    """With `tokens` the workers generate these; without, the test speaks for them."""
    model = ScriptedModel(tokens) if tokens else None
    name = front_end.served_model_name
    prefill = FakeWorker("p1", cluster_pb2.ROLE_PREFILL, model and model.prefill, model=name)
    decode = FakeWorker("d1", cluster_pb2.ROLE_DECODE, model and model.decode, model=name)
    pool = WorkerPool("coordinator-1", breaker=breaker)
    engine = ClusterEngine(front_end, pool, scheduler=make_scheduler("least-loaded"), tracing=tracing, config=config)
    workers = [prefill, decode] if with_prefill else [decode]
    try:
        for worker in workers:
            await worker.start()
        async with pool.running(engine):
            for worker in workers:
                pool.join(worker.info)
            await until(lambda: len(pool.workers()) == len(workers))
            yield FakeCluster(engine, pool, prefill, decode)
    finally:
        for worker in workers:
            await worker.stop()


async def until(condition: Any, timeout_s: float = 10.0) -> None:
    """Let the event loop run until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)
