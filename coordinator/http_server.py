"""An ASGI application on a socket, inside our event loop and under our signal handling."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import uvicorn

from kvrelay.coordinator.connection_limits import ConnectionLimits
from kvrelay.coordinator.http_connection import StreamProtocol

BACKLOG = 2048
DEFAULT_LIMITS = ConnectionLimits()


class _Server(uvicorn.Server):
    """Tells when it listens, and leaves signals to the process."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Connections that wait to be accepted would be reset when the listeners are closed: take them before."""
        for listener in sockets or []:
            await self._take_waiting(listener)
        await super().shutdown(sockets)

    async def _take_waiting(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(BACKLOG):
            try:
                connection, _address = listener.accept()
            except OSError:
                return
            connection.setblocking(False)
            await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=None
        )
        return protocol


class HttpServer:
    """A server that listens. Made by `http_server`."""

    def __init__(self, server: uvicorn.Server, port: int, own_port: int) -> None:
        self._server = server
        self.port = port
        self.own_port = own_port
        """At which no other process listens; `port` unless that is shared."""

    def begin_drain(self, drain_s: float) -> None:
        """Take no new connections from now on, let responses end for so long and cancel the rest; does not wait."""
        # uvicorn hands it to asyncio.wait_for, which takes fractions.
        self._server.config.timeout_graceful_shutdown = drain_s  # type: ignore[assignment]
        self._server.should_exit = True


@contextlib.asynccontextmanager
async def http_server(
    app: Any,
    listen: str,
    *,
    drain_s: float,
    shares_port: bool = False,
    limits: ConnectionLimits = DEFAULT_LIMITS,
) -> AsyncIterator[HttpServer]:
    """Serve inside this context. Leaving it drains for `drain_s`, or waits for a drain that has begun.

    With `shares_port` other processes may do the same at this port: the system gives each of them a part of the
    connections. Then a free port of the same host is served as well. Raises `OSError` when the address cannot be had.
    """
    with contextlib.ExitStack() as sockets:
        listeners = [sockets.enter_context(bind(listen, shares_port=shares_port))]
        if shares_port:
            listeners.append(sockets.enter_context(bind(with_free_port(listen))))
        config = uvicorn.Config(
            app,
            http=partial(StreamProtocol, limits=limits),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
        )
        server = _Server(config)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.serve(sockets=listeners), name="http server")
            await server.listening.wait()
            http = HttpServer(server, *(listeners[end].getsockname()[1] for end in (0, -1)))
            try:
                yield http
            finally:
                if not server.should_exit:
                    http.begin_drain(drain_s)


def split_address(address: str) -> tuple[str, int]:
    """`host:port`, the host of an IPv6 address in brackets. Raises `ValueError`."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"address {address!r} is not of the form host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def with_free_port(address: str) -> str:
    """The same host, and port 0."""
    return f"{address.rpartition(':')[0]}:0"


def bind(listen: str, *, shares_port: bool = False) -> socket.socket:
    """A socket at this address that does not listen yet. Raises `OSError`."""
    host, port = split_address(listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, for asyncio sets TCP_NODELAY only on sockets that name their protocol.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shares_port)
        listener.bind((host, port))
    except BaseException:
        listener.close()
        raise
    return listener
