"""How answers leave: JSON, server-sent events and errors, and how a closed connection ends the work at once."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.types import Receive, Send

from kvrelay.coordinator.http_errors import HttpError, error_of_event

_JSON = [(b"content-type", b"application/json")]
_SSE = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_DONE = b"data: [DONE]\n\n"


class Reply:
    """The one answer to a request. `has_begun` tells whether its status has left."""

    def __init__(
        self,
        send: Send,
        request_id: str,
        *,
        retry_after_s: int,
        more_headers: Callable[[], list[tuple[bytes, bytes]]] = list,
    ) -> None:
        """`more_headers` are asked for when the status leaves."""
        self._send = send
        self._request_id = request_id
        self._more_headers = more_headers
        self._retry_after_s = retry_after_s
        self.has_begun = False

    async def json(self, content: Any, status: int = 200) -> None:
        """Send what msgspec can encode; bytes count as encoded."""
        body = content if isinstance(content, bytes) else msgspec.json.encode(content)
        await self._begin(status, [*_JSON, (b"content-length", b"%d" % len(body))])
        await self._send({"type": "http.response.body", "body": body})

    async def text(self, body: bytes, content_type: str) -> None:
        """Send something else than JSON."""
        await self._begin(200, [(b"content-type", content_type.encode()), (b"content-length", b"%d" % len(body))])
        await self._send({"type": "http.response.body", "body": body})

    async def error(self, error: HttpError) -> None:
        """Send an error object; in the middle of a stream as its last event but [DONE]."""
        body = msgspec.json.encode(error.body())
        if self.has_begun:
            await self._send({"type": "http.response.body", "body": b"data: " + body + b"\n\n" + _DONE})
            return
        headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
        if error.is_retried:
            retry_after_s = self._retry_after_s if error.retry_after_s is None else math.ceil(error.retry_after_s)
            headers.append((b"retry-after", b"%d" % max(1, retry_after_s)))
        await self._begin(error.status, [*_JSON, (b"content-length", b"%d" % len(body)), *headers])
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, events: AsyncGenerator[str, None]) -> None:
        """Send a stream of vLLM's events; closes it, whatever happens.

        The status waits for the first event, so that a request which fails at once gets its own status.
        Raises `HttpError` for an event that tells a failure.
        """
        async with aclosing(events):
            async for event in events:
                if error := error_of_event(event, self._request_id):
                    raise error
                if not self.has_begun:
                    await self.begin_events()
                await self._send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await self.end_events()

    async def begin_events(self) -> None:
        """Send the status of a stream, whose events may go another way then."""
        await self._begin(200, _SSE)

    async def end_events(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.has_begun = True
        request_id = (b"x-request-id", self._request_id.encode())
        all_headers = [*headers, request_id, *self._more_headers()]
        await self._send({"type": "http.response.start", "status": status, "headers": all_headers})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, and cancel it when the client closes the connection; returns when it has ended.

    The body must have been read: what else the client sends is dropped. Raises what `work` raises.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
        await asyncio.wait((working, watching))
    if not working.cancelled():
        working.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
