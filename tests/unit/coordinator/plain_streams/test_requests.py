"""Which requests count as plain."""

from __future__ import annotations

from typing import Any

import pytest

from kvrelay.coordinator.plain_streams.requests import is_plain

CHAT: dict[str, Any] = {"stream": True, "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"stream": True, "prompt": "Hi"}


@pytest.mark.parametrize(
    "body",
    [
        CHAT,
        TEXT,
        {**TEXT, "prompt": [1, 2]},
        {**CHAT, "max_tokens": 5, "temperature": 0.5, "stop": ["x"], "stream_options": {"include_usage": True}},
        {**CHAT, "messages": []},
        {**TEXT, "temperature": "hot"},  # wrong, but to be found out by the checks
    ],
)
def test_a_stream_of_one_completion_is_plain(body: Any) -> None:
    assert is_plain(body)


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {**CHAT, "stream": False},
        {**CHAT, "stream": 1},
        {"messages": CHAT["messages"]},
        {**CHAT, "n": 1},
        {**CHAT, "logprobs": True},
        {**CHAT, "tools": []},
        {**CHAT, "response_format": {"type": "json_object"}},
        {**CHAT, "stream_options": {"continuous_usage_stats": True}},
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
        {**CHAT, "messages": [{"role": "tool", "content": "Hi"}]},
        {**CHAT, "messages": [{"role": "user", "content": "Hi", "name": "Eve"}]},
        {**CHAT, "messages": "Hi"},
        {**TEXT, "prompt": ["Hi", "there"]},
        {**TEXT, "prompt": [[1], [2]]},
        {**TEXT, "prompt": []},
        {**TEXT, "prompt": None},
        {**TEXT, "echo": True},
        {**TEXT, "return_token_ids": True},
    ],
)
def test_anything_more_is_not(body: Any) -> None:
    assert not is_plain(body)
