"""How does a stream write to its connection the moment it has something, without a task that wakes for every piece?

ASGI sends from a coroutine. So uvicorn's protocol offers itself to the application as an extension of the scope: a
response that has begun, chunked as uvicorn begins those of unknown length, may be continued here, and is ended through
ASGI again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import structlog
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvrelay.coordinator.connection_limits import ConnectionLimits
from kvrelay.coordinator.http_errors import HttpError

_log = structlog.get_logger(__name__)

_EXTENSION = "kvrelay.connection"
IDLE_GRACE_S = 0.5
"""A request may be on its way over a connection that has none: to close it at once would reset it."""


_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
)


class StreamListener(Protocol):
    """Who streams on a connection. Called in the event loop; must not block."""

    def on_writable(self) -> None:
        """The client has read on."""

    def on_gone(self) -> None:
        """The connection is closed."""


class Connection(Protocol):
    """What a stream needs of the connection that it answers on."""

    @property
    def is_writable(self) -> bool:
        """Whether the client reads: false while more waits to be sent than the transport wants to hold."""

    def attach(self, listener: StreamListener | None) -> None:
        """Tell this one from now on, or nobody. A connection that is closed tells at once."""

    def write(self, body: bytes) -> None:
        """Send a piece of the body of a response that has begun; taken in any case, and dropped once it is closed."""


class StreamProtocol(HttpToolsProtocol):
    """uvicorn's, which implements `Connection` and does not wait for clients for ever."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._is_refused = False
        self._waiting: asyncio.TimerHandle | None = None
        """For headers."""
        self._stalling: asyncio.TimerHandle | None = None

    _listener: StreamListener | None = None
    _is_lost = False
    _drains = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse()
        else:
            self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            super().data_received(data)

    def _refuse(self) -> None:
        self._is_refused = True
        most = self._limits.max_connections
        _log.warning("connection refused", max_connections=most)
        error = HttpError(status=503, message=f"{most} connections are open, and no more are taken; try again later")
        body = msgspec.json.encode(error.body())
        self.transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (_REFUSAL, len(body), body))
        self.transport.close()

    def _wait_for_headers(self) -> None:
        if self._waiting is None:
            self._waiting = self._after(self._limits.header_timeout_s, self._close_if_idle)

    def _after(self, seconds: float, act: Callable[[], None]) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, act)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait_for_headers()
        self.scope["extensions"] = {_EXTENSION: self}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._end_wait()
        if self._drains and self.cycle is not None:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """Close once the response under way has ended, or after a grace without a request."""
        if not self._is_idle:
            super().shutdown()
            return
        self._drains = True
        self.loop.call_later(IDLE_GRACE_S, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self._is_idle:
            self.transport.close()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _end_wait(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_wait()
        self._end_stall()
        self._is_lost = True
        self.attach(self._listener)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalling = self._after(self._limits.stall_timeout_s, self._stalled)

    def _stalled(self) -> None:
        _log.warning("a client does not read", client=self.client, seconds=self._limits.stall_timeout_s)
        self.transport.abort()

    def _end_stall(self) -> None:
        if self._stalling is not None:
            self._stalling.cancel()
            self._stalling = None

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_stall()
        if self._listener is not None and not self._is_lost:
            self._listener.on_writable()

    @property
    def is_writable(self) -> bool:
        return not self.flow.write_paused

    def attach(self, listener: StreamListener | None) -> None:
        self._listener = listener
        if listener is not None and self._is_lost:
            listener.on_gone()

    def write(self, body: bytes) -> None:
        if not self._is_lost:
            self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))


def connection_of(scope: Scope) -> Connection | None:
    """None where the application runs under another server."""
    connection: Connection | None = scope.get("extensions", {}).get(_EXTENSION)
    return connection
