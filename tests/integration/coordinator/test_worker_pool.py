"""Does the pool follow the workers, keep count of their load, and tell what it loses?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from kvrelay.coordinator.breaker import BreakerConfig
from kvrelay.coordinator.worker_link import WorkerLink
from kvrelay.coordinator.worker_pool import WorkerPool
from kvrelay.errors import OverloadedError, WorkerLostError
from kvrelay.heartbeat import HeartbeatConfig, Silence
from kvrelay.v1 import cluster_pb2, common_pb2, worker_pb2
from tests.support.fake_cluster import until
from tests.support.fake_worker import FakeWorker, delta

PREFILL, DECODE = cluster_pb2.ROLE_PREFILL, cluster_pb2.ROLE_DECODE


StartWorker = Callable[..., Awaitable[FakeWorker]]


class Listener:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, list[str]]] = []
        self.failed: list[tuple[str, str]] = []
        self.lost: list[str] = []
        self.leaving: list[str] = []
        self.reasons: list[str] = []
        self.changes = 0

    def on_step(self, worker_id: str, step: worker_pb2.StepOutputs) -> None:
        self.steps.append((worker_id, [delta.request_id for delta in step.deltas]))

    def on_request_failed(self, worker_id: str, failed: worker_pb2.RequestFailed) -> None:
        self.failed.append((worker_id, failed.request_id))

    def on_worker_lost(self, worker_id: str, reason: str) -> None:
        self.lost.append(worker_id)
        self.reasons.append(reason)

    def on_worker_leaving(self, worker_id: str) -> None:
        self.leaving.append(worker_id)

    def on_workers_changed(self) -> None:
        self.changes += 1

    def on_closed(self) -> None:
        self.changes += 1


@pytest.fixture
async def start_worker() -> AsyncIterator[StartWorker]:
    """Starts fake workers and stops them at the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(worker_id: str, role: cluster_pb2.Role.ValueType = DECODE, heartbeat_ms: int = 0) -> FakeWorker:
            worker = FakeWorker(worker_id, role, heartbeat_ms=heartbeat_ms)
            await worker.start()
            stack.push_async_callback(worker.stop)
            return worker

        yield start


def decode(request_id: str) -> worker_pb2.Decode:
    return worker_pb2.Decode(request_id=request_id, prompt_token_ids=[1, 2, 3])


async def connected(pool: WorkerPool, *worker_ids: str) -> None:
    await until(lambda: {worker.worker_id for worker in pool.workers()} == set(worker_ids))


async def test_messages_of_several_workers_are_told_apart(start_worker: StartWorker) -> None:
    first, second = await start_worker("d1"), await start_worker("d2")
    pool, listener = WorkerPool("c"), Listener()
    async with pool.running(listener):
        pool.join(first.info)
        pool.join(second.info)
        await connected(pool, "d1", "d2")
        pool.send_decodes("d2", "r", [decode("r")])
        assert (await second.wait_for("decode"))[0].request_id == "r"
        assert not first.received
        second.send(delta("r", [1]), delta("s", [2]))
        first.send_failed("t", worker_pb2.RequestFailed.REASON_INTERNAL, "why")
        await until(lambda: listener.steps and listener.failed)
        assert listener.steps == [("d2", ["r", "s"])]
        assert listener.failed == [("d1", "t")]


async def test_load_counts_what_was_given_and_not_yet_done(start_worker: StartWorker) -> None:
    prefill, decoder = await start_worker("p1", PREFILL), await start_worker("d1")
    pool = WorkerPool("c")
    async with pool.running(Listener()):
        pool.join(prefill.info)
        pool.join(decoder.info)
        await connected(pool, "p1", "d1")
        views = {view.worker_id: view for view in pool.views()}
        pool.assign_prefill("p1", worker_pb2.Prefill(request_id="r", prompt_token_ids=[1] * 30), 30)
        pool.reserve_sequences("d1", "r", 4)
        assert views["p1"].num_queued_prompt_tokens == 30
        assert views["d1"].num_running_requests == 4
        assert (views["p1"].num_assigned, views["d1"].num_assigned) == (1, 1)
        pool.end_prefill("p1", "r")
        pool.end_prefill("p1", "r")
        pool.release_sequences("d1", "r")
        assert views["p1"].num_queued_prompt_tokens == 0
        assert views["d1"].num_running_requests == 0


async def test_a_prompt_that_a_decode_worker_computes_counts_there_until_its_first_token_or_its_end(
    start_worker: StartWorker,
) -> None:
    worker = await start_worker("d1")
    pool = WorkerPool("c")
    async with pool.running(Listener()):
        pool.join(worker.info)
        await connected(pool, "d1")
        (view,) = pool.views()
        for request_id in ("r", "s"):
            pool.reserve_sequences("d1", request_id, 1)
            pool.queue_prompt("d1", request_id, 30)
        assert (view.num_queued_prompt_tokens, view.num_queued_prompts) == (60, 2)
        pool.end_prefill("d1", "r")
        assert (view.num_queued_prompt_tokens, view.num_queued_prompts) == (30, 1)
        pool.release_sequences("d1", "s")
        assert (view.num_queued_prompt_tokens, view.num_queued_prompts, view.num_running_requests) == (0, 0, 1)


async def test_load_that_others_gave_counts_as_the_worker_reports_it(start_worker: StartWorker) -> None:
    worker = await start_worker("d1")
    pool = WorkerPool("c")
    async with pool.running(Listener()):
        pool.join(worker.info)
        await connected(pool, "d1")
        (view,) = pool.views()
        worker.send_status(num_running_requests=5, num_waiting_requests=2, num_queued_prompt_tokens=900)
        await until(lambda: view.num_running_requests == 7)
        assert view.num_queued_prompt_tokens == 900
        worker.send_status()
        await until(lambda: view.num_running_requests == 0)


async def test_draining_worker_keeps_its_stream_until_it_has_finished_what_it_has(start_worker: StartWorker) -> None:
    worker = await start_worker("d1")
    pool, listener = WorkerPool("c"), Listener()
    async with pool.running(listener):
        pool.join(worker.info)
        await connected(pool, "d1")
        pool.reserve_sequences("d1", "r", 1)
        worker.info.state = cluster_pb2.WORKER_STATE_DRAINING
        pool.update(worker.info)
        assert [view.draining for view in pool.views()] == [True]
        pool.send_decodes("d1", "r", [decode("r")])
        await worker.wait_for("decode")
        assert not worker.num_ended
        pool.release_sequences("d1", "r")
        await until(lambda: worker.num_ended)
        assert not listener.lost


async def test_draining_worker_that_has_nothing_is_disconnected_and_not_connected_again(
    start_worker: StartWorker,
) -> None:
    worker = await start_worker("d1")
    pool, listener = WorkerPool("c"), Listener()
    async with pool.running(listener):
        pool.join(worker.info)
        await connected(pool, "d1")
        worker.info.state = cluster_pb2.WORKER_STATE_DRAINING
        pool.update(worker.info)
        await until(lambda: worker.num_ended)
        pool.update(worker.info)
        assert not pool.views()
        worker.info.state = cluster_pb2.WORKER_STATE_READY
        pool.update(worker.info)
        await connected(pool, "d1")
        assert worker.num_sessions == 2


async def test_restarted_worker_takes_its_predecessors_place(start_worker: StartWorker) -> None:
    old, new = await start_worker("d1"), await start_worker("d1")
    new.info.incarnation = "2"
    pool, listener = WorkerPool("c"), Listener()
    async with pool.running(listener):
        pool.join(old.info)
        await connected(pool, "d1")
        pool.update(new.info)
        assert listener.lost == ["d1"]
        await connected(pool, "d1")
        pool.send_decodes("d1", "r", [decode("r")])
        await new.wait_for("decode")
        assert not old.received


async def test_worker_that_leaves_finishes_what_it_has(start_worker: StartWorker) -> None:
    worker = await start_worker("d1")
    pool, listener = WorkerPool("c"), Listener()
    async with pool.running(listener):
        pool.join(worker.info)
        await connected(pool, "d1")
        pool.reserve_sequences("d1", "r", 1)
        pool.assign_prefill("d1", worker_pb2.Prefill(request_id="r", prompt_token_ids=[1]), 1)
        pool.leave("d1")
        assert not pool.views()
        pool.send_decodes("d1", "r", [decode("r")])
        await worker.wait_for("decode")
        worker.send(delta("r", [5]))
        await until(lambda: listener.steps)
        pool.release_sequences("d1", "r")
        assert not worker.num_ended
        pool.release_prefill("d1", "r")
        await until(lambda: worker.num_ended)
        assert not listener.lost


async def test_worker_that_comes_back_keeps_its_stream(start_worker: StartWorker) -> None:
    worker = await start_worker("d1")
    pool, listener = WorkerPool("c"), Listener()
    async with pool.running(listener):
        pool.join(worker.info)
        await connected(pool, "d1")
        pool.reserve_sequences("d1", "r", 1)
        pool.leave("d1")
        pool.join(worker.info)
        assert [view.num_running_requests for view in pool.views()] == [1]
        pool.release_sequences("d1", "r")
        assert pool.views()
        assert worker.num_sessions == 1


async def test_worker_that_leaves_idle_is_disconnected_at_once(start_worker: StartWorker) -> None:
    worker = await start_worker("d1")
    pool, listener = WorkerPool("c"), Listener()
    async with pool.running(listener):
        pool.join(worker.info)
        await connected(pool, "d1")
        pool.leave("d1")
        assert not pool.views()
        await until(lambda: worker.num_ended)
        pool.send_cancel("d1", "r")
        with pytest.raises(WorkerLostError):
            pool.send_decodes("d1", "r", [decode("r")])


async def test_another_worker_at_the_address_is_not_taken_for_ours(start_worker: StartWorker) -> None:
    worker = await start_worker("d2")
    pool = WorkerPool("c")
    ours = cluster_pb2.WorkerInfo(worker_id="d1", role=DECODE, address=worker.info.address)
    async with pool.running(Listener()):
        pool.join(ours)
        await until(lambda: worker.num_sessions > 1)
        assert not pool.views()


async def test_connects_as_soon_as_the_worker_listens(start_worker: StartWorker) -> None:
    worker = await start_worker("d1")
    await worker.stop()
    pool = WorkerPool("c")
    async with pool.running(Listener()):
        pool.join(worker.info)
        await asyncio.sleep(0)
        assert not pool.views()
        await worker.start(worker.info.address)
        await connected(pool, "d1")


async def test_full_queue_refuses_requests_and_takes_cancels(start_worker: StartWorker) -> None:
    worker = await start_worker("d1")
    pool = WorkerPool("c", max_queued_messages=2)
    async with pool.running(Listener()):
        pool.join(worker.info)
        await connected(pool, "d1")
        pool.send_decodes("d1", "r1", [decode("r1")])
        pool.send_decodes("d1", "r2", [decode("r2")])
        with pytest.raises(OverloadedError, match="2 messages"):
            pool.send_decodes("d1", "r3", [decode("r3")])
        pool.send_cancel("d1", "r1")
        await worker.wait_for("cancel")
        assert worker.kinds() == ["decode", "decode", "cancel"]


async def test_leaving_the_context_ends_every_link(start_worker: StartWorker) -> None:
    worker = await start_worker("d1")
    pool = WorkerPool("c")
    async with pool.running(Listener()):
        pool.join(worker.info)
        await connected(pool, "d1")
    assert not pool.views()
    assert not [
        task
        for task in asyncio.all_tasks()
        if task.get_name().startswith(("link", "write to", "heartbeats", "silence"))
    ]
    with pytest.raises(RuntimeError, match="not running"):
        pool.join(worker.info)


async def test_a_worker_that_says_nothing_is_lost_and_connected_again(start_worker: StartWorker) -> None:
    worker = await start_worker("d1", heartbeat_ms=10)
    pool, listener = WorkerPool("c", heartbeat=HeartbeatConfig(interval_s=0.02, timeout_s=0.2)), Listener()
    async with pool.running(listener):
        pool.join(worker.info)
        await until(lambda: listener.lost)
        assert listener.lost == ["d1"]
        assert listener.reasons == ["worker d1 said nothing for 0.2 s"]
        await until(lambda: worker.num_ended)
        await until(lambda: worker.num_sessions > 1)


async def test_a_worker_that_promises_no_heartbeats_may_say_nothing(start_worker: StartWorker) -> None:
    silent, other = await start_worker("d1"), await start_worker("d2", heartbeat_ms=10)
    pool, listener = WorkerPool("c", heartbeat=HeartbeatConfig(interval_s=0.02, timeout_s=0.1)), Listener()
    async with pool.running(listener):
        for worker in (silent, other):
            pool.join(worker.info)
        await until(lambda: len(listener.lost) > 2)
        assert set(listener.lost) == {"d2"}


async def test_a_coordinator_says_something_all_the_time(start_worker: StartWorker) -> None:
    worker = await start_worker("d1")
    pool = WorkerPool("c", heartbeat=HeartbeatConfig(interval_s=0.01))
    async with pool.running(Listener()):
        pool.join(worker.info)
        await until(lambda: worker.num_heartbeats > 5)


async def test_all_workers_are_told_of_a_large_message_that_will_keep_the_coordinator_busy(
    start_worker: StartWorker,
) -> None:
    first, second = await start_worker("d1"), await start_worker("d2")
    pool = WorkerPool("c", heartbeat=HeartbeatConfig(interval_s=60.0))
    async with pool.running(Listener()):
        pool.join(first.info)
        pool.join(second.info)
        await connected(pool, "d1", "d2")
        first.send_heartbeat(64 << 20)
        await until(lambda: first.busy_ms and second.busy_ms)
        assert first.busy_ms == second.busy_ms == [64_000]


async def test_any_message_of_a_worker_is_heard(start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    monkeypatch.setattr(Silence, "heard", lambda _, num_bytes=0, _busy_ms=0: heard.append(num_bytes))
    worker = await start_worker("d1", heartbeat_ms=500)
    pool = WorkerPool("c")
    async with pool.running(Listener()):
        pool.join(worker.info)
        await connected(pool, "d1")
        worker.send_heartbeat(64 << 20)
        worker.send(delta("r", [1]))
        worker.send_status()
        worker.send_failed("r", worker_pb2.RequestFailed.REASON_INTERNAL, "why")
        await until(lambda: heard == [64 << 20, 0, 0, 0])


def test_link_without_a_stream_drops_cancels_and_refuses_the_rest() -> None:
    link = WorkerLink(cluster_pb2.WorkerInfo(worker_id="d1"), "c", WorkerPool("c"), 4)
    link.send(worker_pb2.CoordinatorMessage(cancel=worker_pb2.Cancel(request_id="r")))
    with pytest.raises(WorkerLostError, match="d1"):
        link.send(worker_pb2.CoordinatorMessage(decode=decode("r")))


QUICK = BreakerConfig(slow_window_s=0.05, max_slow_windows=2, pause_s=0.1)


async def test_worker_that_fails_requests_is_avoided_and_then_probed(start_worker: StartWorker) -> None:
    worker = await start_worker("d1")
    pool, listener = WorkerPool("c", breaker=QUICK), Listener()
    async with pool.running(listener):
        pool.join(worker.info)
        await connected(pool, "d1")
        reasons = worker_pb2.RequestFailed
        for _ in range(9):
            worker.send_failed("bad", reasons.REASON_INVALID, "4xx")
        await until(lambda: len(listener.failed) == 9)
        assert not is_avoided(pool)
        for _ in range(3):
            worker.send_failed("r", reasons.REASON_INTERNAL, "5xx")
        await until(lambda: is_avoided(pool))
        await until(lambda: not is_avoided(pool))
        pool.reserve_sequences("d1", "probe", 1)
        assert is_avoided(pool)
        worker.send(delta("probe", [1], common_pb2.FINISH_REASON_LENGTH))
        await until(lambda: not is_avoided(pool))
        pool.release_sequences("d1", "probe")


async def test_worker_far_slower_than_its_fit_is_avoided(start_worker: StartWorker) -> None:
    worker = await start_worker("d1")
    pool, listener = WorkerPool("c", breaker=QUICK), Listener()
    async with pool.running(listener):
        pool.join(worker.info)
        await connected(pool, "d1")
        times = cluster_pb2.StepTimes(step_fixed_s=0.001, num_steps=100, num_prefills=100)
        worker.send_status(step_times=times)
        await until(lambda: pool.views()[0].times.num_steps)
        pool.reserve_sequences("d1", "r", 1)
        for count in range(1, 5):
            worker.send(delta("r", [1]))
            await until(lambda count=count: len(listener.steps) == count)
            await asyncio.sleep(0.06)
        assert is_avoided(pool)
        pool.release_sequences("d1", "r")


async def test_worker_that_is_lost_with_requests_again_and_again_is_avoided(start_worker: StartWorker) -> None:
    worker = await start_worker("d1")
    pool, listener = WorkerPool("c"), Listener()
    async with pool.running(listener):
        pool.join(worker.info)
        for count in range(1, 4):
            await connected(pool, "d1")
            assert not is_avoided(pool)
            pool.reserve_sequences("d1", "r", 1)
            worker.hang_up()
            await until(lambda count=count: len(listener.lost) == count)
            pool.release_sequences("d1", "r")
        await connected(pool, "d1")
        assert is_avoided(pool)


def is_avoided(pool: WorkerPool) -> bool:
    (view,) = pool.views()
    return view.avoided
