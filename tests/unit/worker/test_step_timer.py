"""Samples of an engine's work: from the steps themselves, and from a host over a simulated engine."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

import pytest

from kvrelay.engine.base import EngineStep
from kvrelay.engine.simulated import SimulatedEngine
from kvrelay.engine.simulated_model import SimulatedConfig
from kvrelay.step_times.model import StepTimes
from kvrelay.tracing import Tracing
from kvrelay.v1 import common_pb2
from kvrelay.worker.host import WorkerHost
from kvrelay.worker.running_host import open_host
from kvrelay.worker.status import worker_status
from kvrelay.worker.step_timer import StepTimer
from kvrelay.worker.store_config import StoreConfig
from kvrelay.worker.submission import Handlers, Submission
from kvrelay.worker.work import Work

TRUE = StepTimes(prefill_fixed_s=0.01, prefill_token_s=1e-4, step_fixed_s=0.1, step_request_s=1e-3)


@dataclass
class Steps:
    """An engine's steps as a timer sees them, one after the other."""

    timer: StepTimer = field(default_factory=lambda: StepTimer(16))
    now_s: float = 100.0
    num_decoding: int = 0

    def decode(self) -> None:
        self.now_s += TRUE.step_s(self.num_decoding)
        self._end(self.num_decoding)

    def prefill(self, num_tokens: int, *, num_chunks: int = 1, submitted_s: float = 0.0) -> None:
        """In as many steps, beside what decodes."""
        for chunk in range(num_chunks):
            self.now_s += TRUE.prefill_s(num_tokens) / num_chunks
            self.now_s += TRUE.step_s(self.num_decoding) if self.num_decoding else 0.0
            if chunk == num_chunks - 1:
                self.timer.saw_first_token(num_tokens, 0, submitted_s)
                self.timer.saw_finish()
            self._end(self.num_decoding + (chunk < num_chunks - 1))

    def _end(self, num_running: int) -> None:
        for _ in range(self.num_decoding):
            self.timer.saw_token(100)
        self.timer.end_step(EngineStep(ended_s=self.now_s, has_load=True, num_running_requests=num_running))


def test_decode_steps_are_sampled() -> None:
    steps, rng = Steps(), random.Random(1)
    for _ in range(100):
        steps.num_decoding = rng.randint(1, 50)
        steps.decode()
    assert steps.timer.times.step_s(40, 4000) == pytest.approx(TRUE.step_s(40), rel=0.05)
    assert steps.timer.times.num_prefills == 0


def test_decode_steps_that_follow_closely_are_sampled_now_and_then() -> None:
    steps = Steps(num_decoding=1)
    for _ in range(101):
        steps.now_s += 0.001 - TRUE.step_s(1)
        steps.decode()
    assert 1 <= steps.timer.times.num_steps <= 3


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_prompts_one_after_the_other_are_sampled(num_chunks: int) -> None:
    steps, rng = Steps(), random.Random(2)
    for _ in range(100):
        steps.prefill(rng.randint(100, 4000), num_chunks=num_chunks, submitted_s=steps.now_s)
    assert steps.timer.times.num_prefills == 100
    assert steps.timer.times.prefill_s(2000) == pytest.approx(TRUE.prefill_s(2000), rel=0.05)


def test_the_time_before_a_prompt_came_is_not_the_engines() -> None:
    steps, rng = Steps(), random.Random(3)
    for _ in range(100):
        steps.now_s += 1000.0
        steps.prefill(rng.randint(100, 4000), submitted_s=steps.now_s)
    assert steps.timer.times.prefill_s(2000) == pytest.approx(TRUE.prefill_s(2000), rel=0.05)


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_decoding_beside_prompts_is_not_theirs(num_chunks: int) -> None:
    steps, rng = Steps(num_decoding=10), random.Random(4)
    for _ in range(200):
        steps.decode()
        steps.prefill(rng.randint(100, 4000), num_chunks=num_chunks)
    assert steps.timer.times.prefill_s(2000) == pytest.approx(TRUE.prefill_s(2000), rel=0.1)
    assert steps.timer.times.step_s(10, 1000) == pytest.approx(TRUE.step_s(10), rel=0.05)


def test_a_prompt_whose_kv_was_stored_teaches_nothing() -> None:
    timer = StepTimer(16)
    timer.saw_first_token(1000, 990, 0.0)
    timer.end_step(EngineStep(ended_s=1.0, has_load=True, num_running_requests=1))
    assert timer.times.num_prefills == 0


class VirtualTime:
    """Passes while an engine sleeps, and not otherwise."""

    def __init__(self) -> None:
        self.now_s = time.monotonic()

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        await asyncio.sleep(0)


async def submit(host: WorkerHost, name: str, prompt: list[int], max_tokens: int) -> Submission:
    work = Work(
        name="prefill",
        request_id=name,
        prompt_token_ids=prompt,
        sampling=common_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        cache_salt=name,
        priority=0,
        trace=common_pb2.TraceContext(),
    )
    hasher, stored = await host.look_up(name, prompt)
    return await host.submit(work, hasher, stored, save_partial=False, handlers=Handlers(sink=lambda _: None))


async def test_a_host_reports_what_its_engine_takes() -> None:
    config = SimulatedConfig(num_engine_blocks=4096)
    virtual, rng = VirtualTime(), random.Random(5)
    engine = SimulatedEngine(config, clock=virtual.clock, sleep=virtual.sleep)
    async with open_host(engine, StoreConfig(size_bytes=16 << 20), Tracing()) as host:
        for index in range(40):
            prompt = [rng.randrange(1000) for _ in range(rng.randint(100, 2000))]
            submission = await submit(host, f"p{index}", prompt, 1)
            await submission.closed.wait()
        together = [await submit(host, f"d{index}", list(range(20)), 20 * (index + 1)) for index in range(20)]
        assert worker_status(host, "w").num_context_tokens >= 20 * 20
        for submission in together:
            await submission.closed.wait()
        status = worker_status(host, "w")
    times = StepTimes.of(status.step_times)
    assert status.num_context_tokens == 0
    assert times.num_prefills >= 40
    assert times.prefill_s(1000) == pytest.approx(config.step_s(1000, 1, any_decode=False), rel=0.05)
    assert times.step_s(10, 1000) == pytest.approx(config.step_s(0, 10, any_decode=True), rel=0.1)
