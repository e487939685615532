"""The OpenAI API as the `openai` package sees it, over scripted workers: answers, streams, parameters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest

from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.http_parameters import CHAT as CHAT_PARAMETERS
from kvrelay.coordinator.http_parameters import COMPLETION as COMPLETION_PARAMETERS
from kvrelay.coordinator.http_parameters import WITHOUT_EFFECT
from kvrelay.coordinator.http_serving import ServingOptions
from kvrelay.tracing import configure_tracing
from kvrelay.v1 import common_pb2
from tests.support.fake_worker import MODEL, delta
from tests.support.gateway import GatewayUnderTest, gateway
from tests.support.otlp_receiver import otlp_receiver

EOS = 2
TEXT = "Paris is the capital of France."
MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def script(front_end: FrontEnd, text: str = TEXT) -> list[int]:
    """The tokens of a text and the end of the answer."""
    return [*front_end.renderer.get_tokenizer().encode(text, add_special_tokens=False), EOS]


@pytest.fixture
async def served(front_end: FrontEnd) -> AsyncIterator[GatewayUnderTest]:
    async with gateway(front_end, script(front_end)) as under_test:
        yield under_test
        under_test.cluster.assert_idle()


async def test_a_chat(served: GatewayUnderTest) -> None:
    answer = await served.openai.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(script_of(served))
    prompt = (await served.cluster.prefill.wait_for("prefill"))[0].prompt_token_ids
    assert answer.usage.prompt_tokens == len(prompt)


def script_of(served: GatewayUnderTest) -> list[int]:
    tokenizer = served.cluster.engine.renderer.get_tokenizer()
    return [*tokenizer.encode(TEXT, add_special_tokens=False), EOS]


async def test_a_streamed_chat_with_usage(served: GatewayUnderTest) -> None:
    stream = await served.openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(script_of(served))
    assert len(chunks) > 5


async def test_the_synchronous_client_gets_the_same(served: GatewayUnderTest) -> None:
    def talk() -> tuple[str | None, str, str]:
        with openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model=MODEL, messages=MESSAGES).choices[0].message.content
            streamed = "".join(
                chunk.choices[0].delta.content or ""
                for chunk in client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
            )
            completed = client.completions.create(model=MODEL, prompt="The capital", max_tokens=50).choices[0].text
            return whole, streamed, completed

    assert await asyncio.to_thread(talk) == (TEXT, TEXT, TEXT)


async def test_a_completion_streamed_and_whole(served: GatewayUnderTest) -> None:
    whole = await served.openai.completions.create(model=MODEL, prompt="The capital of", max_tokens=50)
    assert whole.choices[0].text == TEXT
    stream = await served.openai.completions.create(model=MODEL, prompt="The capital of", max_tokens=50, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT


async def test_several_prompts_and_token_ids(served: GatewayUnderTest) -> None:
    prompts: list[list[int]] = [[504, 253], [504, 253, 7, 8, 9, 10]]
    answer = await served.openai.completions.create(model=MODEL, prompt=prompts, max_tokens=3, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    seen = {tuple(request.prompt_token_ids) for request in served.cluster.decode.messages("decode")}
    assert tuple(prompts[0]) in seen
    one = await served.openai.completions.create(model=MODEL, prompt=prompts[1], max_tokens=3)
    assert one.usage is not None
    assert one.usage.prompt_tokens == 6
    text = await served.openai.completions.create(model=MODEL, prompt=["One", "Two"], max_tokens=3)
    assert len(text.choices) == 2


async def test_several_choices_of_a_chat(served: GatewayUnderTest) -> None:
    answer = await served.openai.chat.completions.create(model=MODEL, messages=MESSAGES, n=3)
    assert [choice.message.content for choice in answer.choices] == [TEXT] * 3
    stream = await served.openai.chat.completions.create(model=MODEL, messages=MESSAGES, n=3, stream=True)
    texts = {0: "", 1: "", 2: ""}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert set(texts.values()) == {TEXT}


async def test_stop_strings_end_the_answer_before_them(served: GatewayUnderTest) -> None:
    create = served.openai.chat.completions.create
    answer = await create(model=MODEL, messages=MESSAGES, stop=[" capital"])
    assert answer.choices[0].message.content == "Paris is the"
    assert answer.choices[0].finish_reason == "stop"
    kept = await create(
        model=MODEL, messages=MESSAGES, stop=" capital", extra_body={"include_stop_str_in_output": True}
    )
    assert kept.choices[0].message.content == "Paris is the capital"
    stream = await create(model=MODEL, messages=MESSAGES, stop=[" capital"], stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Paris is the"


async def test_special_tokens_are_skipped_unless_asked_for(front_end: FrontEnd) -> None:
    async with gateway(front_end, [1, 504, EOS]) as served:
        body = {"prompt": [5], "max_tokens": 3}
        assert (await served.post("/v1/completions", body)).json()["choices"][0]["text"] == "The"
        shown = await served.post("/v1/completions", {**body, "skip_special_tokens": False})
        assert shown.json()["choices"][0]["text"].startswith("<|im_start|>The")


async def test_echo_and_token_ids_come_back(served: GatewayUnderTest) -> None:
    prompt = script_of(served)[:3]
    body = {"prompt": prompt, "max_tokens": 2, "echo": True, "return_token_ids": True}
    choice = (await served.post("/v1/completions", body)).json()["choices"][0]
    assert choice["prompt_token_ids"] == prompt
    assert choice["token_ids"] == script_of(served)[:2]
    echoed = (await served.post("/v1/completions", {"prompt": "Hello", "max_tokens": 2, "echo": True})).json()
    assert echoed["choices"][0]["text"] == "HelloParis is"


async def test_log_probabilities_of_both_routes(front_end: FrontEnd) -> None:
    async with gateway(front_end, with_prefill=False) as served, asyncio.TaskGroup() as tasks:
        logprobs = common_pb2.Logprobs(width=2, token_ids=[504, 30], logprobs=[-0.5, -1.5], sampled_ranks=[1])

        async def ask(path: str, body: dict[str, Any], count: int) -> dict[str, Any]:
            answer = tasks.create_task(served.post(path, body))
            request = (await served.cluster.decode.wait_for("decode", count))[-1]
            assert request.sampling.logprobs == 1
            finish = common_pb2.FINISH_REASON_LENGTH
            served.cluster.decode.send(delta(request.request_id, [504], finish, logprobs=logprobs))
            content: dict[str, Any] = (await answer).json()["choices"][0]["logprobs"]
            return content

        body: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 1, "logprobs": 1}
        completion = await ask("/v1/completions", body, 1)
        assert completion["token_logprobs"] == [-0.5]
        assert set(completion["top_logprobs"][0].values()) == {-0.5, -1.5}
        ids = await ask("/v1/completions", {**body, "return_tokens_as_token_ids": True}, 2)
        assert ids["tokens"] == ["token_id:504"]
        chat = {"messages": MESSAGES, "max_tokens": 1, "logprobs": True, "top_logprobs": 1}
        (token,) = (await ask("/v1/chat/completions", chat, 3))["content"]
        assert token["logprob"] == -0.5
        assert [top["logprob"] for top in token["top_logprobs"]] == [-0.5, -1.5][: len(token["top_logprobs"])]


async def test_models_version_and_health(served: GatewayUnderTest) -> None:
    models = [model async for model in served.openai.models.list()]
    assert [model.id for model in models] == [MODEL]
    assert (await served.openai.models.retrieve(MODEL)).id == MODEL
    assert (await served.http.get("/health")).json() == {"status": "ok"}
    assert (await served.http.get("/ready")).json() == {"status": "ready"}
    assert (await served.http.get("/version")).json()["version"]


async def test_tokenize_and_detokenize_invert_each_other(served: GatewayUnderTest) -> None:
    tokens = (await served.post("/tokenize", {"model": MODEL, "prompt": TEXT})).json()
    assert tokens["tokens"] == script_of(served)[:-1]
    assert tokens["count"] == len(tokens["tokens"])
    assert (await served.post("/detokenize", {"tokens": tokens["tokens"]})).json() == {"prompt": TEXT}
    named = (await served.post("/tokenize", {"prompt": TEXT, "return_token_strs": True})).json()
    assert len(named["token_strs"]) == tokens["count"]


async def test_tokenize_a_chat_gives_the_prompt_that_a_worker_gets(served: GatewayUnderTest) -> None:
    tokens = (await served.post("/tokenize", {"messages": MESSAGES})).json()["tokens"]
    await served.openai.chat.completions.create(model=MODEL, messages=MESSAGES)
    (request,) = await served.cluster.prefill.wait_for("prefill")
    assert list(request.prompt_token_ids) == tokens


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
Seen = Callable[[common_pb2.SamplingParams], Any]

REACHES_A_WORKER: dict[str, tuple[Any, Seen, Any]] = {
    "temperature": (0.7, lambda seen: seen.temperature, 0.7),
    "top_p": (0.9, lambda seen: seen.top_p, 0.9),
    "top_k": (12, lambda seen: seen.top_k, 12),
    "min_p": (0.1, lambda seen: seen.min_p, 0.1),
    "seed": (-5, lambda seen: seen.seed, -5),
    "presence_penalty": (0.5, lambda seen: seen.presence_penalty, 0.5),
    "frequency_penalty": (-0.5, lambda seen: seen.frequency_penalty, -0.5),
    "repetition_penalty": (1.1, lambda seen: seen.repetition_penalty, 1.1),
    "max_tokens": (7, lambda seen: seen.max_tokens, 7),
    "min_tokens": (3, lambda seen: seen.min_tokens, 3),
    "ignore_eos": (True, lambda seen: (seen.ignore_eos, seen.HasField("eos_token_id")), (True, False)),
    "stop_token_ids": ([7, 9], lambda seen: sorted(seen.stop_token_ids), [7, 9]),
    "logit_bias": ({"5": -1.5, "7": 100}, lambda seen: dict(seen.logit_bias), {5: -1.5, 7: 100.0}),
    "allowed_token_ids": ([3, 504], lambda seen: list(seen.allowed_token_ids), [3, 504]),
    "bad_words": (["Paris"], lambda seen: len(seen.bad_words_token_ids) > 0, True),
    "prompt_logprobs": (2, lambda seen: seen.prompt_logprobs, 2),
    "response_format": (
        {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}},
        lambda seen: json.loads(seen.structured_output.json_schema),
        SCHEMA,
    ),
    "structured_outputs": ({"regex": "a+"}, lambda seen: seen.structured_output.regex, "a+"),
}
COMPLETION_REACHES: dict[str, tuple[Any, Seen, Any]] = {"logprobs": (3, lambda seen: seen.logprobs, 3)}
CHAT_REACHES: dict[str, tuple[Any, Seen, Any]] = {
    "max_completion_tokens": (9, lambda seen: seen.max_tokens, 9),
    "logprobs": (True, lambda seen: seen.HasField("logprobs"), True),
}
SHOWN_ELSEWHERE = frozenset(
    {
        "model",
        "prompt",
        "messages",
        "n",
        "stream",
        "stream_options",
        "stop",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "echo",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "top_logprobs",
        "priority",
        "cache_salt",
        "add_special_tokens",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template_kwargs",
        "documents",
        "reasoning_effort",
        "include_reasoning",
    }
)
"""Their effect is on the prompt, the text or the form of the answer."""
TAKEN_WITHOUT_EFFECT = frozenset({"user", "spaces_between_special_tokens"})
"""Of interest to OpenAI's bookkeeping, or to tokenizers other than the fast ones."""


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_every_sampling_parameter_reaches_a_worker(front_end: FrontEnd, path: str) -> None:
    is_chat = "chat" in path
    content: dict[str, Any] = {"messages": MESSAGES} if is_chat else {"prompt": "What is the capital?"}
    cases = REACHES_A_WORKER | (CHAT_REACHES if is_chat else COMPLETION_REACHES)
    async with gateway(front_end, script(front_end), with_prefill=False) as served:
        for count, (name, (value, seen, expected)) in enumerate(cases.items(), start=1):
            response = await served.post(path, {**content, name: value})
            assert seen(await served.decode_sampling(count)) == expected, name
            # Scripted workers have no log probabilities to give.
            assert response.status_code == 200 or "logprobs" in name, (name, response.text)


@pytest.mark.parametrize(
    ("table", "own"),
    [(CHAT_PARAMETERS, CHAT_REACHES), (COMPLETION_PARAMETERS, COMPLETION_REACHES)],
    ids=["chat", "completion"],
)
def test_no_parameter_is_offered_without_a_test(table: dict[str, Any], own: dict[str, Any]) -> None:
    shown = set(REACHES_A_WORKER) | set(own) | SHOWN_ELSEWHERE | TAKEN_WITHOUT_EFFECT
    assert set(table) <= shown, set(table) - shown


async def test_parameters_without_effect_are_taken(served: GatewayUnderTest) -> None:
    body = {"messages": MESSAGES, **dict.fromkeys(WITHOUT_EFFECT, "x"), "user": "me", "temperature": None}
    assert (await served.post("/v1/chat/completions", body)).status_code == 200


async def test_the_template_takes_its_options(served: GatewayUnderTest) -> None:
    async def prompt(count: int, **fields: Any) -> list[int]:
        response = await served.post("/v1/chat/completions", {"messages": MESSAGES, **fields})
        assert response.status_code == 200, response.text
        return list((await served.cluster.prefill.wait_for("prefill", count))[-1].prompt_token_ids)

    plain = await prompt(1)
    without = await prompt(2, add_generation_prompt=False)
    assert plain[: len(without)] == without
    assert len(without) < len(plain)
    half: Any = [*MESSAGES, {"role": "assistant", "content": "The capital is"}]
    continued = await prompt(3, messages=half, add_generation_prompt=False, continue_final_message=True)
    assert continued[-1] != plain[-1]
    for count, fields in enumerate(
        [
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"documents": [{"title": "a", "text": "b"}]},
            {"reasoning_effort": "low"},
            {"include_reasoning": False},
            {"add_special_tokens": True},
        ],
        start=4,
    ):
        assert (await prompt(count, **fields))[-3:] == plain[-3:]


async def test_priority_and_cache_salt_ride_along(served: GatewayUnderTest) -> None:
    body = {"prompt": list(range(3, 20)), "max_tokens": 3, "cache_salt": "tenant", "seed": 1}
    assert (await served.post("/v1/completions", body)).status_code == 200
    (request,) = await served.cluster.prefill.wait_for("prefill")
    assert request.cache_salt == "tenant"


async def test_tools_come_out_of_the_parser(front_end: FrontEnd) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    options = ServingOptions(tool_parser="hermes")
    async with gateway(front_end, script(front_end, call), options=options) as served:
        create = served.openai.chat.completions.create
        answer = await create(model=MODEL, messages=MESSAGES, tools=[TOOL])
        assert answer.choices[0].finish_reason == "tool_calls"
        (made,) = answer.choices[0].message.tool_calls or []
        assert made.type == "function"
        assert (made.function.name, json.loads(made.function.arguments)) == ("weather", {"city": "Paris"})
        stream = await create(model=MODEL, messages=MESSAGES, tools=[TOOL], stream=True, parallel_tool_calls=False)
        arguments, names = "", []
        async for chunk in stream:
            for part in chunk.choices[0].delta.tool_calls or []:
                assert part.function is not None
                names += [part.function.name] if part.function.name else []
                arguments += part.function.arguments or ""
        assert (names, json.loads(arguments)) == (["weather"], {"city": "Paris"})
        none = await create(model=MODEL, messages=MESSAGES, tools=[TOOL], tool_choice="none")
        assert none.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_required_tool_constrains_the_output(front_end: FrontEnd, choice: Any) -> None:
    options = ServingOptions(tool_parser="hermes")
    async with gateway(front_end, script(front_end), with_prefill=False, options=options) as served:
        body = {"messages": MESSAGES, "tools": [TOOL], "tool_choice": choice}
        await served.post("/v1/chat/completions", body)
        assert (await served.decode_sampling()).HasField("structured_output")


async def test_reasoning_is_separated_from_the_answer(front_end: FrontEnd) -> None:
    tokens = script(front_end, "Here is my thought process: Easy. Here is my response: Paris")
    async with gateway(front_end, tokens, options=ServingOptions(reasoning_parser="granite")) as served:
        message = (await served.post("/v1/chat/completions", {"messages": MESSAGES})).json()["choices"][0]["message"]
        assert (message["reasoning"].strip(), message["content"].strip()) == ("Easy.", "Paris")


async def test_the_request_id_is_taken_and_returned(served: GatewayUnderTest) -> None:
    body = {"prompt": "Hello", "max_tokens": 2}
    given = await served.post("/v1/completions", body, **{"x-request-id": "order-66"})
    assert given.headers["x-request-id"] == "order-66"
    assert given.json()["id"] == "cmpl-order-66"
    for bad in ("", "x" * 129, "two words"):
        made = await served.post("/v1/completions", body, **{"x-request-id": bad})
        assert made.headers["x-request-id"] not in ("", bad)
    answer = await served.openai.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer._request_id is not None
    assert answer.id == f"chatcmpl-{answer._request_id}"


async def test_the_callers_trace_reaches_the_workers(front_end: FrontEnd) -> None:
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with otlp_receiver() as receiver:
        tracing = configure_tracing("coordinator", receiver.endpoint, set_global=False)
        try:
            async with gateway(front_end, script(front_end), tracing=tracing) as served:
                headers = {"traceparent": f"00-{trace_id}-{span_id}-01"}
                body = {"prompt": list(range(3, 20)), "max_tokens": 3, "stream": True}
                assert (await served.post("/v1/completions", body, **headers)).status_code == 200
                (request,) = await served.cluster.prefill.wait_for("prefill")
                assert trace_id in request.trace.traceparent
                malformed = await served.post("/v1/completions", body, traceparent="nonsense")
                assert malformed.status_code == 200
        finally:
            await asyncio.to_thread(tracing.shutdown)
        (root,) = [span for span in receiver.wait_for("gateway") if span.parent_id == span_id]
        assert (root.name, root.trace_id) == ("gateway", trace_id)


async def test_many_clients_at_once(served: GatewayUnderTest) -> None:
    async def ask(number: int) -> str | None:
        answer = await served.openai.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": f"Question {number}"}]
        )
        return answer.choices[0].message.content

    assert await asyncio.gather(*(ask(number) for number in range(100))) == [TEXT] * 100
