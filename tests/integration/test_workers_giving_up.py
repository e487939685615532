"""Requests that are given up at any moment, by their clients or with their coordinators, leave nothing on a worker."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

import pytest

from kvrelay.engine.simulated_model import expected_tokens
from kvrelay.v1 import worker_pb2
from tests.support.eventually import eventually
from tests.support.worker_link import open_link, over
from tests.support.worker_pair import BLOCK, CONFIG, Pair, open_pair, sampling

PROMPT = list(range(10, 10 + 9 * BLOCK + 1))


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, CONFIG.vocab_size), k=num_tokens)


def expected(prompt: Sequence[int], num_tokens: int, seed: int | None = None) -> list[int]:
    return expected_tokens(prompt, num_tokens, CONFIG, seed)


async def cancelled_before_the_offer(pair: Pair) -> None:
    pair.d.kv.offers.shut()
    pair.prefill("r", PROMPT)
    await eventually(lambda: pair.d.kv.offers.num_arrived)


async def cancelled_at_once(pair: Pair) -> None:
    pair.prefill("r", PROMPT)


async def cancelled_during_prefill(pair: Pair) -> None:
    pair.p.steps.shut()
    pair.prefill("r", PROMPT)
    await pair.p.steps.let_pass(1)
    await eventually(lambda: pair.d.status().num_incoming_transfers)


async def cancelled_mid_transfer(pair: Pair) -> None:
    pair.d.kv.frames.shut()
    await over(pair.prefill("r", PROMPT))
    await eventually(lambda: pair.d.kv.frames.num_arrived)


async def cancelled_after_the_transfer(pair: Pair) -> None:
    await over(pair.prefill("r", PROMPT))
    await eventually(lambda: not pair.p.status().num_outgoing_transfers and pair.d.status().num_incoming_transfers)


async def cancelled_while_decode_waits_for_blocks(pair: Pair) -> None:
    await cancelled_mid_transfer(pair)
    pair.decode("r", PROMPT, 5)
    await eventually(lambda: "decode-r" in {task.get_name() for task in asyncio.all_tasks()})


async def cancelled_while_decode_waits_for_an_offer(pair: Pair) -> None:
    await cancelled_before_the_offer(pair)
    pair.decode("r", PROMPT, 5)
    await eventually(lambda: "decode-r" in {task.get_name() for task in asyncio.all_tasks()})


async def cancelled_in_the_decode_engine(pair: Pair) -> None:
    pair.d.steps.shut()
    first = await over(pair.prefill("r", PROMPT))
    pair.decode("r", [*PROMPT, *first.token_ids], 5)
    await eventually(lambda: pair.d.steps.num_arrived)


async def cancelled_mid_decode(pair: Pair) -> None:
    first = await over(pair.prefill("r", PROMPT))
    answer = pair.decode("r", [*PROMPT, *first.token_ids], 200)
    await eventually(lambda: answer.token_ids)


Stage = Callable[[Pair], Awaitable[None]]
STAGES: list[Stage] = [
    cancelled_at_once,
    cancelled_before_the_offer,
    cancelled_during_prefill,
    cancelled_mid_transfer,
    cancelled_after_the_transfer,
    cancelled_while_decode_waits_for_blocks,
    cancelled_while_decode_waits_for_an_offer,
    cancelled_in_the_decode_engine,
    cancelled_mid_decode,
]


def open_gates(pair: Pair) -> None:
    for node in (pair.p, pair.d):
        for gate in (node.kv.offers, node.kv.frames, node.steps):
            gate.open()


@pytest.mark.parametrize("stage", STAGES)
async def test_a_cancelled_request_leaves_nothing(stage: Stage) -> None:
    async with open_pair() as pair:
        await stage(pair)
        pair.cancel("r")
        # What was held back arrives only now, at workers that have forgotten the request.
        await eventually(lambda: not any(t.get_name() in ("prefill-r", "decode-r") for t in asyncio.all_tasks()))
        open_gates(pair)
        await pair.idle()
        tokens, _ = await pair.generate("next", PROMPT, 5)
        assert tokens == expected(PROMPT, 5)


@pytest.mark.parametrize("stage", STAGES)
async def test_a_coordinator_that_is_gone_leaves_nothing(stage: Stage) -> None:
    """Neither what only the decode worker holds, of a request that it was never told of."""
    async with open_pair() as pair:
        await stage(pair)
        pair.to_p.hang_up()
        pair.to_d.hang_up()
        await eventually(lambda: not any(t.get_name() in ("prefill-r", "decode-r") for t in asyncio.all_tasks()))
        open_gates(pair)
        await pair.idle()


async def test_other_sessions_go_on_when_one_is_gone() -> None:
    async with open_pair() as pair:
        async with open_link(pair.d.address) as other:
            lost = other.decode(worker_pb2.Decode(request_id="lost", prompt_token_ids=PROMPT, sampling=sampling(200)))
            await eventually(lambda: lost.token_ids)
        tokens, _ = await pair.generate("r", PROMPT, 20)
        assert tokens == expected(PROMPT, 20)
        await pair.idle()


@pytest.mark.parametrize("seed", range(2))
async def test_many_requests_of_which_some_are_cancelled(seed: int) -> None:
    """100 requests, 16 at a time, a fifth cancelled at random, with prefixes in common and stores too small for all."""
    choose = random.Random(seed)
    shared = prompt_of(60, seed=1)
    limit = asyncio.Semaphore(16)

    async def one(pair: Pair, i: int, prompt: list[int], num_tokens: int, patience: int | None) -> None:
        async with limit:
            request_id = f"r{i}"
            generating = asyncio.create_task(pair.generate(request_id, prompt, num_tokens))
            if patience is None:
                tokens, _ = await generating
                assert tokens == expected(prompt, num_tokens)
                return
            for _ in range(patience):
                await asyncio.sleep(0)
            generating.cancel()
            await asyncio.wait([generating])
            pair.cancel(request_id)

    async with open_pair(p={"num_slots": 150}, d={"num_slots": 150}) as pair:
        async with asyncio.TaskGroup() as tasks:
            for i in range(100):
                prompt = shared[: choose.randrange(60)] + prompt_of(choose.randrange(1, 80), seed=i)
                patience = choose.randrange(300) if choose.random() < 0.2 else None
                tasks.create_task(one(pair, i, prompt, choose.randrange(2, 40), patience))
        await pair.idle()


async def test_coordinators_that_come_and_go() -> None:
    """Each breaks its streams at some moment of its requests; the next one finds workers without a trace of it."""
    choose = random.Random(3)
    async with open_pair() as pair:
        for round_ in range(12):
            async with open_link(pair.p.address) as to_p, open_link(pair.d.address) as to_d:
                coordinator = Pair(pair.p, pair.d, to_p, to_d)
                prompts = [prompt_of(choose.randrange(1, 120), seed=choose.randrange(8)) for _ in range(6)]
                requests = [
                    asyncio.create_task(coordinator.generate(f"{round_}-{i}", prompt, 30))
                    for i, prompt in enumerate(prompts)
                ]
                for _ in range(choose.randrange(400)):
                    await asyncio.sleep(0)
                for request in requests:
                    request.cancel()
                await asyncio.wait(requests)
        await pair.idle()
        tokens, _ = await pair.generate("last", PROMPT, 10)
        assert tokens == expected(PROMPT, 10)


async def test_completions_of_which_some_are_cancelled() -> None:
    choose = random.Random(5)
    async with open_pair() as pair:
        for i in range(20):
            prompt = prompt_of(choose.randrange(1, 100), seed=i)
            first = pair.prefill(f"r{i}", prompt)
            if choose.random() < 0.5:
                await over(first)
            ids = [f"r{i}-{j}" for j in range(4)]
            answers = [
                pair.decode(ids[j], prompt, 10, sampling=sampling(10, seed=j), prefill_request_id=f"r{i}")
                for j in range(4)
            ]
            cancelled = set(choose.sample(range(4), choose.randrange(4)))
            for _ in range(choose.randrange(60)):
                await asyncio.sleep(0)
            for j in cancelled:
                pair.to_d.cancel(ids[j])
            for j in {0, 1, 2, 3} - cancelled:
                await over(answers[j])
                assert answers[j].token_ids == expected(prompt, 10, seed=j)
            await over(first)
        await pair.idle()
