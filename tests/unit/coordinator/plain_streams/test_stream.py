"""What a plain stream writes, and when."""

from __future__ import annotations

import json
from typing import Any

import pytest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from kvrelay.coordinator.http_body import ClientGoneError
from kvrelay.coordinator.plain_streams.events import Events, chat_form
from kvrelay.coordinator.plain_streams.stream import PlainStream
from kvrelay.errors import GenerationFailedError, WorkerLostError
from kvrelay.v1 import common_pb2, worker_pb2


class Letters(IncrementalDetokenizer):
    """Token n is the n-th letter."""

    def __init__(self) -> None:
        super().__init__()
        self._num_told = 0

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        new = self.token_ids[self._num_told :]
        self._num_told = len(self.token_ids)
        return "".join(chr(ord("a") + token) for token in new)


class FakeConnection:
    def __init__(self) -> None:
        self.is_writable = True
        self.written: list[bytes] = []

    def attach(self, listener: Any) -> None: ...

    def write(self, body: bytes) -> None:
        assert body
        self.written.append(body)

    def texts(self) -> list[str]:
        """Of each write, its events' content."""
        return ["".join(_content(event) for event in body.decode().split("\n\n")[:-1]) for body in self.written]


def _content(event: str) -> str:
    data = event.removeprefix("data: ")
    if data == "[DONE]":
        return "."
    decoded = json.loads(data)
    return "".join(choice["delta"]["content"] for choice in decoded["choices"])


def tokens(*token_ids: int, finish: Any = common_pb2.FINISH_REASON_UNSPECIFIED) -> worker_pb2.TokenDelta:
    return worker_pb2.TokenDelta(request_id="r", token_ids=token_ids, finish_reason=finish)


@pytest.fixture
def connection() -> FakeConnection:
    return FakeConnection()


@pytest.fixture
async def stream(connection: FakeConnection) -> PlainStream:
    events = Events(chat_form("m", None), "chatcmpl-1")
    return PlainStream(connection, events, Letters(), num_prompt_tokens=5, tells_usage=False)


async def test_every_step_is_written_when_it_comes(stream: PlainStream, connection: FakeConnection) -> None:
    stream.take(tokens(0))
    assert stream.began.done()
    assert not connection.written  # the status has to leave first
    stream.open()
    stream.take(tokens(1, 2))
    stream.take(tokens(3, finish=common_pb2.FINISH_REASON_LENGTH))
    assert connection.texts() == ["a", "bc", "d."]
    assert stream.ended.done()


async def test_what_comes_while_the_client_does_not_read_is_one_event(
    stream: PlainStream, connection: FakeConnection
) -> None:
    stream.take(tokens(0))
    stream.open()
    connection.is_writable = False
    for token in (1, 2, 3):
        stream.take(tokens(token))
    assert connection.texts() == ["a"]
    connection.is_writable = True
    stream.on_writable()
    stream.on_writable()
    assert connection.texts() == ["a", "bcd"]


async def test_the_end_does_not_wait_for_the_client(stream: PlainStream, connection: FakeConnection) -> None:
    stream.take(tokens(0))
    stream.open()
    connection.is_writable = False
    stream.take(tokens(1))
    stream.take(tokens(2, finish=common_pb2.FINISH_REASON_STOP))
    assert connection.texts() == ["a", "bc."]
    assert stream.ended.done()
    stream.on_writable()
    assert len(connection.written) == 2


async def test_an_answer_of_one_step(stream: PlainStream, connection: FakeConnection) -> None:
    stream.take(tokens(0, finish=common_pb2.FINISH_REASON_STOP))
    stream.open()
    assert connection.texts() == ["a."]
    assert stream.ended.done()


async def test_a_failure_is_told_once_and_where_it_is_waited_for(stream: PlainStream) -> None:
    stream.fail(WorkerLostError("gone"))
    stream.on_gone()
    with pytest.raises(WorkerLostError, match="gone"):
        await stream.began
    assert not stream.ended.done()


async def test_a_failure_after_the_first_token_ends_the_stream(stream: PlainStream, connection: FakeConnection) -> None:
    stream.take(tokens(0))
    stream.open()
    assert stream.take(tokens(finish=common_pb2.FINISH_REASON_ERROR))
    with pytest.raises(GenerationFailedError):
        await stream.ended
    assert connection.texts() == ["a"]


async def test_a_client_that_goes_is_noticed(stream: PlainStream) -> None:
    stream.take(tokens(0))
    stream.on_gone()
    stream.open()
    with pytest.raises(ClientGoneError):
        await stream.ended


async def test_an_id_that_looks_like_a_place_is_only_an_id() -> None:
    events = Events(chat_form("m", None), "4999999999")
    event = json.loads(events.next("x").decode().removeprefix("data: "))
    assert event["id"] == "4999999999"
    assert 1_700_000_000 < event["created"] < 4_000_000_000
    last = events.last("%finish%", "stop", None, None).decode().split("\n\n")[0]
    choice = json.loads(last.removeprefix("data: "))["choices"][0]
    assert (choice["delta"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("%finish%", "stop", None)
