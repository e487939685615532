"""How do the tokens of one completion become events on a connection?"""

from __future__ import annotations

import asyncio

from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from kvrelay.coordinator.http_body import ClientGoneError
from kvrelay.coordinator.http_connection import Connection
from kvrelay.coordinator.plain_streams.events import Events, Usage
from kvrelay.coordinator.token_outputs import FINISH_REASONS
from kvrelay.errors import GenerationFailedError
from kvrelay.v1 import common_pb2, worker_pb2

_STOP, _ERROR = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_ERROR


class PlainStream:
    """Writes an event for what comes in one step, at once. Takes the tokens, and listens to the connection.

    Holds back what comes before `open`, and while the client does not read: that becomes one event then.
    """

    def __init__(
        self,
        connection: Connection,
        events: Events,
        detokenizer: IncrementalDetokenizer,
        *,
        num_prompt_tokens: int,
        tells_usage: bool,
    ) -> None:
        self._connection = connection
        self._events = events
        self._detokenizer = detokenizer
        self._num_prompt_tokens = num_prompt_tokens
        self._tells_usage = tells_usage
        self._num_cached_tokens: int | None = None
        self._is_open = False
        self._lead = b""
        """Goes before the next event."""
        self._text = ""
        self._has_more = False
        self._finish_reason = ""
        self._stop_reason: int | str | None = None
        loop = asyncio.get_running_loop()
        self.began: asyncio.Future[None] = loop.create_future()
        """Done when there is something to send; fails with a `KvrelayError` or `ClientGoneError`."""
        self.ended: asyncio.Future[None] = loop.create_future()
        """Done when everything was sent; fails like `began`, after that."""

    def open(self) -> None:
        """The response has begun."""
        self._is_open = True
        self._lead = self._events.first()
        self._send()

    def take(self, delta: worker_pb2.TokenDelta) -> bool:
        """See `TokenReceiver.take`."""
        if delta.finish_reason == _ERROR:
            self.fail(GenerationFailedError("the engine failed"))
            return True
        # Later the decode worker tells what it had, the prefill worker's blocks included.
        if self._num_cached_tokens is None and delta.HasField("num_cached_tokens"):
            self._num_cached_tokens = delta.num_cached_tokens
        stop_string = self._detokenizer.update(list(delta.token_ids), delta.finish_reason == _STOP)
        if stop_string:
            self._finish_reason, self._stop_reason = str(FINISH_REASONS[_STOP]), stop_string
        elif delta.finish_reason:
            self._finish_reason = str(FINISH_REASONS[delta.finish_reason])
            self._stop_reason = delta.stop_token_id if delta.HasField("stop_token_id") else None
        self._text += self._detokenizer.get_next_output_text(finished=bool(self._finish_reason), delta=True)
        self._has_more = True
        if self._is_open:
            self._send()
        elif not self.began.done():
            self.began.set_result(None)
        return stop_string is not None

    def fail(self, error: Exception) -> None:
        """See `TokenReceiver.fail`."""
        if not self.began.done():
            self.began.set_exception(error)
        elif self.began.exception() is None and not self.ended.done():
            self.ended.set_exception(error)

    def on_writable(self) -> None:
        """See `StreamListener`."""
        if self._is_open:
            self._send()

    def on_gone(self) -> None:
        """See `StreamListener`."""
        self.fail(ClientGoneError())

    def _send(self) -> None:
        """What there is, as one event; the end is sent even to a client that does not read, for it is the last."""
        if self.ended.done() or not self._has_more:
            return
        if self._finish_reason:
            usage = self._usage() if self._tells_usage else None
            event = self._events.last(self._text, self._finish_reason, self._stop_reason, usage)
            self.ended.set_result(None)
        elif self._connection.is_writable:
            event = self._events.next(self._text)
        else:
            return
        self._connection.write(self._lead + event)
        self._lead, self._text, self._has_more = b"", "", False

    def _usage(self) -> Usage:
        return Usage(
            num_prompt_tokens=self._num_prompt_tokens,
            num_tokens=self._detokenizer.num_output_tokens(),
            num_cached_tokens=self._num_cached_tokens or 0,
        )
