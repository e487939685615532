"""Options become the right fields, and wrong ones say which they are."""

import json
from typing import Any

import pytest

from kvrelay.client import Chunk, InvalidRequestError, Message, Timeline, Usage
from kvrelay.client.encoding import generate_request, to_chunk
from kvrelay.client.results import Collector
from kvrelay.v1 import common_pb2, inference_pb2


def encode(prompt: Any, **options: Any) -> inference_pb2.GenerateRequest:
    return generate_request(prompt, options)  # type: ignore[arg-type]


def test_the_three_forms_of_a_prompt() -> None:
    assert encode("hi").text == "hi"
    assert list(encode([1, 2]).token_ids.ids) == [1, 2]
    assert encode([]).WhichOneof("prompt") == "token_ids"
    chat = [inference_pb2.ChatMessage(role="user", content="hi")]
    assert list(encode([{"role": "user", "content": "hi"}]).chat.messages) == chat
    assert list(encode([Message("user", "hi")]).chat.messages) == chat


def test_options_go_where_they_belong_and_absent_ones_stay_absent() -> None:
    request = encode(
        "hi",
        model="m",
        priority=-1,
        temperature=0.5,
        stop="\n",
        stop_token_ids=[7],
        logit_bias={3: -1.5},
        timeout_s=1.0,
    )
    assert (request.model, request.priority) == ("m", -1)
    expected = common_pb2.SamplingParams(temperature=0.5, stop=["\n"], stop_token_ids=[7], logit_bias={3: -1.5})
    assert request.sampling == expected
    assert not encode("hi").HasField("sampling")
    assert encode("hi", seed=None) == encode("hi")


def test_class_tenant_and_targets() -> None:
    request = encode("hi", request_class="batch", tenant="t", ttft_s=2.0)
    assert (request.request_class, request.tenant) == ("batch", "t")
    assert request.targets == inference_pb2.Targets(ttft_s=2.0)
    assert not encode("hi").HasField("targets")
    with pytest.raises(InvalidRequestError, match=r"^itl_s"):
        encode("hi", itl_s="fast")


def test_an_output_constraint() -> None:
    schema = {"type": "object"}
    assert json.loads(encode("a", json_schema=schema).sampling.structured_output.json_schema) == schema
    assert list(encode("a", choice=["x", "y"]).sampling.structured_output.choice.values) == ["x", "y"]
    with pytest.raises(InvalidRequestError, match="regex: only one of"):
        encode("a", json_object=True, regex="a+")


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("a", {"temperature": "hot"}, "temperature"),
        ("a", {"max_tokens": -1}, "max_tokens"),
        ("a", {"stop_token_ids": 5}, "stop_token_ids"),
        ("a", {"logit_bias": {"x": 1.0}}, "logit_bias"),
        ([1, -2], {}, "prompt"),
        ([{"role": "user"}], {}, r"messages\[0\]\.content"),
        ([{"role": "user", "content": "hi"}, {"role": 1, "content": "x"}], {}, r"messages\[1\]\.role"),
    ],
)
def test_a_wrong_value_names_its_field(prompt: Any, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field}"):
        encode(prompt, **options)


def test_an_unknown_option_is_a_mistake_of_the_program() -> None:
    with pytest.raises(TypeError, match="'tmperature' is not an option"):
        encode("a", tmperature=1.0)


def test_a_response_becomes_a_chunk() -> None:
    sampled = inference_pb2.TokenLogprob(token_id=4, token="a", logprob=-0.5, rank=1)
    response = inference_pb2.GenerateResponse(
        request_id="r",
        index=1,
        text="a",
        token_ids=[4],
        logprobs=[inference_pb2.TokenLogprobs(sampled=sampled, top=[sampled])],
        prompt_logprobs=[inference_pb2.TokenLogprobs(sampled=sampled)],
        finish_reason=common_pb2.FINISH_REASON_LENGTH,
        timeline=common_pb2.Timeline(
            events=[common_pb2.Timeline.Event(name="x", unix_ns=9)], counters={"kv.pushed_bytes": 3}
        ),
    )
    chunk = to_chunk(response)
    assert (chunk.index, chunk.text, chunk.token_ids, chunk.finish_reason) == (1, "a", (4,), "length")
    assert chunk.logprobs[0].sampled == chunk.logprobs[0].top[0]
    assert chunk.prompt_logprobs[0].top == ()
    assert chunk.timeline is not None
    assert (chunk.timeline.events, chunk.timeline.counters) == ((("x", 9),), {"kv.pushed_bytes": 3})
    assert (chunk.stop_reason, chunk.usage) == (None, None)


def test_chunks_of_several_completions_are_put_together() -> None:
    collector = Collector()
    timeline = Timeline(events=(), counters={"a": 1})
    for chunk in (
        Chunk(request_id="r", index=1, text="b", token_ids=(2,)),
        Chunk(request_id="r", index=0, text="a", token_ids=(1,), finish_reason="length"),
        Chunk(request_id="r", index=1, text="c", token_ids=(3,), finish_reason="stop", stop_reason="x"),
        Chunk(request_id="r", usage=Usage(prompt_tokens=1, completion_tokens=3), timeline=timeline),
    ):
        collector.add(chunk)
    whole = collector.result()
    assert [completion.text for completion in whole.completions] == ["a", "bc"]
    assert (whole.text, whole.token_ids, whole.finish_reason) == ("a", (1,), "length")
    assert whole.completions[1].stop_reason == "x"
    assert whole.timeline == timeline
    assert whole.usage == Usage(prompt_tokens=1, completion_tokens=3)


def test_a_call_without_chunks_is_an_empty_text() -> None:
    assert Collector().result().text == ""
