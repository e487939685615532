"""How does a call reach one of etcd's endpoints?"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from kvrelay.etcd import rpc_pb2
from kvrelay.etcd.errors import EtcdAuthenticationError, EtcdError, EtcdUnavailableError, from_grpc

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)

_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 1.0
_AUTHENTICATE = "/etcdserverpb.Auth/Authenticate"

# The server refuses pings more often than every 5 s.
_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    # Of pings that measure the bandwidth: no keepalive is sent while such a one is under way.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1500),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdTls:
    """PEM bytes. The client's pair is for servers that ask for one."""

    ca_certificate: bytes | None = None
    client_certificate: bytes | None = None
    client_key: bytes | None = field(default=None, repr=False)
    server_name: str | None = None
    """Name to expect in the server's certificate, where it is not the endpoint's host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdConfig:
    """Where etcd is and how to speak to it."""

    endpoints: Sequence[str]
    """host:port each; any of them may be away."""
    tls: EtcdTls | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    timeout_s: float = 5.0
    """For one call with all of its attempts."""
    attempt_timeout_s: float = 1.5
    """An endpoint that is silent for this long is left for the next one."""


class Backoff:
    """Growing, jittered pauses between attempts."""

    def __init__(self) -> None:
        self._next_s = _FIRST_BACKOFF_S

    def reset(self) -> None:
        self._next_s = _FIRST_BACKOFF_S

    def next_s(self) -> float:
        """The next pause; the one after it is twice as long, up to a second."""
        pause_s = self._next_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        self._next_s = min(_MAX_BACKOFF_S, 2 * self._next_s)
        return pause_s


class Stream(Generic[RequestT, ResponseT]):
    """A bidirectional call. A broken one raises `EtcdUnavailableError` from either method."""

    def __init__(self, call: grpc.aio.StreamStreamCall[RequestT, ResponseT], response_type: type[ResponseT]) -> None:
        self._call = call
        self._response_type = response_type

    async def write(self, request: RequestT) -> None:
        try:
            await self._call.write(request)
        except grpc.aio.AioRpcError as error:
            raise from_grpc(error) from None
        except asyncio.InvalidStateError:
            raise await self._reason() from None

    async def read(self) -> ResponseT:
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise from_grpc(error) from None
        except asyncio.InvalidStateError:
            raise await self._reason() from None
        if isinstance(response, self._response_type):
            return response
        raise await self._reason()

    async def _reason(self) -> EtcdError:
        code = await self._call.code()
        if code is grpc.StatusCode.OK:
            return EtcdUnavailableError("etcd: the server closed the stream")
        metadata = grpc.aio.Metadata()
        return from_grpc(grpc.aio.AioRpcError(code, metadata, metadata, details=await self._call.details()))


class Transport:
    """Channels to all endpoints, one of them in use at a time. Belongs to the running event loop; `close` it."""

    def __init__(self, config: EtcdConfig) -> None:
        if not config.endpoints:
            raise ValueError("etcd needs at least one endpoint, host:port")
        self.config = config
        endpoints = list(config.endpoints)
        random.shuffle(endpoints)
        self._channels = [_open_channel(endpoint, config.tls) for endpoint in endpoints]
        self._current = 0
        self._token: str | None = None
        self._login_lock = asyncio.Lock()

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def unary(
        self, path: str, request: Message, response_type: type[ResponseT], *, idempotent: bool = True
    ) -> ResponseT:
        """Call a method; an idempotent one is tried again on other endpoints until the time is over.

        Raises `EtcdUnavailableError`, or another `EtcdError` that etcd answered with.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.timeout_s
        backoff = Backoff()
        while True:
            token, current = await self._ensure_token(path), self._current
            left_s = deadline - loop.time()
            timeout_s = min(self.config.attempt_timeout_s, left_s) if idempotent else left_s
            try:
                return await self._attempt(path, request, response_type, timeout_s=max(0.001, timeout_s))
            except EtcdAuthenticationError:
                if token is None:
                    raise
                await self._renew_token(token)
            except EtcdUnavailableError:
                self._leave_endpoint(current)
                pause_s = backoff.next_s()
                if not idempotent or loop.time() + pause_s > deadline:
                    raise
                await asyncio.sleep(pause_s)

    @asynccontextmanager
    async def stream(
        self, path: str, request_type: type[RequestT], response_type: type[ResponseT]
    ) -> AsyncIterator[Stream[RequestT, ResponseT]]:
        """Open a bidirectional call; leaving the context ends it.

        An `EtcdUnavailableError` or `TimeoutError` that passes through makes the next call use another endpoint.
        """
        token, current = await self._ensure_token(path), self._current
        method = self._channels[current].stream_stream(
            path, request_serializer=request_type.SerializeToString, response_deserializer=response_type.FromString
        )
        call = cast("grpc.aio.StreamStreamCall[RequestT, ResponseT]", method(metadata=self._metadata()))
        try:
            yield Stream(call, response_type)
        except (EtcdUnavailableError, TimeoutError):
            self._leave_endpoint(current)
            raise
        except EtcdAuthenticationError as error:
            if token is None:
                raise
            await self._renew_token(token)
            raise EtcdUnavailableError(str(error)) from None
        finally:
            call.cancel()

    async def _attempt(
        self, path: str, request: Message, response_type: type[ResponseT], *, timeout_s: float
    ) -> ResponseT:
        method = self._channels[self._current].unary_unary(
            path, request_serializer=type(request).SerializeToString, response_deserializer=response_type.FromString
        )
        try:
            return await method(request, metadata=self._metadata(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_grpc(error) from None

    def _leave_endpoint(self, failed: int) -> None:
        if self._current == failed:
            self._current = (failed + 1) % len(self._channels)

    def _metadata(self) -> grpc.aio.Metadata:
        metadata = grpc.aio.Metadata(("hasleader", "true"))
        if self._token is not None:
            metadata.add("token", self._token)
        return metadata

    async def _ensure_token(self, path: str) -> str | None:
        if self.config.user is not None and self._token is None and path != _AUTHENTICATE:
            await self._renew_token(None)
        return self._token

    async def _renew_token(self, refused: str | None) -> None:
        """Log in unless somebody else has since `refused` was in use."""
        async with self._login_lock:
            if self._token != refused:
                return
            self._token = None
            request = rpc_pb2.AuthenticateRequest(name=self.config.user or "", password=self.config.password or "")
            self._token = (await self.unary(_AUTHENTICATE, request, rpc_pb2.AuthenticateResponse)).token


def _open_channel(endpoint: str, tls: EtcdTls | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
    credentials = grpc.ssl_channel_credentials(tls.ca_certificate, tls.client_key, tls.client_certificate)
    names = [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []
    return grpc.aio.secure_channel(endpoint, credentials, options=[*_OPTIONS, *names])
