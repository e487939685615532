"""Does a request take the right way over two workers, and does the client see one engine?"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from kvrelay.coordinator.cluster_engine import ClusterEngineConfig
from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.vllm_errors import ClusterRequestError
from kvrelay.errors import NoWorkersError, OverloadedError
from kvrelay.v1 import common_pb2, worker_pb2
from tests.support.fake_cluster import fake_cluster, until
from tests.support.fake_worker import delta

PROMPT = list(range(1000, 1020))
_LENGTH = common_pb2.FINISH_REASON_LENGTH


def ids_of(front_end: FrontEnd, text: str) -> list[int]:
    return front_end.renderer.get_tokenizer().encode(text, add_special_tokens=False)


def script_of(front_end: FrontEnd, text: str) -> list[int]:
    """The text's tokens and the stop token."""
    return [*ids_of(front_end, text), eos_of(front_end)]


def eos_of(front_end: FrontEnd) -> int:
    eos = front_end.renderer.get_eos_token_id()
    assert eos is not None
    return eos


async def test_first_token_comes_from_prefill_and_decode_goes_on_after_it(front_end: FrontEnd) -> None:
    tokens = script_of(front_end, "The capital of France is Paris.")
    async with fake_cluster(front_end, tokens) as cluster:
        generated = await cluster.generate(PROMPT, temperature=0.0, max_tokens=50)
        assert generated.token_ids[0] == tokens
        assert generated.text[0] == "The capital of France is Paris."
        assert generated.finish_reason[0] == "stop"
        (prefill,) = cluster.prefill.messages("prefill")
        (decode,) = cluster.decode.messages("decode")
        assert list(prefill.prompt_token_ids) == PROMPT
        assert prefill.sampling.max_tokens == 1
        assert (prefill.decode_worker_id, prefill.decode_address) == ("d1", cluster.decode.info.address)
        assert decode.request_id == prefill.request_id
        assert list(decode.prompt_token_ids) == [*PROMPT, tokens[0]]
        assert decode.sampling.max_tokens == 49
        assert decode.kv_wait_ms > 0
        cluster.assert_idle()


@pytest.mark.parametrize(
    "sampling",
    [
        {"seed": 7, "temperature": 0.8},
        {"presence_penalty": 0.5, "temperature": 0.0},
        {"frequency_penalty": 0.5, "temperature": 0.0},
        {"repetition_penalty": 1.1, "temperature": 0.0},
        {"min_tokens": 2, "temperature": 0.0},
        {"bad_words": ["Berlin"], "temperature": 0.0},
    ],
    ids=lambda sampling: next(iter(sampling)),
)
async def test_decode_samples_all_tokens_where_prefills_would_not_be_exact(
    front_end: FrontEnd, sampling: dict[str, Any]
) -> None:
    tokens = ids_of(front_end, "one two three")
    async with fake_cluster(front_end) as cluster:
        cluster.prefill.respond = lambda worker, message: worker.send(
            delta(message.prefill.request_id, [5], common_pb2.FINISH_REASON_LENGTH)
        )
        generating = asyncio.create_task(cluster.generate(PROMPT, max_tokens=3, **sampling))
        (decode,) = await cluster.decode.wait_for("decode")
        assert list(decode.prompt_token_ids) == PROMPT
        assert decode.sampling.max_tokens == 3
        (prefill,) = cluster.prefill.messages("prefill")
        assert prefill.sampling.temperature == 0.0
        assert not prefill.sampling.HasField("seed")
        cluster.decode.send(delta(decode.request_id, tokens[:3], common_pb2.FINISH_REASON_LENGTH))
        generated = await generating
        assert generated.token_ids[0] == tokens[:3]
        cluster.assert_idle()


async def test_two_completions_share_one_prefill_and_have_their_own_seeds(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        cluster.prefill.respond = lambda worker, message: worker.send(
            delta(message.prefill.request_id, [5], common_pb2.FINISH_REASON_LENGTH)
        )
        generating = asyncio.create_task(cluster.generate(PROMPT, n=2, seed=40, max_tokens=4))
        first, second = await cluster.decode.wait_for("decode", 2)
        (prefill,) = cluster.prefill.messages("prefill")
        assert {first.prefill_request_id, second.prefill_request_id} == {prefill.request_id}
        assert [first.sampling.seed, second.sampling.seed] == [40, 41]
        assert list(first.prompt_token_ids) == PROMPT
        cluster.decode.send(
            delta(first.request_id, [10, 11], common_pb2.FINISH_REASON_LENGTH), delta(second.request_id, [20])
        )
        cluster.decode.send(delta(second.request_id, [21], common_pb2.FINISH_REASON_LENGTH))
        generated = await generating
        assert generated.token_ids == {0: [10, 11], 1: [20, 21]}
        cluster.assert_idle()


async def test_stop_string_across_the_hand_off_ends_the_decode(front_end: FrontEnd) -> None:
    tokens = script_of(front_end, "Hello world and more")
    async with fake_cluster(front_end, tokens) as cluster:
        generated = await cluster.generate(PROMPT, temperature=0.0, max_tokens=50, stop=["lo wor"])
        assert generated.text[0] == "Hel"
        assert (generated.finish_reason[0], generated.stop_reason[0]) == ("stop", "lo wor")
        (decode,) = cluster.decode.messages("decode")
        await cluster.decode.wait_for("cancel")
        assert [cancel.request_id for cancel in cluster.decode.messages("cancel")] == [decode.request_id]
        assert not decode.sampling.stop
        cluster.assert_idle()


async def test_stop_string_in_the_first_token_needs_no_decode(front_end: FrontEnd) -> None:
    tokens = script_of(front_end, "Hello world")
    async with fake_cluster(front_end, tokens) as cluster:
        generated = await cluster.generate(PROMPT, temperature=0.0, max_tokens=50, stop=["ell"])
        assert generated.text[0] == "H"
        await cluster.prefill.wait_for("cancel")
        await cluster.decode.wait_for("cancel")
        assert not cluster.decode.messages("decode")
        cluster.assert_idle()


async def test_stop_token_from_prefill_finishes_the_request(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end, [eos_of(front_end)]) as cluster:
        generated = await cluster.generate(PROMPT, temperature=0.0, max_tokens=50)
        assert generated.text[0] == ""
        assert generated.finish_reason[0] == "stop"
        assert not cluster.decode.messages("decode")
        cluster.assert_idle()


async def test_one_token_is_all_prefills_work(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end, script_of(front_end, "Paris it is")) as cluster:
        generated = await cluster.generate(PROMPT, temperature=0.0, max_tokens=1)
        assert generated.finish_reason[0] == "length"
        assert len(generated.token_ids[0]) == 1
        assert not cluster.decode.messages("decode")
        cluster.assert_idle()


async def test_first_token_that_fills_the_context_is_the_last(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end, script_of(front_end, "Paris it is")) as cluster:
        generated = await cluster.generate([7] * 511, temperature=0.0, max_tokens=30)
        assert generated.finish_reason[0] == "length"
        assert len(generated.token_ids[0]) == 1
        assert not cluster.decode.messages("decode")


async def test_prompt_without_a_full_block_goes_to_decode_alone(front_end: FrontEnd) -> None:
    tokens = script_of(front_end, "Hi there")
    async with fake_cluster(front_end, tokens) as cluster:
        generated = await cluster.generate([1, 2, 3], temperature=0.0)
        assert generated.token_ids[0] == tokens
        (decode,) = cluster.decode.messages("decode")
        assert decode.kv_wait_ms == 0
        assert not cluster.prefill.received


def logprobs_of(*rows: tuple[int, float, int, float]) -> common_pb2.Logprobs:
    """Rows of sampled id, its logarithm, the other likely id, its logarithm."""
    return common_pb2.Logprobs(
        width=2,
        token_ids=[id_ for row in rows for id_ in (row[0], row[2])],
        logprobs=[value for row in rows for value in (row[1], row[3])],
        sampled_ranks=[1 if row[1] >= row[3] else 2 for row in rows],
    )


async def test_logprobs_come_from_both_workers_and_those_of_the_prompt_once(front_end: FrontEnd) -> None:
    prompt_rows = logprobs_of(*[(token, -1.0, 9, -2.0) for token in PROMPT[1:]])
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(
            cluster.generate(PROMPT, temperature=0.0, max_tokens=2, logprobs=1, prompt_logprobs=1)
        )
        (prefill,) = await cluster.prefill.wait_for("prefill")
        assert (prefill.sampling.logprobs, prefill.sampling.prompt_logprobs) == (1, 1)
        cluster.prefill.send(
            delta(
                prefill.request_id,
                [30],
                common_pb2.FINISH_REASON_LENGTH,
                logprobs=logprobs_of((30, -0.5, 31, -0.75)),
                prompt_logprobs=prompt_rows,
            )
        )
        (decode,) = await cluster.decode.wait_for("decode")
        assert decode.sampling.logprobs == 1
        assert not decode.sampling.HasField("prompt_logprobs")
        rows = logprobs_of((40, -1.5, 41, -0.25))
        cluster.decode.send(delta(decode.request_id, [40], common_pb2.FINISH_REASON_LENGTH, logprobs=rows))
        generated = await generating
        assert [row[token].logprob for row, token in zip(generated.logprobs[0], [30, 40], strict=True)] == [-0.5, -1.5]
        assert generated.logprobs[0][1][40].rank == 2
        (prompt_logprobs,) = generated.prompt_logprobs
        assert len(prompt_logprobs) == len(PROMPT)
        assert prompt_logprobs[0] is None
        assert prompt_logprobs[1][PROMPT[1]].logprob == -1.0


async def test_prompt_logprobs_of_a_dropped_first_token_come_with_decodes_first(front_end: FrontEnd) -> None:
    prompt_rows = logprobs_of(*[(token, -1.0, 9, -2.0) for token in PROMPT[1:]])
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(
            cluster.generate(PROMPT, temperature=0.0, max_tokens=1, prompt_logprobs=1, presence_penalty=1.0)
        )
        (prefill,) = await cluster.prefill.wait_for("prefill")
        cluster.prefill.send(
            delta(prefill.request_id, [30], common_pb2.FINISH_REASON_LENGTH, prompt_logprobs=prompt_rows)
        )
        (decode,) = await cluster.decode.wait_for("decode")
        assert not decode.sampling.HasField("prompt_logprobs")
        cluster.decode.send(delta(decode.request_id, [40], common_pb2.FINISH_REASON_LENGTH))
        generated = await generating
        assert len(generated.prompt_logprobs[0]) == len(PROMPT)


@pytest.mark.parametrize("how", ["failed", "hung up"])
async def test_decode_computes_the_prompt_when_prefill_fails(front_end: FrontEnd, how: str) -> None:
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(cluster.generate(PROMPT, temperature=0.0, max_tokens=1, prompt_logprobs=0))
        (prefill,) = await cluster.prefill.wait_for("prefill")
        if how == "failed":
            reason = worker_pb2.RequestFailed.REASON_UNAVAILABLE
            cluster.prefill.send_failed(prefill.request_id, reason, "no slots")
        else:
            cluster.prefill.hang_up()
        (decode,) = await cluster.decode.wait_for("decode")
        assert list(decode.prompt_token_ids) == PROMPT
        assert decode.kv_wait_ms == 0
        assert decode.sampling.HasField("prompt_logprobs")
        cluster.decode.send(delta(decode.request_id, [40], common_pb2.FINISH_REASON_LENGTH))
        assert (await generating).token_ids[0] == [40]
        cluster.assert_idle()


@pytest.mark.parametrize("how", ["failed", "hung up"])
async def test_decode_need_not_wait_for_blocks_when_prefill_is_lost_after_its_token(
    front_end: FrontEnd, how: str
) -> None:
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(cluster.generate(PROMPT, temperature=0.0, max_tokens=2))
        (prefill,) = await cluster.prefill.wait_for("prefill")
        cluster.prefill.send(delta(prefill.request_id, [40], common_pb2.FINISH_REASON_LENGTH))
        (decode,) = await cluster.decode.wait_for("decode")
        assert decode.kv_wait_ms > 0
        if how == "failed":
            cluster.prefill.send_failed(prefill.request_id, worker_pb2.RequestFailed.REASON_UNAVAILABLE, "no way")
        else:
            cluster.prefill.hang_up()
        (lost,) = await cluster.decode.wait_for("kv_lost")
        assert lost.request_id == prefill.request_id
        cluster.decode.send(delta(decode.request_id, [41], common_pb2.FINISH_REASON_LENGTH))
        assert (await generating).token_ids[0] == [40, 41]
        cluster.assert_idle()


async def test_decode_does_not_wait_for_blocks_that_prefill_could_not_send(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(cluster.generate(PROMPT, temperature=0.0, max_tokens=2))
        (prefill,) = await cluster.prefill.wait_for("prefill")
        first = delta(prefill.request_id, [40], common_pb2.FINISH_REASON_LENGTH)
        first.kv_failed = True
        cluster.prefill.send(first)
        (decode,) = await cluster.decode.wait_for("decode")
        assert decode.kv_wait_ms == 0
        cluster.decode.send(delta(decode.request_id, [41], common_pb2.FINISH_REASON_LENGTH))
        assert (await generating).token_ids[0] == [40, 41]
        cluster.assert_idle()


async def test_closing_the_generator_in_prefill_cancels_on_both_workers(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(cluster.generate(PROMPT, temperature=0.0))
        (prefill,) = await cluster.prefill.wait_for("prefill")
        generating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await generating
        cluster.assert_idle()
        (at_prefill,) = await cluster.prefill.wait_for("cancel")
        (at_decode,) = await cluster.decode.wait_for("cancel")
        assert at_prefill.request_id == at_decode.request_id == prefill.request_id


async def test_closing_the_generator_in_decode_cancels_there(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        stream = cluster.stream([1], temperature=0.0)
        first = asyncio.create_task(anext(stream))
        (decode,) = await cluster.decode.wait_for("decode")
        cluster.decode.send(delta(decode.request_id, [40]))
        await first
        await stream.aclose()  # type: ignore[attr-defined]
        cluster.assert_idle()
        (cancel,) = await cluster.decode.wait_for("cancel")
        assert cancel.request_id == decode.request_id


async def test_closing_a_request_of_two_completions_cancels_both(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(cluster.generate([1, 2], n=2))
        decodes = await cluster.decode.wait_for("decode", 2)
        generating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await generating
        cancels = await cluster.decode.wait_for("cancel", 2)
        assert {cancel.request_id for cancel in cancels} == {decode.request_id for decode in decodes}
        cluster.assert_idle()


async def test_tokens_of_one_step_reach_several_requests(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        tasks = [asyncio.create_task(cluster.generate([1, 2], f"r{i}", temperature=0.0)) for i in range(3)]
        decodes = await cluster.decode.wait_for("decode", 3)
        finish = common_pb2.FINISH_REASON_LENGTH
        cluster.decode.send(*[delta(decode.request_id, [50 + i], finish) for i, decode in enumerate(decodes)])
        results = await asyncio.gather(*tasks)
        assert sorted(result.token_ids[0] for result in results) == [[50], [51], [52]]
        cluster.assert_idle()


async def test_grammar_reaches_decode_with_its_engine_resolved(front_end: FrontEnd) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    async with fake_cluster(front_end) as cluster:
        cluster.prefill.respond = lambda worker, message: worker.send(
            delta(message.prefill.request_id, [5], common_pb2.FINISH_REASON_LENGTH)
        )
        structured = StructuredOutputsParams(json=schema)
        generating = asyncio.create_task(cluster.generate(PROMPT, temperature=0.0, structured_outputs=structured))
        (decode,) = await cluster.decode.wait_for("decode")
        assert list(decode.prompt_token_ids) == PROMPT
        assert json.loads(decode.sampling.structured_output.json_schema) == schema
        assert decode.sampling.structured_output.backend == "xgrammar"
        (prefill,) = cluster.prefill.messages("prefill")
        assert not prefill.sampling.HasField("structured_output")
        cluster.decode.send(delta(decode.request_id, [6], common_pb2.FINISH_REASON_LENGTH))
        assert (await generating).token_ids[0] == [6]


async def test_abort_by_the_callers_id_ends_the_request(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        generating = asyncio.create_task(cluster.generate([1], "mine", temperature=0.0))
        await cluster.decode.wait_for("decode")
        await cluster.engine.abort("mine")
        assert (await generating).finish_reason[0] == "abort"
        await cluster.decode.wait_for("cancel")
        cluster.assert_idle()


async def test_delta_that_contradicts_itself_fails_its_own_request_only(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        good = asyncio.create_task(cluster.generate([1], "good", temperature=0.0))
        (first,) = await cluster.decode.wait_for("decode")
        bad = asyncio.create_task(cluster.generate([1], "bad", temperature=0.0, logprobs=1))
        _, second = await cluster.decode.wait_for("decode", 2)
        broken = common_pb2.Logprobs(width=2, token_ids=[1], sampled_ranks=[1])
        cluster.decode.send(
            delta(second.request_id, [7], logprobs=broken),
            delta(first.request_id, [8], common_pb2.FINISH_REASON_LENGTH),
        )
        assert (await good).token_ids[0] == [8]
        with pytest.raises(ClusterRequestError, match="could not be processed"):
            await bad
        await cluster.decode.wait_for("cancel")
        cluster.assert_idle()


async def test_without_workers_a_request_is_refused_at_once(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        cluster.pool.leave("d1")
        assert not cluster.engine.is_ready
        with pytest.raises(ClusterRequestError) as raised:
            await cluster.generate(PROMPT)
        assert isinstance(raised.value.error, NoWorkersError)
        with pytest.raises(ClusterRequestError, match="no decode worker"):
            cluster.engine.check_admission()
        cluster.assert_idle()


async def test_more_requests_than_allowed_are_refused(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end, config=ClusterEngineConfig(max_requests=1)) as cluster:
        held = asyncio.create_task(cluster.generate([1], temperature=0.0))
        await cluster.decode.wait_for("decode")
        with pytest.raises(ClusterRequestError) as raised:
            await cluster.generate([1])
        assert isinstance(raised.value.error, OverloadedError)
        assert raised.value.http_status == 429
        held.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await held


@pytest.mark.parametrize(
    ("prompt", "sampling", "field", "message"),
    [
        ([], {}, "prompt", "empty"),
        ([5] * 512, {}, "prompt", "512 tokens"),
        ([5, 60_000], {}, "prompt", "60000"),
        ([5, -1], {}, "prompt", "-1"),
        ([5], {"n": 200, "temperature": 1.0}, "n", "at most 128"),
        ([5] * 500, {"min_tokens": 20, "max_tokens": 30}, "min_tokens", "20"),
        ([5], {"extra_args": {"a": 1}}, "extra_args", "not supported"),
        ([5], {"seed": 2**64 - 1}, "seed", "out of range"),
        ([5], {"stop_token_ids": [60_000]}, "stop_token_ids", "60000"),
        ([5], {"allowed_token_ids": [60_000]}, "allowed_token_ids", "vocab"),
        ([5], {"logit_bias": {60_000: 1.0}}, "logit_bias", "60000"),
        ([5], {"logprobs": 100}, "logprobs", "100"),
    ],
)
async def test_impossible_requests_never_leave(
    front_end: FrontEnd, prompt: list[int], sampling: dict[str, Any], field: str, message: str
) -> None:
    async with fake_cluster(front_end) as cluster:
        with pytest.raises(VLLMValidationError, match=message) as raised:
            await cluster.generate(prompt, **sampling)
        assert raised.value.parameter == field
        assert not cluster.decode.messages("decode")
        assert not cluster.prefill.received
        cluster.assert_idle()


async def test_context_is_as_small_as_the_smallest_worker(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end) as cluster:
        assert cluster.engine.model_config.max_model_len == 512
        cluster.pool.leave("d1")
        cluster.pool.leave("p1")
        assert cluster.engine.model_config.max_model_len == front_end.own_max_model_len_tokens


async def test_timeline_tells_the_way_of_a_request(front_end: FrontEnd) -> None:
    async with fake_cluster(front_end, script_of(front_end, "one two three")) as cluster:
        await cluster.generate(PROMPT, "told", temperature=0.0)
        timeline = cluster.engine.timeline("told")
        assert timeline is not None
        assert [event.name for event in timeline.events] == [
            "gateway.received",
            "schedule.done",
            "prefill.sent",
            "prefill.first_token",
            "decode.sent",
            "decode.first_token",
            "request.finished",
        ]


async def test_reconnects_to_a_worker_whose_stream_broke(front_end: FrontEnd) -> None:
    tokens = script_of(front_end, "again")
    async with fake_cluster(front_end, tokens) as cluster:
        cluster.decode.hang_up()
        await until(lambda: not cluster.engine.is_ready)
        await until(lambda: cluster.engine.is_ready)
        assert (await cluster.generate([1], temperature=0.0)).token_ids[0] == tokens
