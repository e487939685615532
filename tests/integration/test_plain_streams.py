"""Plain streams are answered as vLLM's serving classes answer them, by a shorter way."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.http_routes import Routes
from kvrelay.v1 import common_pb2, worker_pb2
from tests.support.fake_cluster import until
from tests.support.fake_worker import MODEL, delta
from tests.support.gateway import GatewayUnderTest, gateway

EOS = 2
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT = 'Größe "东京" 👩‍👩‍👧 \\ end\n\tof it.'
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe?\n"}]
STREAM: dict[str, Any] = {"model": MODEL, "stream": True, "temperature": 0}
USAGE = {"stream_options": {"include_usage": True}}


def tokens_of(front_end: FrontEnd, text: str) -> list[int]:
    return [*front_end.renderer.get_tokenizer().encode(text, add_special_tokens=False), EOS]


@pytest.fixture
async def plain(front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[GatewayUnderTest]:
    """A gateway where nothing else than the short way leads to an answer."""

    async def unreachable(*_: Any) -> None:
        raise AssertionError("vLLM's serving classes were asked")

    async with gateway(front_end, tokens_of(front_end, TEXT)) as served:
        for name in ("chat", "completions"):
            monkeypatch.setattr(Routes, name, unreachable)
        yield served
        served.cluster.assert_idle()


def events_of(body: str) -> tuple[str, list[Any]]:
    """The whole text, and the events without it and without the time, equal ones in a row once.

    How tokens fall into events is a matter of time.
    """
    assert body.endswith("data: [DONE]\n\n")
    text, events = "", []
    for line in body.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]:
        event = json.loads(line.removeprefix("data: "))
        assert re.fullmatch(r"\d{10}", str(event["created"]))
        event["created"] = 0
        for choice in event["choices"]:
            place, name = (choice["delta"], "content") if "delta" in choice else (choice, "text")
            text += place[name]
            place[name] = ""
        if event not in events[-1:]:
            events.append(event)
    return text, events


def sent_prompts(served: GatewayUnderTest) -> list[Any]:
    """To the worker that gets a request first: that is the decode worker where the prompt is short."""
    return served.cluster.prefill.messages("prefill") or served.cluster.decode.messages("decode")


async def answer(served: GatewayUnderTest, path: str, body: dict[str, Any]) -> tuple[int, str, str]:
    response = await served.http.post(path, json=body, headers={"x-request-id": "the-id"})
    return response.status_code, response.headers["content-type"], response.text


BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": MESSAGES, "max_tokens": 100}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 100, **USAGE}),
    (CHAT, {"messages": MESSAGES, "max_completion_tokens": 3, **USAGE}),
    (CHAT, {"messages": MESSAGES, "stop": ["end"], **USAGE}),
    (CHAT, {"messages": MESSAGES, "stop": "东", "include_stop_str_in_output": True, **USAGE}),
    (CHAT, {"messages": MESSAGES, "skip_special_tokens": False}),
    (CHAT, {"messages": MESSAGES, "seed": 7, "top_p": 0.5, "temperature": 0.7, "presence_penalty": 0.1, **USAGE}),
    (COMPLETIONS, {"prompt": "Once upon", "max_tokens": 100, **USAGE}),
    (COMPLETIONS, {"prompt": "Once upon"}),
    (COMPLETIONS, {"prompt": [504, 253, 7], "max_tokens": 4, **USAGE}),
    (COMPLETIONS, {"prompt": "<|im_start|>user", "stop": ["\n", "zzz"], "max_tokens": 100}),
    (COMPLETIONS, {"prompt": "x", "cache_salt": "s", "priority": 3, "user": "u", "max_tokens": 2}),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": []}),
    (CHAT, {"messages": MESSAGES, "temperature": -1}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 100_000}),
    (CHAT, {"messages": MESSAGES, "model": "another"}),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 1000}]}),
    (COMPLETIONS, {"prompt": [504] * 600}),
    (COMPLETIONS, {"prompt": [10**9]}),
    (COMPLETIONS, {"prompt": "", "top_k": -7}),
    (COMPLETIONS, {"prompt": "x", "stop": ""}),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 0}),
]


def named(case: tuple[str, dict[str, Any]]) -> str:
    path, body = case
    return f"{path.rpartition('/')[2]}-{'-'.join(sorted(body))}-{len(str(body))}"


@pytest.mark.parametrize("case", BODIES, ids=named)
async def test_the_answer_is_that_of_vllms_classes(front_end: FrontEnd, case: tuple[str, dict[str, Any]]) -> None:
    path, body = case
    tokens = tokens_of(front_end, TEXT)
    answers, sampling = [], []
    for with_plain_streams in (True, False):
        async with gateway(front_end, tokens, with_plain_streams=with_plain_streams) as served:
            answers.append(await answer(served, path, {**STREAM, **body}))
            (sent,) = sent_prompts(served)
            sampling.append((list(sent.prompt_token_ids), sent.sampling, sent.cache_salt, sent.priority))
            served.cluster.assert_idle()
    (status, kind, text), ordinary = answers
    assert (status, kind) == ordinary[:2] == (200, "text/event-stream; charset=utf-8")
    assert events_of(text) == events_of(ordinary[2])
    assert sampling[0] == sampling[1]


@pytest.mark.parametrize("case", REFUSED, ids=named)
async def test_what_is_refused_is_refused_in_the_same_words(
    front_end: FrontEnd, case: tuple[str, dict[str, Any]]
) -> None:
    path, body = case
    answers = []
    for with_plain_streams in (True, False):
        async with gateway(front_end, [7, EOS], with_plain_streams=with_plain_streams) as served:
            answers.append(await answer(served, path, {**STREAM, **body}))
    assert answers[0] == answers[1]
    assert answers[0][0] >= 400


@pytest.mark.parametrize("case", BODIES, ids=named)
async def test_plain_requests_take_the_short_way(plain: GatewayUnderTest, case: tuple[str, dict[str, Any]]) -> None:
    path, body = case
    status, _, text = await answer(plain, path, {**STREAM, **body})
    assert status == 200
    assert events_of(text)[0]


async def test_prompts_too_long_for_the_event_loop_are_tokenized_the_same(
    front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvrelay.coordinator.plain_streams.prompts.MAX_TEXT_CHARS", 3)
    prompts = []
    for with_plain_streams in (True, False):
        async with gateway(front_end, [7, EOS], with_plain_streams=with_plain_streams) as served:
            for path, body in ((CHAT, {"messages": MESSAGES}), (COMPLETIONS, {"prompt": "Größe  东京"})):
                assert (await answer(served, path, {**STREAM, **body}))[0] == 200
            prompts.append([list(sent.prompt_token_ids) for sent in sent_prompts(served)])
    assert prompts[0] == prompts[1]


async def test_a_failure_before_the_first_token_has_its_own_status(front_end: FrontEnd) -> None:
    async with gateway(front_end, with_prefill=False) as served:
        asking = asyncio.create_task(answer(served, COMPLETIONS, {**STREAM, "prompt": [504]}))
        (decode,) = await served.cluster.decode.wait_for("decode")
        served.cluster.decode.send_failed(
            decode.request_id, worker_pb2.RequestFailed.REASON_UNAVAILABLE, "no room for it"
        )
        status, kind, text = await asking
        assert (status, kind) == (503, "application/json")
        assert "no room for it" in json.loads(text)["error"]["message"]
        served.cluster.assert_idle()


async def test_a_failure_after_the_first_token_is_an_event(front_end: FrontEnd) -> None:
    async with gateway(front_end, with_prefill=False) as served:
        asking = asyncio.create_task(answer(served, COMPLETIONS, {**STREAM, "prompt": [504]}))
        (decode,) = await served.cluster.decode.wait_for("decode")
        served.cluster.decode.send(delta(decode.request_id, [504]))
        served.cluster.decode.send_failed(decode.request_id, worker_pb2.RequestFailed.REASON_INTERNAL, "it broke")
        status, _, text = await asking
        assert status == 200
        events = [line for line in text.split("\n\n") if line]
        assert "it broke" in events[-2] or "inside the cluster" in events[-2]
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == 500
        assert events[-1] == "data: [DONE]"
        served.cluster.assert_idle()


async def test_an_engine_that_reports_an_error_fails_the_stream(front_end: FrontEnd) -> None:
    async with gateway(front_end, with_prefill=False) as served:
        asking = asyncio.create_task(answer(served, COMPLETIONS, {**STREAM, "prompt": [504]}))
        (decode,) = await served.cluster.decode.wait_for("decode")
        served.cluster.decode.send(delta(decode.request_id, [], common_pb2.FINISH_REASON_ERROR))
        assert (await asking)[0] == 500
        await until(lambda: served.cluster.engine.num_requests == 0)
        served.cluster.assert_idle()


async def test_two_requests_on_one_connection(plain: GatewayUnderTest) -> None:
    bodies: Sequence[dict[str, Any]] = [{**STREAM, "prompt": "a", "max_tokens": count} for count in (2, 5)]
    texts = [(await answer(plain, COMPLETIONS, body))[2] for body in bodies]
    assert TEXT.startswith(events_of(texts[0])[0])
    assert len(events_of(texts[0])[0]) < len(events_of(texts[1])[0])
