"""How does one HTTP/1.1 connection carry a request and its answer, at little cost per piece of a stream?

A protocol without streams, tasks or queues: pieces of the body go to a callback from where the loop reads the socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import cast

import httptools

_KEPT_BODY_BYTES = 1 << 20
_HEADERS_MOST_BYTES = 1 << 18

OnBody = Callable[[bytes], None]


class HttpProtocolError(ConnectionError):
    """The answer is no HTTP, or it ended before it was complete."""


class StaleConnectionError(HttpProtocolError):
    """The connection was closed before the first byte of an answer."""


@dataclass(slots=True)
class Answer:
    """Header names are in lower case."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    """At most 1 MiB of it; empty where the body went to a callback."""


class HttpConnection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Answer] | None = None
        self._on_body: OnBody | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._answer = Answer()
        self._num_received_bytes = 0
        self._has_headers = False

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, on_body: OnBody | None = None) -> Answer:
        """Send a whole request, and return when its answer is complete.

        The body of an answer with status 200 goes to `on_body` as it comes; what that raises ends the exchange. Raises
        `HttpProtocolError`, and `StaleConnectionError` when nothing came. After an error or a cancellation the
        connection is closed, which tells the server.
        """
        if self._transport is None or not self.is_open:
            raise StaleConnectionError("the connection is closed")
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._done = done
        self._answer, self._on_body = Answer(), on_body
        self._parser = httptools.HttpResponseParser(self)
        self._num_received_bytes, self._has_headers = 0, False
        self._transport.write(request)
        try:
            return await done
        except BaseException:
            self.close()
            raise
        finally:
            self._done = self._on_body = self._parser = None

    def close(self) -> None:
        """At once: what was not sent is dropped."""
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one without inheriting.

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._done is None or self._done.done():
            self.close()  # Nobody asked: whatever this is, it must not become the next answer.
            return
        self._num_received_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            # The parser wraps what a callback raised.
            self._fail(error.__context__ or HttpProtocolError(f"the answer is no HTTP/1.1: {error}"))
        if not self._has_headers and self._num_received_bytes > _HEADERS_MOST_BYTES:
            self._fail(HttpProtocolError(f"the headers of the answer are larger than {_HEADERS_MOST_BYTES} bytes"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._ends_with_connection():
            self.on_message_complete()
        # What has its answer cannot fail any more.
        if self._num_received_bytes:
            self._fail(HttpProtocolError("the connection ended in the middle of the answer"))
        else:
            self._fail(StaleConnectionError("the connection ended before there was an answer"))

    # What httptools calls.

    def on_message_begin(self) -> None:
        if self._done is None or self._done.done():
            raise HttpProtocolError("a second answer came to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self._has_headers = True
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._on_body is not None and self._answer.status == HTTPStatus.OK:
            self._on_body(body)
        elif len(self._answer.body) < _KEPT_BODY_BYTES:
            self._answer.body += body

    def on_message_complete(self) -> None:
        if self._answer.status < HTTPStatus.OK:  # Informational: the answer follows.
            self._answer, self._has_headers = Answer(), False
            return
        if self._parser is not None and not self._parser.should_keep_alive():
            self.close()
        if self._done is not None and not self._done.done():
            self._done.set_result(self._answer)

    def _ends_with_connection(self) -> bool:
        headers = self._answer.headers
        return self._has_headers and "content-length" not in headers and "transfer-encoding" not in headers

    def _fail(self, error: BaseException) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
        self.close()
