"""A load against a server that does what servers do under load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvrelay.client.http_pool import HttpPool, Origin
from kvrelay.client.replay.details import details_of, notes
from kvrelay.client.replay.endpoint import Endpoint
from kvrelay.client.replay.open_loop import OpenLoop, PlannedRequest, Replayed
from kvrelay.client.replay.planning import Plan
from kvrelay.workload.outcome import Outcome, Status
from tests.support.eventually import eventually
from tests.support.scripted_http import Exchange, Handler, ScriptedHttp, scripted_http


def planned(*due_s: float) -> list[PlannedRequest]:
    return [
        PlannedRequest(
            index=index, due_s=at_s, num_prompt_tokens=3, max_tokens=2, token_ids=lambda index=index: [1, 2, index]
        )
        for index, at_s in enumerate(due_s)
    ]


@asynccontextmanager
async def loop_on(
    handler: Handler, *, max_connections: int = 10, timeout_s: float | None = None
) -> AsyncIterator[tuple[OpenLoop, ScriptedHttp]]:
    """Checks at the end that no connection is left."""
    async with scripted_http(handler) as server:
        async with HttpPool(Origin.parse(server.url)) as pool:
            endpoint = Endpoint(origin=pool.origin, model="m")
            yield OpenLoop(endpoint, pool, max_connections=max_connections, timeout_s=timeout_s), server
        await eventually(lambda: server.num_open == 0)


async def outcome_of(handler: Handler, timeout_s: float | None = None) -> tuple[Outcome, Replayed]:
    async with loop_on(handler, timeout_s=timeout_s) as (loop, _):
        replayed = await loop.run(planned(0.0), asyncio.Event())
        (outcome,) = replayed.outcomes
        return outcome, replayed


def number_of(exchange: Exchange) -> int:
    return int(exchange.body.decode().partition('"prompt":[1,2,')[2].partition("]")[0])


async def two_tokens(exchange: Exchange) -> None:
    await exchange.begin_stream()
    await exchange.tokens("a", "b")
    await exchange.event(
        b'{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2,'
        b' "prompt_tokens_details": {"cached_tokens": 4}}}'
    )
    await exchange.end_stream()


async def test_a_completed_request_has_the_servers_counts_and_times_since_the_load_began() -> None:
    outcome, replayed = await outcome_of(two_tokens)
    assert (outcome.status, outcome.num_prompt_tokens, outcome.num_cached_tokens) == (Status.COMPLETED, 5, 4)
    assert outcome.num_output_tokens == len(outcome.token_times_s) == 2
    assert 0 < outcome.token_times_s[0] <= outcome.token_times_s[1] < 10
    assert replayed.tells_caching
    assert not replayed.interrupted


async def test_requests_go_out_when_they_are_due_whatever_became_of_those_before() -> None:
    """The first one is answered only when the last one has come."""
    all_came = asyncio.Event()

    async def answer_together(exchange: Exchange) -> None:
        if number_of(exchange) == 2:
            all_came.set()
        await all_came.wait()
        await two_tokens(exchange)

    async with loop_on(answer_together) as (loop, _):
        replayed = await loop.run(planned(0.0, 0.02, 0.04), asyncio.Event())
    assert {outcome.status for outcome in replayed.outcomes} == {Status.COMPLETED}
    first = min(replayed.outcomes, key=lambda outcome: outcome.index)
    assert first.token_times_s[0] >= 0.04
    assert min(replayed.send_delays_s) >= 0


async def test_a_wait_for_a_connection_counts_in_the_latency_and_is_told() -> None:
    came: list[int] = []

    async def one_after_another(exchange: Exchange) -> None:
        came.append(number_of(exchange))
        await two_tokens(exchange)

    async with loop_on(one_after_another, max_connections=1) as (loop, server):
        replayed = await loop.run(planned(0.0, 0.0, 0.0), asyncio.Event())
    assert came == [0, 1, 2]
    assert server.num_connections == 1
    assert replayed.num_waited == 2
    assert [outcome.arrived_s for outcome in replayed.outcomes] == [0.0, 0.0, 0.0]
    details = details_of(replayed, Plan(requests=[], num_clipped=0, num_skipped=0))
    assert details["num_waited_for_connection"] == 2
    assert any("Not an open loop: 2 requests waited" in note for note in notes(details, 1))


@pytest.mark.parametrize("status", [429, 503])
async def test_a_refused_request_is_rejected_and_its_retry_after_noted(status: int) -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.answer(status, b'{"error": {"message": "full"}}', Retry_After="3")

    outcome, replayed = await outcome_of(refuse)
    assert (outcome.status, outcome.num_prompt_tokens) == (Status.REJECTED, 3)
    details = details_of(replayed, Plan(requests=[], num_clipped=0, num_skipped=0))
    assert details["rejections_by_status"] == {str(status): 1}
    assert details["retry_after_s"] == {"p50": 3.0, "max": 3.0}
    assert any("Retry-After p50 3 s" in note for note in notes(details, 10))


async def test_an_overload_told_in_the_stream_is_a_rejection_before_the_first_token_and_a_failure_after_it() -> None:
    def refuse_after(*texts: str) -> Handler:
        async def handler(exchange: Exchange) -> None:
            await exchange.begin_stream()
            await exchange.tokens(*texts)
            await exchange.event(b'{"error": {"message": "no worker", "code": 503}}')
            await exchange.end_stream()

        return handler

    assert (await outcome_of(refuse_after()))[0].status is Status.REJECTED
    failed = (await outcome_of(refuse_after("a")))[0]
    assert (failed.status, failed.error) == (Status.FAILED, "the stream told an error: no worker")
    assert failed.num_output_tokens == 1


async def test_a_stream_that_ends_early_has_failed() -> None:
    async def end_early(exchange: Exchange) -> None:
        await exchange.begin_stream()
        await exchange.tokens("a")
        await exchange.send(b"0\r\n\r\n")

    async def break_off(exchange: Exchange) -> None:
        await exchange.begin_stream()
        await exchange.tokens("a")
        exchange.writer.close()

    ended, broken = (await outcome_of(end_early))[0], (await outcome_of(break_off))[0]
    assert (ended.status, ended.error) == (Status.FAILED, "the stream ended early")
    assert (broken.status, broken.error) == (Status.FAILED, "the connection ended in the middle of the answer")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b'HTTP/1.1 400 x\r\nContent-Length: 33\r\n\r\n{"error": {"message": "too big"}}', "HTTP 400: too big"),
        (b"HTTP/1.1 500 x\r\nContent-Length: 4\r\n\r\noops", "HTTP 500: oops"),
        (b"HTTP/1.1 200 x\r\nContent-Length: 12\r\n\r\ndata: {oops\n", "the stream ended early"),
        (b"HTTP/1.1 200 x\r\nContent-Length: 13\r\n\r\ndata: {oops\n\n", "JSON is malformed"),
        (b"nonsense\r\n\r\n", "the answer is no HTTP"),
    ],
)
async def test_other_answers_are_failures_that_say_why(answer: bytes, error: str) -> None:
    outcome, _ = await outcome_of(lambda exchange: exchange.send(answer))
    assert outcome.status is Status.FAILED
    assert error in outcome.error


async def test_a_request_that_takes_too_long_has_failed_and_its_connection_is_closed() -> None:
    async def one_token_only(exchange: Exchange) -> None:
        await exchange.begin_stream()
        await exchange.tokens("a")
        await exchange.client_gone()
        exchange.writer.close()

    outcome, _ = await outcome_of(one_token_only, timeout_s=0.1)
    assert (outcome.status, outcome.error) == (Status.FAILED, "not finished within 0.1 s")


async def test_a_server_that_is_gone_is_a_failure_of_each_request() -> None:
    async with loop_on(two_tokens) as (loop, server):
        replayed_once = await loop.run(planned(0.0), asyncio.Event())
        assert replayed_once.statuses[Status.COMPLETED] == 1
        origin = Origin.parse(server.url)
    async with HttpPool(origin) as pool:
        loop = OpenLoop(Endpoint(origin=origin, model="m"), pool, max_connections=1, timeout_s=None)
        replayed = await loop.run(planned(0.0, 0.0), asyncio.Event())
    assert replayed.statuses == {Status.FAILED: 2}
    assert "nobody answers" in replayed.outcomes[0].error


async def test_a_load_that_is_stopped_keeps_what_was_done_and_drops_the_rest() -> None:
    came = asyncio.Event()
    stop = asyncio.Event()

    async def only_the_first(exchange: Exchange) -> None:
        if number_of(exchange) == 0:
            await two_tokens(exchange)
            return
        came.set()
        await exchange.client_gone()
        exchange.writer.close()

    async with loop_on(only_the_first) as (loop, server):
        running = asyncio.ensure_future(loop.run(planned(0.0, 0.05, 1000.0), stop))
        await came.wait()
        await eventually(lambda: loop.replayed.outcomes)
        stop.set()
        replayed = await running
        await eventually(lambda: server.num_open <= 1)
    assert [outcome.index for outcome in replayed.outcomes] == [0]
    assert replayed.interrupted
    assert (replayed.num_unfinished, replayed.num_in_flight) == (2, 0)
