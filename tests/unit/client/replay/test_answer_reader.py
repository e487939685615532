"""Token times, usage and errors of a streamed answer."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from kvrelay.client.replay.answer_reader import AnswerReader, error_text


def event(**fields: Any) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


def text(text: str, finish_reason: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish_reason}])


def delta(finish_reason: str | None = None, **fields: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": finish_reason}])


def usage(num_tokens: int, num_cached_tokens: int | None = None) -> bytes:
    details = None if num_cached_tokens is None else {"cached_tokens": num_cached_tokens}
    counted = {"prompt_tokens": 9, "completion_tokens": num_tokens, "prompt_tokens_details": details}
    return event(choices=[], usage=counted)


def read(*pieces: bytes) -> AnswerReader:
    """Piece number n comes at second n, from 1."""
    seconds = itertools.count(1)
    reader = AnswerReader(lambda: float(next(seconds)))
    for piece in pieces:
        reader.on_body(piece)
    return reader


def test_each_event_of_a_completion_is_a_token_at_its_time() -> None:
    reader = read(text("a"), text("b"), text("c", "length"), usage(3, 8), b"data: [DONE]\n\n")
    assert list(reader.token_times_s()) == [1.0, 2.0, 3.0]
    assert reader.is_done
    assert reader.usage is not None
    assert (reader.usage.prompt_tokens, reader.usage.num_cached_tokens) == (9, 8)


def test_a_token_inside_of_a_character_counts_and_an_end_without_text_does_not() -> None:
    assert list(read(text(""), text("é"), text("", "stop")).token_times_s()) == [1.0, 2.0]


def test_the_first_and_the_last_event_of_a_chat_have_no_token() -> None:
    reader = read(delta(role="assistant", content=""), delta(content="a"), delta(reasoning_content="b"), delta("stop"))
    assert list(reader.token_times_s()) == [2.0, 3.0]


def test_token_ids_tell_how_many_tokens_an_event_has() -> None:
    choice = {"index": 0, "text": "abc", "token_ids": [1, 2, 3]}
    reader = read(event(choices=[choice]), event(choices=[{**choice, "token_ids": []}]))
    assert list(reader.token_times_s()) == [1.0] * 3
    assert reader.tokens_since(0) == [(1.0, 3)]
    assert reader.tokens_since(1) == []


def test_tokens_that_only_the_usage_knows_are_spread_over_the_events() -> None:
    reader = read(text("a b"), text("c d"), text("e"), usage(7))
    assert list(reader.token_times_s()) == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 3.0]


def test_events_in_one_piece_came_together() -> None:
    assert list(read(text("a") + text("b"), text("c")).token_times_s()) == [1.0, 1.0, 2.0]


def test_an_error_inside_of_the_stream_is_kept() -> None:
    reader = read(text("a"), event(error={"message": "worker lost", "type": "x", "code": 503}))
    assert reader.error is not None
    assert (reader.error.message, reader.error.code) == ("worker lost", 503)
    assert not reader.is_done


def test_an_event_that_is_no_json_is_an_error() -> None:
    with pytest.raises(msgspec.DecodeError):
        read(b"data: {oops\n\n")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "model unknown", "code": 404}}', "model unknown"),
        (b'{"error": "not allowed"}', "not allowed"),
        (b'{"object": "error", "message": "too long"}', "too long"),
        (b'{"detail": "Not Found"}', '"Not Found"'),
        (b"<html>\n<b>Bad Gateway</b>", "<html> <b>Bad Gateway</b>"),
        (b'{"other": 1}', '{"other": 1}'),
        (b"", ""),
        (b"\xff" * 600, "\N{REPLACEMENT CHARACTER}" * 500),
    ],
)
def test_what_an_error_body_says(body: bytes, said: str) -> None:
    assert error_text(body) == said
