"""How a request of a trace looks on the wire."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvrelay.client.http_pool import Origin
from kvrelay.client.replay.endpoint import Endpoint
from kvrelay.workload.request_form import Api, PromptKind


def sent(endpoint: Endpoint) -> tuple[list[str], Any]:
    head, _, body = endpoint.request([1000, 1001, 1000], 7).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}" in head.decode()
    return head.decode().split("\r\n"), json.loads(body)


def endpoint(**fields: Any) -> Endpoint:
    return Endpoint(origin=Origin.parse("http://a:8000/api"), model="m", **fields)


def test_a_completion_has_the_token_ids_and_its_exact_length() -> None:
    head, body = sent(endpoint(headers={"x-kvrelay-tenant": "a"}))
    assert head[:2] == ["POST /api/v1/completions HTTP/1.1", "Host: a:8000"]
    assert "x-kvrelay-tenant: a" in head
    assert body == {
        "model": "m",
        "prompt": [1000, 1001, 1000],
        "max_tokens": 7,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_chat_has_a_word_per_token_and_no_parameter_that_is_vllms_own() -> None:
    head, body = sent(endpoint(api=Api.CHAT, prompt_kind=PromptKind.TEXT, ignore_eos=False))
    assert head[0] == "POST /api/v1/chat/completions HTTP/1.1"
    (message,) = body["messages"]
    first, second, third = message["content"].split()
    assert message["role"] == "user"
    assert first == third != second
    assert "ignore_eos" not in body


@pytest.mark.parametrize("kind", PromptKind)
def test_prompts_that_share_ids_share_their_beginning(kind: PromptKind) -> None:
    one, other = (
        json.loads(endpoint(prompt_kind=kind).request(ids, 1).partition(b"\r\n\r\n")[2])["prompt"]
        for ids in ([5, 6, 7, 8], [5, 6, 7, 9])
    )
    shared, length = (3, 4) if kind is PromptKind.TOKENS else (len(" ".join(one.split()[:3])), len(one))
    assert one[:shared] == other[:shared]
    assert one != other
    assert len(one) == length
