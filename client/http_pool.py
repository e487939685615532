"""How do many requests at a time share connections to one server?"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from kvrelay.client.http_connection import Answer, HttpConnection, OnBody, StaleConnectionError

_CONNECT_TIMEOUT_S = 10.0


class UnreachableServerError(ConnectionError):
    """Nobody listens at the address, or nobody answers there in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a server is: the part of a URL before the path of its API."""

    url: str
    authority: str
    """Host and port as the Host header has them."""
    host: str
    port: int
    path: str = ""
    is_tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Origin:
        """From `http://host:8000`; a path stays, but for a last /v1. Raises `ValueError`."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not the URL of a server; write http://HOST:PORT")
        is_tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        authority = parts.netloc.rpartition("@")[2]
        return cls(
            url=f"{parts.scheme}://{authority}{path}",
            authority=authority,
            host=parts.hostname,
            port=parts.port or (443 if is_tls else 80),
            path=path,
            is_tls=is_tls,
        )

    def request(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
        """The bytes of a request. `headers` must be checked by the caller: they go out as they are."""
        lines = [
            f"{method} {self.path}{path} HTTP/1.1",
            f"Host: {self.authority}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


class HttpPool:
    """As many connections to one origin as there are requests at a time, which is the caller's to bound.

    They are kept open between requests, and closed at the end of the pool's context.
    """

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self._idle: list[HttpConnection] = []
        self._tls = ssl.create_default_context() if origin.is_tls else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._idle:
            self._idle.pop().close()

    async def exchange(self, request: bytes, on_body: OnBody | None = None) -> Answer:
        """Like `HttpConnection.exchange`, on a free connection or a new one. Raises `UnreachableServerError`, too."""
        connection = self._take_idle()
        if connection is not None:
            # The server may close a connection that it finds idle at the very moment when a request comes.
            with suppress(StaleConnectionError):
                return await self._exchange(connection, request, on_body)
        return await self._exchange(await self._connect(), request, on_body)

    async def _exchange(self, connection: HttpConnection, request: bytes, on_body: OnBody | None) -> Answer:
        answer = await connection.exchange(request, on_body)
        if connection.is_open:
            self._idle.append(connection)
        return answer

    def _take_idle(self) -> HttpConnection | None:
        """The one that was used last: so those that a burst left over can be closed by the server."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> HttpConnection:
        origin = self.origin
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    HttpConnection, origin.host, origin.port, ssl=self._tls
                )
        except TimeoutError:
            raise UnreachableServerError(f"{origin.url} did not answer within {_CONNECT_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise UnreachableServerError(f"nobody answers at {origin.url}: {error.strerror or error}") from error
        return connection
