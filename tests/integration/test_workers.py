"""Two workers and a coordinator: right tokens, blocks that really moved, and nothing left of what was given up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

import grpc.aio
import pytest

from kvrelay.engine.simulated_model import expected_tokens
from kvrelay.grpc_options import open_channel
from kvrelay.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from tests.support.eventually import eventually
from tests.support.worker_pair import BLOCK, CONFIG, Answer, Pair, open_link, open_node, open_pair, over, sampling

LENGTH = common_pb2.FINISH_REASON_LENGTH
PROMPT = list(range(10, 10 + 9 * BLOCK + 1))


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, CONFIG.vocab_size), k=num_tokens)


def expected(prompt: Sequence[int], num_tokens: int, seed: int | None = None) -> list[int]:
    return expected_tokens(prompt, num_tokens, CONFIG, seed)


def num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK)


async def pushed(pair: Pair, count: int) -> None:
    """Wait for the end of all pushes, and compare the blocks that they sent."""
    await eventually(lambda: not any(task.get_name().startswith("prefill-") for task in asyncio.all_tasks()))
    assert pair.p.status().counters["blocks_pushed"] == count


@pytest.mark.parametrize("num_tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 8 * BLOCK + 1, 25 * BLOCK - 1])
async def test_a_hand_off_changes_no_token_and_computes_no_token_twice(num_tokens: int) -> None:
    prompt = prompt_of(num_tokens)
    async with open_pair() as pair:
        tokens, answer = await pair.generate("r", prompt, 12)
        assert tokens == expected(prompt, 12)
        assert answer.finish_reason == LENGTH
        assert answer.counters["decode.tokens_loaded"] == num_tokens
        assert answer.counters["decode.blocks_loaded"] == num_blocks(num_tokens)
        assert answer.num_cached_tokens == num_tokens
        assert pair.d.status().counters["prompt_blocks_loaded"] == num_blocks(num_tokens)
        await pushed(pair, num_blocks(num_tokens))
        assert "kv.last_frame" in answer.events


async def test_without_the_prefill_workers_token_all_but_one_token_is_loaded() -> None:
    async with open_pair() as pair:
        await over(pair.prefill("r", PROMPT))
        answer = await over(pair.decode("r", PROMPT, 10))
        assert answer.token_ids == expected(PROMPT, 10)
        assert answer.counters["decode.tokens_loaded"] == len(PROMPT) - 1


async def test_the_decode_may_come_before_the_blocks() -> None:
    async with open_pair() as pair:
        pair.p.steps.shut()
        first = pair.prefill("r", PROMPT)
        answer = pair.decode("r", PROMPT, 10)
        await eventually(lambda: pair.d.status().num_incoming_transfers)
        pair.p.steps.open()
        await over(answer)
        assert answer.token_ids == expected(PROMPT, 10)
        assert answer.counters["decode.tokens_loaded"] == len(PROMPT) - 1
        await over(first)


async def test_blocks_leave_while_prefill_is_still_running() -> None:
    """A prompt of several chunks: those of the first arrive before the last is computed."""
    prompt = prompt_of(3 * CONFIG.max_batched_tokens)
    async with open_pair() as pair:
        pair.p.steps.shut()
        first = pair.prefill("r", prompt)
        await eventually(lambda: pair.p.steps.num_arrived == 1)
        pair.p.steps.open()
        pair.p.steps.shut()
        await eventually(lambda: pair.p.status().counters["blocks_saved"] > 0)
        await eventually(lambda: pair.d.status().store.num_pinned > 0, "blocks of the first chunk are there")
        assert first.token_ids == []
        assert pair.d.status().store.num_reserved > 0
        pair.p.steps.open()
        await over(first)
        answer = await over(pair.decode("r", [*prompt, *first.token_ids], 3))
        assert first.token_ids + answer.token_ids == expected(prompt, 4)


async def test_completions_of_one_prompt_share_its_transfer() -> None:
    async with open_pair() as pair:
        await over(pair.prefill("r", PROMPT))
        answers: list[Answer] = []
        for i in range(3):
            params = sampling(8, seed=i)
            answers.append(pair.decode(f"r-{i}", PROMPT, 8, sampling=params, prefill_request_id="r"))
            # The others come when the first has let go of the transfer: they must not wait for it.
            await over(answers[-1])
        for i, answer in enumerate(answers):
            assert answer.token_ids == expected(PROMPT, 8, seed=i)
            assert answer.counters["decode.tokens_loaded"] == len(PROMPT) - 1
        await pair.idle()


async def test_the_next_turn_finds_generated_blocks() -> None:
    async with open_pair() as pair:
        tokens, _ = await pair.generate("turn-1", PROMPT, 4 * BLOCK)
        prompt = [*PROMPT, *tokens, *prompt_of(6)]
        await pushed(pair, num_blocks(len(PROMPT)))
        answer, rest = await pair.generate("turn-2", prompt, 5)
        assert answer == expected(prompt, 5)
        assert rest.counters["decode.tokens_loaded"] == len(prompt)
        # Full blocks of the first turn, generated ones too, were there already: but for the last token's.
        num_known = (len(PROMPT) + len(tokens) - 1) // BLOCK
        await pushed(pair, num_blocks(len(PROMPT)) + num_blocks(len(prompt)) - num_known)


async def test_a_prompt_seen_before_is_neither_computed_nor_sent_again() -> None:
    async with open_pair() as pair:
        await pair.generate("a", PROMPT, 3)
        await pushed(pair, num_blocks(len(PROMPT)))
        tokens, answer = await pair.generate("b", PROMPT, 3)
        assert tokens == expected(PROMPT, 3)
        assert answer.counters["decode.tokens_loaded"] == len(PROMPT)
        assert "kv.received_bytes" not in answer.counters
        assert "kv.last_frame" not in answer.events
        await pair.idle()
        await pushed(pair, num_blocks(len(PROMPT)))
        assert pair.p.status().counters["blocks_saved"] == num_blocks(len(PROMPT))


async def test_salts_keep_tenants_apart() -> None:
    async with open_pair() as pair:
        await over(pair.prefill("a", PROMPT, cache_salt="a"))
        await over(pair.decode("a", PROMPT, 2, cache_salt="a"))
        answer = await over(pair.decode("b", PROMPT, 2, cache_salt="b", kv_wait_ms=0))
        assert answer.counters["decode.tokens_loaded"] == 0
        assert answer.token_ids == expected(PROMPT, 2)


async def test_blocks_that_are_late_are_computed() -> None:
    async with open_pair() as pair:
        pair.d.kv.frames.shut()
        first = await over(pair.prefill("r", PROMPT))
        answer = await over(pair.decode("r", [*PROMPT, *first.token_ids], 5, kv_wait_ms=20))
        assert first.token_ids + answer.token_ids == expected(PROMPT, 6)
        assert answer.counters["decode.tokens_loaded"] == 0
        pair.d.kv.frames.open()
        await pair.idle()


async def test_blocks_that_are_not_offered_in_time_are_computed_and_not_taken_later() -> None:
    async with open_pair() as pair:
        pair.d.kv.offers.shut()
        first = await over(pair.prefill("r", PROMPT))
        answer = await over(pair.decode("r", PROMPT, 5, kv_wait_ms=20))
        assert answer.token_ids == expected(PROMPT, 5)
        assert answer.counters["decode.tokens_loaded"] == 0
        pair.d.kv.offers.open()
        await pair.idle()
        assert first.token_ids == expected(PROMPT, 1)


async def test_nobody_is_waited_for_when_no_prefill_worker_is_involved() -> None:
    async with open_pair() as pair:
        answer = await over(pair.decode("r", PROMPT, 5, kv_wait_ms=0))
        assert answer.token_ids == expected(PROMPT, 5)
        assert answer.counters["decode.tokens_loaded"] == 0


@pytest.mark.parametrize(("p_slots", "d_slots"), [(3, 512), (512, 3), (1, 1), (512, 1)])
async def test_a_store_too_small_for_the_prompt_costs_time_only(p_slots: int, d_slots: int) -> None:
    async with open_pair(p={"num_slots": p_slots}, d={"num_slots": d_slots}) as pair:
        for turn in range(2):
            tokens, answer = await pair.generate(f"r{turn}", PROMPT, 10)
            assert tokens == expected(PROMPT, 10)
            # Slots of the prefill worker come back as soon as their blocks are sent.
            assert answer.counters["decode.tokens_loaded"] <= d_slots * BLOCK
        await pair.idle()


async def test_a_decode_worker_that_cannot_be_reached_costs_time_only() -> None:
    async with open_pair() as pair:
        async with open_node("gone") as gone:
            address = gone.address
        first = pair.to_p.prefill(
            worker_pb2.Prefill(request_id="r", prompt_token_ids=PROMPT, sampling=sampling(1), decode_address=address)
        )
        await over(first)
        assert first.token_ids == expected(PROMPT, 1)
        await pair.idle()


async def test_workers_of_different_models_are_told_apart() -> None:
    async with open_pair(d={"config": replace(CONFIG, seed=7)}) as pair:
        answer = pair.prefill("r", PROMPT)
        await eventually(lambda: answer.failed is not None)
        assert answer.failed is not None
        assert answer.failed.reason == worker_pb2.RequestFailed.REASON_UNAVAILABLE
        assert "sender [model simulated#0" in answer.failed.message
        assert "receiver [model simulated#7" in answer.failed.message
        await pair.idle()


async def test_an_engine_short_of_blocks_preempts_and_goes_on() -> None:
    config = replace(CONFIG, num_engine_blocks=70, max_num_seqs=8)
    async with open_pair(p={"config": config}, d={"config": config}) as pair:
        prompts = [prompt_of(100, seed=i) for i in range(4)]
        answers = await asyncio.gather(*(pair.generate(f"r{i}", prompts[i], 60) for i in range(4)))
        assert [tokens for tokens, _ in answers] == [expected(prompt, 60) for prompt in prompts]


# Giving up, at every stage.


async def cancelled_before_the_offer(pair: Pair) -> None:
    pair.d.kv.offers.shut()
    pair.prefill("r", PROMPT)
    await eventually(lambda: pair.d.kv.offers.num_arrived)


async def cancelled_at_once(pair: Pair) -> None:
    pair.prefill("r", PROMPT)


async def cancelled_during_prefill(pair: Pair) -> None:
    pair.p.steps.shut()
    pair.prefill("r", PROMPT)
    await eventually(lambda: pair.p.steps.num_arrived and pair.d.status().num_incoming_transfers)


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


STAGES = [
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
async def test_a_cancelled_request_leaves_nothing(stage: object) -> None:
    assert callable(stage)
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
async def test_a_coordinator_that_is_gone_leaves_nothing(stage: object) -> None:
    """What only the decode worker holds, of a request that it was never told of, frees itself after the hold time."""
    assert callable(stage)
    async with open_pair(d={"hold_s": 0.2}) as pair:
        await stage(pair)
        pair.to_p.hang_up()
        pair.to_d.hang_up()
        await eventually(lambda: not any(t.get_name() in ("prefill-r", "decode-r") for t in asyncio.all_tasks()))
        open_gates(pair)
        await pair.idle()


async def test_other_sessions_go_on_when_one_is_gone() -> None:
    async with open_pair() as pair:
        async with open_link(pair.d) as other:
            lost = other.decode(worker_pb2.Decode(request_id="lost", prompt_token_ids=PROMPT, sampling=sampling(200)))
            await eventually(lambda: lost.token_ids)
        tokens, _ = await pair.generate("r", PROMPT, 20)
        assert tokens == expected(PROMPT, 20)
        await pair.idle()


# Bad messages.


@pytest.mark.parametrize(
    ("prompt", "params", "text"),
    [
        ([], sampling(1), "has 0 tokens"),
        ([5] * CONFIG.max_model_len_tokens, sampling(1), f"1 to {CONFIG.max_model_len_tokens - 1}"),
        ([CONFIG.vocab_size], sampling(1), "outside of the vocabulary"),
        ([5], sampling(0), "max_tokens is 0"),
        ([5], sampling(1, logit_bias={CONFIG.vocab_size: 1.0}), "outside of the vocabulary"),
        ([5], sampling(1, bad_words_token_ids=[{"ids": [2**32 - 1]}]), "outside of the vocabulary"),
        ([5], sampling(1, bad_words_token_ids=[{}]), "bad_words"),
    ],
)
async def test_what_could_harm_the_engine_is_refused(
    prompt: list[int], params: common_pb2.SamplingParams, text: str
) -> None:
    async with open_pair() as pair:
        answers = [
            pair.to_p.prefill(worker_pb2.Prefill(request_id="r", prompt_token_ids=prompt, sampling=params)),
            pair.to_d.decode(worker_pb2.Decode(request_id="r", prompt_token_ids=prompt, sampling=params)),
        ]
        for answer in answers:
            await over(answer)
            assert answer.failed is not None
            assert answer.failed.reason == worker_pb2.RequestFailed.REASON_INVALID
            assert text in answer.failed.message


async def test_a_session_begins_with_hello() -> None:
    async with open_node("w") as node, open_channel(node.address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Session()
        await call.write(worker_pb2.CoordinatorMessage(cancel=worker_pb2.Cancel(request_id="r")))
        with pytest.raises(grpc.aio.AioRpcError, match="hello"):
            await call.read()


async def test_a_worker_says_who_it_is_and_how_it_is() -> None:
    async with open_node("w") as node, open_link(node) as link:
        await eventually(lambda: link.hello is not None and link.statuses)
        assert link.hello is not None
        assert link.hello.worker.worker_id == "w"
        status = await link.stub.GetStatus(worker_pb2.GetStatusRequest())
        assert status.worker_id == "w"
        assert status.store.num_slots == 512
        assert status.store.num_granted == 64


# Load.


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
    async with open_pair(d={"hold_s": 0.2}) as pair:
        for round_ in range(12):
            async with open_link(pair.p) as to_p, open_link(pair.d) as to_d:
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
