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
from kvrelay.worker import link_speeds
from tests.support.eventually import eventually
from tests.support.worker_link import Answer, open_link, over
from tests.support.worker_pair import BLOCK, CONFIG, Pair, open_node, open_pair, sampling

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
        assert answer.counters["decode.tokens_stored"] == num_tokens
        assert answer.counters["decode.blocks_loaded"] == num_blocks(num_tokens)
        assert answer.num_cached_tokens == num_tokens
        assert pair.d.status().counters["blocks_loaded"] == num_blocks(num_tokens)
        await pushed(pair, num_blocks(num_tokens))
        assert "kv.last_frame" in answer.events


async def test_without_the_prefill_workers_token_all_but_one_token_is_loaded() -> None:
    async with open_pair() as pair:
        await over(pair.prefill("r", PROMPT))
        answer = await over(pair.decode("r", PROMPT, 10))
        assert answer.token_ids == expected(PROMPT, 10)
        assert answer.counters["decode.tokens_stored"] == len(PROMPT) - 1


async def test_the_decode_may_come_before_the_blocks() -> None:
    async with open_pair() as pair:
        pair.p.steps.shut()
        first = pair.prefill("r", PROMPT)
        answer = pair.decode("r", PROMPT, 10)
        await eventually(lambda: "decode-r" in {task.get_name() for task in asyncio.all_tasks()})
        pair.p.steps.open()
        await over(answer)
        assert answer.token_ids == expected(PROMPT, 10)
        assert answer.counters["decode.tokens_stored"] == len(PROMPT) - 1
        await over(first)


async def test_a_prompt_takes_no_room_of_the_decode_worker_before_it_is_computed() -> None:
    async with open_pair() as pair:
        pair.p.steps.shut()
        first = pair.prefill("r", PROMPT)
        await eventually(lambda: pair.p.steps.num_arrived)
        assert pair.d.status().num_incoming_transfers == 0
        await pair.p.steps.let_pass(1)
        await eventually(lambda: pair.d.status().num_incoming_transfers)
        pair.p.steps.open()
        await over(first)
        await over(pair.decode("r", [*PROMPT, *first.token_ids], 3))


@pytest.mark.parametrize("begun", [False, True])
async def test_who_waits_for_blocks_that_will_not_come_is_told(begun: bool) -> None:
    async with open_pair() as pair:
        pair.d.kv.frames.shut()
        if begun:
            await over(pair.prefill("r", PROMPT))
            await eventually(lambda: pair.d.kv.frames.num_arrived)
        answer = pair.decode("r", PROMPT, 3, kv_wait_ms=60_000)
        await eventually(lambda: "decode-r" in {task.get_name() for task in asyncio.all_tasks()})
        pair.to_d.kv_lost("r")
        await over(answer)
        assert answer.token_ids == expected(PROMPT, 3)
        assert answer.counters["decode.tokens_stored"] == 0


async def test_the_share_hidden_behind_compute_is_told() -> None:
    prompt = prompt_of(3 * CONFIG.max_batched_tokens)
    async with open_pair() as pair:
        pair.p.steps.shut()
        first = pair.prefill("r", prompt)
        for group in range(2 * CONFIG.layer_groups):
            await pair.p.steps.let_pass(group + 1)
        num_blocks = 2 * CONFIG.max_batched_tokens // BLOCK
        await eventually(lambda: pair.d.status().store.num_pinned == num_blocks)
        await eventually(lambda: not pair.p.status().store.num_pinned, "all of them are acknowledged")
        pair.p.steps.open()
        await over(first)
        await over(pair.decode("r", [*prompt, *first.token_ids], 3))
    assert first.counters["kv.wanted_bytes"] == 3 * num_blocks // 2 * CONFIG.block_bytes
    assert 2 / 3 <= first.counters["kv.hidden_bytes"] / first.counters["kv.wanted_bytes"] < 1


async def test_blocks_leave_while_prefill_is_still_running() -> None:
    """A prompt of several chunks: those of the first arrive before the last is computed."""
    prompt = prompt_of(3 * CONFIG.max_batched_tokens)
    async with open_pair() as pair:
        pair.p.steps.shut()
        first = pair.prefill("r", prompt)
        for group in range(CONFIG.layer_groups):
            await pair.p.steps.let_pass(group + 1)
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
            assert answer.counters["decode.tokens_stored"] == len(PROMPT) - 1
        await pair.idle()


async def test_the_next_turn_finds_generated_blocks() -> None:
    async with open_pair() as pair:
        tokens, _ = await pair.generate("turn-1", PROMPT, 4 * BLOCK)
        prompt = [*PROMPT, *tokens, *prompt_of(6)]
        await pushed(pair, num_blocks(len(PROMPT)))
        answer, rest = await pair.generate("turn-2", prompt, 5)
        assert answer == expected(prompt, 5)
        assert rest.counters["decode.tokens_stored"] == len(prompt)
        # Full blocks of the first turn, generated ones too, were there already: but for the last token's.
        num_known = (len(PROMPT) + len(tokens) - 1) // BLOCK
        await pushed(pair, num_blocks(len(PROMPT)) + num_blocks(len(prompt)) - num_known)


async def test_a_prompt_seen_before_is_neither_computed_nor_sent_again() -> None:
    async with open_pair() as pair:
        await pair.generate("a", PROMPT, 3)
        await pushed(pair, num_blocks(len(PROMPT)))
        tokens, answer = await pair.generate("b", PROMPT, 3)
        assert tokens == expected(PROMPT, 3)
        assert answer.counters["decode.tokens_stored"] == len(PROMPT)
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
        assert answer.counters["decode.tokens_stored"] == 0
        assert answer.token_ids == expected(PROMPT, 2)


async def test_blocks_that_are_late_are_computed() -> None:
    async with open_pair() as pair:
        pair.d.kv.frames.shut()
        first = await over(pair.prefill("r", PROMPT))
        answer = await over(pair.decode("r", [*PROMPT, *first.token_ids], 5, kv_wait_ms=20))
        assert first.token_ids + answer.token_ids == expected(PROMPT, 6)
        assert answer.counters["decode.tokens_stored"] == 0
        pair.d.kv.frames.open()
        await pair.idle()


async def test_blocks_that_are_not_offered_in_time_are_computed_and_not_taken_later() -> None:
    async with open_pair() as pair:
        pair.d.kv.offers.shut()
        first = await over(pair.prefill("r", PROMPT))
        answer = await over(pair.decode("r", PROMPT, 5, kv_wait_ms=20))
        assert answer.token_ids == expected(PROMPT, 5)
        assert answer.counters["decode.tokens_stored"] == 0
        pair.d.kv.offers.open()
        await pair.idle()
        assert first.token_ids == expected(PROMPT, 1)


async def test_nobody_is_waited_for_when_no_prefill_worker_is_involved() -> None:
    async with open_pair() as pair:
        answer = await over(pair.decode("r", PROMPT, 5, kv_wait_ms=0))
        assert answer.token_ids == expected(PROMPT, 5)
        assert answer.counters["decode.tokens_stored"] == 0


@pytest.mark.parametrize(("p_slots", "d_slots"), [(3, 512), (512, 3), (1, 1), (512, 1)])
async def test_a_store_too_small_for_the_prompt_costs_time_only(p_slots: int, d_slots: int) -> None:
    async with open_pair(p={"num_slots": p_slots}, d={"num_slots": d_slots}) as pair:
        for turn in range(2):
            tokens, answer = await pair.generate(f"r{turn}", PROMPT, 10)
            assert tokens == expected(PROMPT, 10)
            # Slots of the prefill worker come back as soon as their blocks are sent.
            assert answer.counters["decode.tokens_stored"] <= d_slots * BLOCK
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
    async with open_node("w") as node, open_link(node.address) as link:
        await eventually(lambda: link.hello is not None and link.statuses)
        assert link.hello is not None
        assert link.hello.worker.worker_id == "w"
        status = await link.stub.GetStatus(worker_pb2.GetStatusRequest())
        assert status.worker_id == "w"
        assert status.store.num_slots == 512
        assert status.store.num_granted == 64


async def test_workers_tell_how_fast_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_speeds, "MIN_BYTES", 1)
    async with open_pair() as pair:
        for number in range(3):
            await pair.generate(f"r{number}", prompt_of(10 * BLOCK, number), 12)
        await eventually(lambda: len(pair.p.status().links) == 1)
        (link,) = pair.p.status().links
        assert link.address == pair.d.address
        assert link.bytes_per_s > 0
        assert pair.p.status().step_times.num_prefills == 3
        assert pair.d.status().num_context_tokens == 0
