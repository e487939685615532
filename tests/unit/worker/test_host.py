"""A host starts its engine, ends with it, and counts what is queued."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kvrelay.engine.base import EngineDeadError, EngineRequest, EngineStep
from kvrelay.engine.simulated import SimulatedEngine
from kvrelay.engine.simulated_model import SimulatedConfig
from kvrelay.tracing import Tracing
from kvrelay.v1 import common_pb2, worker_pb2
from kvrelay.worker.host import WorkerHost
from kvrelay.worker.running_host import open_host
from kvrelay.worker.status import worker_status
from kvrelay.worker.store_config import StoreConfig
from kvrelay.worker.submission import Handlers, Submission
from kvrelay.worker.work import Work
from tests.support.eventually import eventually

CONFIG = SimulatedConfig(block_size_tokens=4, max_model_len_tokens=64, num_engine_blocks=64, time_scale=0)
STORE = StoreConfig(size_bytes=1 << 20)
PROMPT = list(range(10))


class FragileEngine(SimulatedEngine):
    """Fails where it is told to."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        self.dead = asyncio.Event()
        self.submit_error: Exception | None = None
        self.may_submit = asyncio.Event()
        self.may_submit.set()
        self.aborted: list[str] = []
        self.closed = False

    async def submit(self, request: EngineRequest) -> None:
        await self.may_submit.wait()
        if self.submit_error is not None:
            raise self.submit_error
        await super().submit(request)

    async def abort(self, request_ids: Sequence[str]) -> None:
        self.aborted.extend(request_ids)
        await super().abort(request_ids)

    async def steps(self) -> AsyncIterator[EngineStep]:
        if self.dead.is_set():
            raise EngineDeadError("it died")
        async for step in super().steps():
            yield step
            if self.dead.is_set():
                raise EngineDeadError("it died")

    async def close(self) -> None:
        self.closed = True
        await super().close()


async def submit(
    host: WorkerHost, deltas: list[worker_pb2.TokenDelta], max_tokens: int = 5, prompt: Sequence[int] = PROMPT
) -> Submission:
    work = Work(
        name="decode",
        request_id="r",
        prompt_token_ids=prompt,
        sampling=common_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        cache_salt="",
        priority=0,
        trace=common_pb2.TraceContext(),
    )
    hasher, stored = await host.look_up("", prompt)
    return await host.submit(work, hasher, stored, save_partial=False, handlers=Handlers(sink=deltas.append))


def assert_idle(host: WorkerHost) -> None:
    status = worker_status(host, "w")
    assert (status.store.num_reserved, status.store.num_pinned, status.num_queued_prompt_tokens) == (0, 0, 0)
    assert (status.num_running_requests, status.num_waiting_requests) == (0, 0)


async def test_a_request_runs_to_its_end() -> None:
    deltas: list[worker_pb2.TokenDelta] = []
    async with open_host(FragileEngine(), STORE, Tracing()) as host:
        submission = await submit(host, deltas)
        await submission.ended.wait()
        await submission.closed.wait()
        assert sum(len(delta.token_ids) for delta in deltas) == 5
        await eventually(lambda: not worker_status(host, "w").num_running_requests)
        assert_idle(host)


async def test_what_is_computed_of_a_prompt_is_told_until_its_first_token() -> None:
    engine = SimulatedEngine(replace(CONFIG, max_batched_tokens=8, prefill_overhead_s=0.05, time_scale=1))
    told: list[tuple[int, int]] = []
    async with open_host(engine, STORE, Tracing()) as host:
        submission = await submit(host, [], prompt=list(range(40)))
        while not submission.ended.is_set():
            status = worker_status(host, "w")
            told.append((status.num_queued_prompt_tokens, status.num_computed_prompt_tokens))
            await asyncio.sleep(0.005)
    assert list(dict.fromkeys(told)) == [(40, 0), (40, 8), (40, 16), (40, 24), (40, 32), (0, 0)]


async def test_an_engine_that_refuses_a_request_leaves_nothing() -> None:
    engine = FragileEngine()
    engine.submit_error = RuntimeError("no")
    async with open_host(engine, STORE, Tracing()) as host:
        with pytest.raises(RuntimeError, match="no"):
            await submit(host, [])
        assert_idle(host)


@pytest.mark.parametrize("num_cancels", [1, 2, 3])
@pytest.mark.parametrize("error", [None, RuntimeError("no")])
async def test_a_submission_cancelled_on_its_way_leaves_nothing(num_cancels: int, error: Exception | None) -> None:
    """The client cancels, and then its coordinator's stream breaks, too."""
    engine = FragileEngine()
    engine.submit_error = error
    async with open_host(engine, STORE, Tracing()) as host:
        engine.may_submit.clear()
        task = asyncio.create_task(submit(host, []))
        await eventually(lambda: worker_status(host, "w").num_queued_prompt_tokens == len(PROMPT))
        for _ in range(num_cancels):
            task.cancel()
            await asyncio.sleep(0)
        engine.may_submit.set()
        await asyncio.wait([task], timeout=10)
        assert task.cancelled()
        await eventually(lambda: not worker_status(host, "w").store.num_reserved)
        await eventually(lambda: engine.aborted == ["r.1"])
        assert_idle(host)


async def test_an_engine_that_dies_ends_the_host() -> None:
    engine = FragileEngine()
    paths: list[Path] = []

    async def serve() -> None:
        async with open_host(engine, STORE, Tracing()) as host:
            paths.append(Path(host.segment.path))
            engine.dead.set()
            await submit(host, [])
            await asyncio.Event().wait()

    async with asyncio.timeout(10):
        with pytest.raises(ExceptionGroup) as caught:
            await serve()
    assert caught.group_contains(EngineDeadError)
    assert engine.closed
    assert not paths[0].exists()


async def test_an_engine_that_does_not_start_leaves_nothing() -> None:
    engine = FragileEngine()

    async def start(*_: object) -> None:
        raise RuntimeError("no weights")

    engine.start = start  # type: ignore[assignment]
    num_descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RuntimeError, match="no weights"):
        async with open_host(engine, STORE, Tracing()):
            pass
    assert engine.closed
    assert len(os.listdir("/proc/self/fd")) == num_descriptors


async def test_a_disk_that_is_too_small_ends_the_start_before_the_engines(tmp_path: Path) -> None:
    engine = FragileEngine()
    num_descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="bytes free"):
        async with open_host(
            engine, StoreConfig(size_bytes=1 << 20, disk_bytes=1 << 60, disk_path=tmp_path), Tracing()
        ):
            pass
    assert len(os.listdir("/proc/self/fd")) == num_descriptors


async def test_a_disk_too_small_for_one_block_ends_the_start(tmp_path: Path) -> None:
    engine = FragileEngine()
    num_descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ExceptionGroup) as caught:
        async with open_host(engine, StoreConfig(size_bytes=1 << 20, disk_bytes=100, disk_path=tmp_path), Tracing()):
            pass
    assert caught.group_contains(ValueError, match="raise --kv-disk-bytes")
    assert engine.closed
    assert len(os.listdir("/proc/self/fd")) == num_descriptors


async def test_the_disk_ends_with_the_host(tmp_path: Path) -> None:
    config = StoreConfig(size_bytes=1 << 20, disk_bytes=1 << 20, disk_path=tmp_path)
    num_descriptors = len(os.listdir("/proc/self/fd"))
    async with open_host(FragileEngine(), config, Tracing()) as host:
        assert worker_status(host, "w").store.disk_bytes == 1 << 20
        for i in range(80):
            submission = await submit(host, [], prompt=[i] * 50)
            await submission.closed.wait()
        await eventually(lambda: host.counters["disk_blocks_written"])
        assert [thread for thread in threading.enumerate() if thread.name.startswith("disk-")]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("disk-")]
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == num_descriptors


async def test_slots_are_lent_to_the_engine_up_to_the_limit_and_again() -> None:
    async with open_host(FragileEngine(), STORE, Tracing()) as host:
        most = worker_status(host, "w").store.num_granted
        assert most == min(64, host.segment.num_slots // 8)
        submission = await submit(host, [], max_tokens=50)
        await submission.closed.wait()
        assert worker_status(host, "w").store.num_granted == most
        assert worker_status(host, "w").store.num_evictable == (len(PROMPT) + 50 - 1) // 4


async def test_it_is_not_idle_while_blocks_are_held_for_a_request_that_is_still_elsewhere() -> None:
    async with open_host(FragileEngine(), STORE, Tracing()) as host:
        await host.wait_idle()
        host.receiver.offer("r", host.info.layout, bytes(16))
        waiting = asyncio.create_task(host.wait_idle())
        _, pending = await asyncio.wait([waiting], timeout=0.1)
        assert pending
        host.receiver.let_go("r")
        async with asyncio.timeout(10):
            await waiting
