"""What becomes of a request whose decode worker is lost, comes back, refuses it, or has no room?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import pytest
from vllm.exceptions import VLLMValidationError

from kvrelay.coordinator.breaker import BreakerConfig
from kvrelay.coordinator.cluster_engine import ClusterEngineConfig
from kvrelay.coordinator.dispatcher import MAX_FAILED_PLANS
from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.vllm_errors import ClusterRequestError
from kvrelay.errors import OverloadedError, WorkerLostError
from kvrelay.v1 import common_pb2, worker_pb2
from tests.support.fake_cluster import FakeCluster, fake_cluster, until
from tests.support.fake_worker import delta

_LENGTH = common_pb2.FINISH_REASON_LENGTH
_PATIENT = BreakerConfig(max_failures=100)


async def test_request_goes_on_when_its_decode_worker_comes_back(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(cluster.generate([1], temperature=0.0, max_tokens=3))
        (lost,) = await cluster.decode.wait_for("decode")
        cluster.decode.send(delta(lost.request_id, [40]))
        await until(lambda: cluster.engine.metrics.num_generated_tokens)
        cluster.decode.hang_up()
        _, decode = await cluster.decode.wait_for("decode", 2)
        assert decode.request_id != lost.request_id
        assert list(decode.prompt_token_ids) == [1, 40]
        assert decode.sampling.max_tokens == 2
        cluster.decode.send(delta(lost.request_id, [66], common_pb2.FINISH_REASON_LENGTH))
        cluster.decode.send_failed(lost.request_id, worker_pb2.RequestFailed.REASON_INTERNAL, "late")
        cluster.decode.send(delta(decode.request_id, [41]), delta(decode.request_id, [42], _LENGTH))
        assert (await generating).token_ids[0] == [40, 41, 42]
        assert cluster.engine.metrics.num_replanned == 1
        cluster.assert_idle()


async def test_request_fails_when_too_many_workers_are_lost_to_it(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(cluster.generate([1], temperature=0.0))
        for count in range(1, 4):
            await cluster.decode.wait_for("decode", count)
            cluster.decode.hang_up()
        with pytest.raises(ClusterRequestError, match="d1 was lost") as raised:
            await generating
        assert isinstance(raised.value.error, WorkerLostError)
        assert raised.value.http_status == 503
        cluster.assert_idle()
        await until(lambda: cluster.engine.is_ready)


async def test_request_fails_when_no_worker_comes_for_it(front_end: FrontEnd) -> None:
    config = ClusterEngineConfig(wait_for_workers_s=0.05)
    async with fake_cluster(front_end, config=config) as cluster:
        generating = asyncio.create_task(cluster.generate([1], temperature=0.0))
        await cluster.decode.wait_for("decode")
        await cluster.decode.stop()
        with pytest.raises(ClusterRequestError, match="d1 was lost"):
            await generating
        cluster.assert_idle()


async def test_request_that_waits_for_workers_can_be_cancelled(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(cluster.generate([1], temperature=0.0))
        await cluster.decode.wait_for("decode")
        await cluster.decode.stop()
        await until(lambda: not cluster.engine.is_ready)
        generating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await generating
        cluster.assert_idle()


async def test_request_that_waits_for_workers_ends_with_the_pool(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(cluster.generate([1], temperature=0.0))
        await cluster.decode.wait_for("decode")
    with pytest.raises(ClusterRequestError, match="d1 was lost"):
        await generating


async def test_decode_worker_that_cannot_serve_a_request_does_not_get_it_again(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(cluster.generate([1], temperature=0.0))
        (decode,) = await cluster.decode.wait_for("decode")
        cluster.decode.send_failed(decode.request_id, worker_pb2.RequestFailed.REASON_INTERNAL, "no way")
        with pytest.raises(ClusterRequestError, match="no way") as raised:
            await generating
        assert raised.value.http_status == 500
        assert len(cluster.decode.messages("decode")) == 1
        cluster.assert_idle()


async def test_worker_that_refuses_a_request_makes_it_a_bad_one(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(cluster.generate([1], temperature=0.0))
        (decode,) = await cluster.decode.wait_for("decode")
        cluster.decode.send_failed(decode.request_id, worker_pb2.RequestFailed.REASON_INVALID, "top_k is odd")
        with pytest.raises(VLLMValidationError, match="top_k is odd"):
            await generating
        cluster.assert_idle()


async def test_request_goes_on_when_the_engine_under_it_is_told_to_stop(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(cluster.generate([1], temperature=0.0, max_tokens=3))
        (ended,) = await cluster.decode.wait_for("decode")
        cluster.decode.send(delta(ended.request_id, [40], common_pb2.FINISH_REASON_ABORT))
        await until(lambda: cluster.engine.metrics.num_generated_tokens)
        cluster.decode.hang_up()
        _, decode = await cluster.decode.wait_for("decode", 2)
        assert list(decode.prompt_token_ids) == [1, 40]
        cluster.decode.send(delta(decode.request_id, [41, 42], _LENGTH))
        generated = await generating
        assert generated.token_ids[0] == [40, 41, 42]
        assert generated.finish_reason[0] == "length"
        cluster.assert_idle()


async def test_worker_without_room_for_a_lost_request_gets_it_later(
    front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it has none: that is no failure of the request."""
    monkeypatch.setattr("kvrelay.coordinator.waiting_flows.RETRY_INTERVAL_S", 0.01)
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(cluster.generate([1], temperature=0.0, max_tokens=2))
        (lost,) = await cluster.decode.wait_for("decode")
        cluster.decode.send(delta(lost.request_id, [40]))
        await until(lambda: cluster.engine.metrics.num_generated_tokens)
        refusals = _fill_outbox(cluster, monkeypatch)
        cluster.decode.hang_up()
        await until(lambda: len(refusals) > 5)
        assert not generating.done()
        monkeypatch.undo()
        _, decode = await cluster.decode.wait_for("decode", 2)
        cluster.decode.send(delta(decode.request_id, [41], _LENGTH))
        assert (await generating).token_ids[0] == [40, 41]
        assert cluster.engine.metrics.num_replanned == 1
        cluster.assert_idle()


def _fill_outbox(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns where the names of refused requests appear."""
    refusals: list[str] = []

    def refuse(worker_id: str, request_id: str, messages: object) -> None:
        refusals.append(request_id)
        raise OverloadedError(f"4096 messages wait to be sent to worker {worker_id}; try again later")

    monkeypatch.setattr(cluster.pool, "send_decodes", refuse)
    return refusals


async def _lose_workers(cluster: FakeCluster, tokens: Sequence[int | None]) -> None:
    """One after the other; each has generated the token before, or none."""
    for number, token in enumerate(tokens, 1):
        *_, decode = await cluster.decode.wait_for("decode", number)
        if token is not None:
            num_generated = cluster.engine.metrics.num_generated_tokens
            cluster.decode.send(delta(decode.request_id, [token]))
            await until(lambda before=num_generated: cluster.engine.metrics.num_generated_tokens > before)
        cluster.decode.hang_up()


async def test_a_request_that_gets_on_may_lose_many_workers(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end, with_prefill=False, breaker=_PATIENT) as cluster:
        generating = asyncio.create_task(cluster.generate([1], temperature=0.0, max_tokens=9))
        tokens = [40, None, 41, None, 42, None]
        await _lose_workers(cluster, tokens)
        *_, decode = await cluster.decode.wait_for("decode", len(tokens) + 1)
        assert list(decode.prompt_token_ids) == [1, 40, 41, 42]
        cluster.decode.send(delta(decode.request_id, [43], _LENGTH))
        assert (await generating).token_ids[0] == [40, 41, 42, 43]
        cluster.assert_idle()


@pytest.mark.parametrize(
    "tokens", [[40, 41, None, None], list(range(40, 40 + MAX_FAILED_PLANS))], ids=["at one token", "at many tokens"]
)
async def test_a_request_that_kills_workers_ends_with_what_it_has(
    front_end: FrontEnd, tokens: list[int | None]
) -> None:
    async with fake_cluster(front_end, with_prefill=False, breaker=_PATIENT) as cluster:
        generating = asyncio.create_task(cluster.generate([1], temperature=0.0, max_tokens=99))
        await _lose_workers(cluster, tokens)
        with pytest.raises(ClusterRequestError, match="d1 was lost") as raised:
            await generating
        assert raised.value.error.generated == {0: [token for token in tokens if token is not None]}
        cluster.assert_idle()


async def test_what_was_generated_comes_before_the_failure_and_is_told_with_it(front_end: FrontEnd) -> None:
    config = ClusterEngineConfig(max_plans=1)
    async with fake_cluster(front_end, config=config) as cluster:
        stream = cluster.stream([1], temperature=0.0, max_tokens=5)
        first = asyncio.create_task(anext(stream))
        (decode,) = await cluster.decode.wait_for("decode")
        cluster.decode.send(delta(decode.request_id, [40]))
        assert (await first).outputs[0].token_ids == [40]
        cluster.decode.send(delta(decode.request_id, [41, 42]))
        await until(lambda: cluster.engine.metrics.num_generated_tokens == 3)
        cluster.decode.hang_up()
        await until(lambda: cluster.engine.num_requests == 0)
        assert (await anext(stream)).outputs[0].token_ids == [41, 42]
        with pytest.raises(ClusterRequestError, match="d1 was lost") as raised:
            await anext(stream)
        assert raised.value.error.generated == {0: [40, 41, 42]}
        cluster.assert_idle()
