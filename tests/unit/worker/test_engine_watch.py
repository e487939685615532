"""An engine that does nothing is found out, and what finds it out disturbs nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from kvrelay.block_hash import BlockHasher
from kvrelay.engine.base import EngineRequest
from kvrelay.engine.simulated import SimulatedEngine
from kvrelay.engine.simulated_model import SimulatedConfig
from kvrelay.errors import first_leaf
from kvrelay.tracing import Tracing
from kvrelay.v1 import common_pb2, worker_pb2
from kvrelay.worker.engine_watch import DEFAULT_WATCH, EngineStuckError, Progress, Verdict, WatchConfig
from kvrelay.worker.host import WorkerHost
from kvrelay.worker.running_host import open_host
from kvrelay.worker.status import worker_status
from kvrelay.worker.store_config import StoreConfig
from kvrelay.worker.submission import Handlers, Submission
from kvrelay.worker.work import Work
from tests.support.eventually import eventually

CONFIG = SimulatedConfig(block_size_tokens=4, max_model_len_tokens=64, num_engine_blocks=64, time_scale=0)
QUICK = WatchConfig(stuck_s=0.2, health_interval_s=0.04)
PATIENT = WatchConfig(stuck_s=600.0, health_interval_s=0.04)


class Watched:
    """An engine's progress, under a clock that the test moves."""

    def __init__(self, config: WatchConfig = DEFAULT_WATCH) -> None:
        self.now_s = 0.0
        self.tick_s = config.tick_s
        self.progress = Progress(config, lambda: self.now_s)

    def verdicts(self, seconds: float, *, has_requests: bool) -> list[Verdict]:
        """What is seen in this time, each once and in its order."""
        seen: list[Verdict] = []
        for _ in range(round(seconds / self.tick_s)):
            self.now_s += self.tick_s
            verdict = self.progress.look(has_requests=has_requests)
            if verdict not in seen[-1:]:
                seen.append(verdict)
        return seen


def test_an_engine_with_requests_and_without_steps_is_stuck_after_a_while() -> None:
    watched = Watched()
    watched.progress.saw_step()
    assert watched.verdicts(60, has_requests=True) == [Verdict.FINE]
    assert watched.verdicts(1, has_requests=True) == [Verdict.STUCK]


def test_every_step_begins_the_time_anew_whether_it_brings_tokens_or_not() -> None:
    watched = Watched()
    for _ in range(10):
        assert watched.verdicts(50, has_requests=True) == [Verdict.FINE]
        watched.progress.saw_step()


def test_a_worker_that_was_stopped_itself_does_not_blame_its_engine() -> None:
    watched = Watched()
    assert watched.verdicts(50, has_requests=True) == [Verdict.FINE]
    watched.now_s += 3600
    assert watched.progress.look(has_requests=True) is Verdict.FINE
    assert watched.verdicts(29, has_requests=True) == [Verdict.FINE]
    assert watched.verdicts(2, has_requests=True) == [Verdict.STUCK]


def test_an_idle_engine_is_asked_for_a_token_after_a_while_and_not_before_its_answer() -> None:
    watched = Watched()
    assert watched.verdicts(29, has_requests=False) == [Verdict.FINE]
    assert watched.verdicts(1, has_requests=False) == [Verdict.ASK]
    watched.progress.asked()
    assert watched.verdicts(20, has_requests=False) == [Verdict.FINE]
    watched.progress.saw_step()
    watched.progress.answered()
    assert watched.verdicts(29, has_requests=False) == [Verdict.FINE]
    assert watched.verdicts(1, has_requests=False) == [Verdict.ASK]


def test_an_engine_that_gives_tokens_or_has_requests_is_not_asked() -> None:
    watched = Watched()
    for _ in range(5):
        assert watched.verdicts(20, has_requests=False) == [Verdict.FINE]
        watched.progress.saw_token()
    assert watched.verdicts(50, has_requests=True) == [Verdict.FINE]


def test_an_engine_that_does_not_answer_is_slow_and_then_stuck() -> None:
    watched = Watched(WatchConfig(probe_timeout_s=5.0))
    watched.progress.asked()
    assert watched.verdicts(62, has_requests=False) == [Verdict.FINE, Verdict.SLOW, Verdict.STUCK]


def test_an_idle_engine_is_never_stuck() -> None:
    assert Verdict.STUCK not in Watched().verdicts(3600, has_requests=False)


class HangingEngine(SimulatedEngine):
    """Ends no step while it is told to hang, and refuses what it is told to refuse."""

    def __init__(self, config: SimulatedConfig) -> None:
        super().__init__(config, sleep=self._wait)
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.error: Exception | None = None
        self.asked: list[EngineRequest] = []
        self.aborted: list[str] = []

    async def _wait(self, _: float) -> None:
        await self.may_go_on.wait()

    async def submit(self, request: EngineRequest) -> None:
        self.asked.append(request)
        if self.error is not None:
            raise self.error
        await super().submit(request)

    async def abort(self, request_ids: Sequence[str]) -> None:
        self.aborted.extend(request_ids)
        await super().abort(request_ids)


@asynccontextmanager
async def host_of(engine: HangingEngine, watch: WatchConfig) -> AsyncIterator[WorkerHost]:
    async with open_host(engine, StoreConfig(size_bytes=1 << 20), Tracing(), watch) as host:
        yield host


async def submit(host: WorkerHost, num_tokens: int = 4) -> Submission:
    prompt = list(range(10))
    work = Work(
        name="decode",
        request_id="r",
        prompt_token_ids=prompt,
        sampling=common_pb2.SamplingParams(max_tokens=num_tokens, ignore_eos=True),
        cache_salt="",
        priority=0,
        trace=common_pb2.TraceContext(),
    )
    hasher: BlockHasher
    hasher, stored = await host.look_up("", prompt)
    return await host.submit(work, hasher, stored, save_partial=False, handlers=Handlers(sink=lambda _: None))


def gauges(host: WorkerHost) -> worker_pb2.WorkerStatus:
    return worker_status(host, "w")


@pytest.mark.parametrize("block_size_tokens", [1, 4])
async def test_a_question_is_in_no_account(block_size_tokens: int) -> None:
    engine = HangingEngine(replace(CONFIG, block_size_tokens=block_size_tokens))
    async with host_of(engine, PATIENT) as host:
        before = gauges(host)
        engine.may_go_on.clear()
        asking = asyncio.create_task(host.watch.ask())
        await eventually(lambda: engine.asked)
        assert gauges(host) == before
        async with asyncio.timeout(5):
            await host.wait_idle()
        assert not host.watch.is_healthy
        engine.may_go_on.set()
        await asking
        assert host.watch.is_healthy
        await eventually(lambda: not host.watch._open)
        assert gauges(host) == before
        assert not list(host.store.hashes)


async def test_an_idle_engine_is_asked_again_and_again() -> None:
    engine = HangingEngine(CONFIG)
    async with host_of(engine, PATIENT) as host:
        await eventually(lambda: len(engine.asked) >= 3)
        assert host.watch.is_healthy
        assert not host.jobs.total()
        assert len({request.request_id for request in engine.asked}) == len(engine.asked)


@pytest.mark.parametrize("num_requests", [1, 0])
async def test_an_engine_that_hangs_ends_its_host(num_requests: int) -> None:
    engine = HangingEngine(CONFIG)
    hosts: list[WorkerHost] = []

    async def hang() -> None:
        async with asyncio.timeout(20), host_of(engine, QUICK) as host:
            hosts.append(host)
            await (await submit(host)).ended.wait()
            assert host.watch.is_healthy
            engine.may_go_on.clear()
            for _ in range(num_requests):
                await submit(host)
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        await hang()
    assert isinstance(first_leaf(caught.value), EngineStuckError)
    assert not hosts[0].watch.is_healthy
    assert hosts[0].counters["requests"] == 1 + num_requests


async def test_an_engine_that_hangs_for_less_than_its_time_goes_on() -> None:
    engine = HangingEngine(CONFIG)
    async with host_of(engine, WatchConfig(stuck_s=600.0, health_interval_s=0.04, probe_timeout_s=0.05)) as host:
        await eventually(lambda: host.watch.is_healthy)
        engine.may_go_on.clear()
        await eventually(lambda: not host.watch.is_healthy)
        engine.may_go_on.set()
        await eventually(lambda: host.watch.is_healthy)


async def test_an_engine_that_refuses_the_question_is_not_healthy_until_it_gives_a_token() -> None:
    engine = HangingEngine(CONFIG)
    async with host_of(engine, PATIENT) as host:
        await eventually(lambda: host.watch.is_healthy)
        engine.error = ValueError("no")
        await eventually(lambda: not host.watch.is_healthy)
        engine.error = None
        await (await submit(host)).ended.wait()
        assert host.watch.is_healthy


async def test_a_worker_that_leaves_asks_nothing_more_and_ends_its_question() -> None:
    engine = HangingEngine(CONFIG)
    async with host_of(engine, PATIENT) as host:
        engine.may_go_on.clear()
        await eventually(lambda: engine.asked)
        host.watch.stop_asking()
        await eventually(lambda: engine.aborted == [engine.asked[0].request_id])
        engine.may_go_on.set()
        await eventually(lambda: not host.watch._open)
        num_asked, looked = len(engine.asked), asyncio.get_running_loop().time()
        await eventually(lambda: asyncio.get_running_loop().time() > looked + 3 * PATIENT.health_interval_s)
        assert len(engine.asked) == num_asked
