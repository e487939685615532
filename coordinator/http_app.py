"""The OpenAI HTTP API of a cluster, as a plain ASGI application."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable, Coroutine
from functools import partial
from http import HTTPStatus
from typing import Any

from google.protobuf.json_format import MessageToJson
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.engine.protocol import EngineClient

from kvrelay.coordinator.http_body import ClientGoneError, read_json
from kvrelay.coordinator.http_connection import Connection, connection_of
from kvrelay.coordinator.http_errors import HttpError, error_of, with_parameter
from kvrelay.coordinator.http_reply import Reply, until_disconnect
from kvrelay.coordinator.http_routes import Call, Probes, Routes
from kvrelay.coordinator.http_serving import ServingOptions, build_serving
from kvrelay.coordinator.plain_streams.serving import PlainStreams, StreamEngine
from kvrelay.coordinator.request_limits import RequestLimits
from kvrelay.coordinator.request_terms import STANDARD_TERMS, current_terms, terms_of_headers
from kvrelay.deadline import within
from kvrelay.v1 import inference_pb2

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")

_EXPLAIN = "x-kvrelay-explain"
"""A header of requests: 1 asks for the next one in the answer."""
_DECISION = b"x-kvrelay-decision"

FindDecision = Callable[[str], inference_pb2.Decision | None]
Handler = Callable[[Call], Coroutine[Any, Any, None]]


def build_app(
    engine: EngineClient,
    *,
    served_model_name: str,
    probes: Probes,
    limits: RequestLimits | None = None,
    options: ServingOptions | None = None,
    streams: StreamEngine | None = None,
) -> ASGIApp:
    """The OpenAI API over `engine`, to be run in the engine's event loop.

    Plain streams go to `streams`, where that is given and the server is `http_server`.

    Owns nothing: starting and ending the engine is the caller's. Raises what vLLM raises for an unknown parser.
    """
    limits = limits or RequestLimits()
    serving = build_serving(engine, served_model_name, options or ServingOptions())
    plain = PlainStreams(streams, serving, limits) if streams is not None else None
    return Gateway(Routes(serving, limits, probes), limits, plain, probes.decision)


_STOPPED = HttpError(
    status=HTTPStatus.SERVICE_UNAVAILABLE, message="this coordinator stops, and the answer was not complete; try again"
)


class Gateway:
    """Finds the route of a request, and turns every failure into OpenAI's error object."""

    def __init__(
        self, routes: Routes, limits: RequestLimits, plain: PlainStreams | None, decision: FindDecision
    ) -> None:
        self._limits = limits
        self._plain = plain
        self._decision = decision
        self._models = routes.model
        self._routes: dict[str, tuple[str, Handler]] = {
            "/v1/chat/completions": ("POST", routes.chat),
            "/v1/completions": ("POST", routes.completions),
            "/v1/models": ("GET", routes.models),
            "/tokenize": ("POST", routes.tokenize),
            "/detokenize": ("POST", routes.detokenize),
            "/health": ("GET", routes.health),
            "/ready": ("GET", routes.ready),
            "/version": ("GET", routes.version),
            "/metrics": ("GET", routes.metrics),
            "/metrics/targets": ("GET", routes.metrics_targets),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "lifespan":
            await _live(receive, send)
        else:
            await send({"type": "websocket.close"})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        more_headers = partial(self._explained, request_id) if headers.get(_EXPLAIN) == "1" else list
        reply = Reply(send, request_id, retry_after_s=self._limits.retry_after_s, more_headers=more_headers)
        body = None
        terms = STANDARD_TERMS
        try:
            method, handler = self._find(scope["path"])
            if scope["method"] != method and (method, scope["method"]) != ("GET", "HEAD"):
                raise HttpError(
                    status=HTTPStatus.METHOD_NOT_ALLOWED,
                    message=f"{scope['method']} is not offered for {scope['path'][:200]!r}; use {method}",
                    headers={"allow": method},
                )
            if method == "POST":
                terms = terms_of_headers(headers.raw)
                current_terms.set(terms)
            async with within(terms.left_s(), f"request {request_id}"):
                if method == "POST":
                    body = await read_json(receive, headers, self._limits)
                call = Call(path=scope["path"], headers=headers, request_id=request_id, body=body, reply=reply)
                connection = connection_of(scope)
                if connection is None or not await self._streamed(call, connection):
                    await until_disconnect(receive, handler(call))
        except ClientGoneError:
            return
        except asyncio.CancelledError:
            await reply.error(_STOPPED)
            raise
        except Exception as exception:
            given = body if isinstance(body, dict) else {}
            await reply.error(with_parameter(error_of(exception, request_id), given))

    async def _streamed(self, call: Call, connection: Connection) -> bool:
        """Whether it was a plain request, and is answered."""
        plain = self._plain
        return plain is not None and plain.takes(call) and await plain.answer(call, connection)

    def _explained(self, request_id: str) -> list[tuple[bytes, bytes]]:
        """Why the request went where it went, if it has gone anywhere."""
        decision = self._decision(request_id)
        if decision is None:
            return []
        return [(_DECISION, MessageToJson(decision, indent=None, preserving_proto_field_name=True).encode())]

    def _find(self, path: str) -> tuple[str, Handler]:
        if path.startswith("/v1/models/"):
            return "GET", self._models
        if path not in self._routes:
            raise HttpError(status=HTTPStatus.NOT_FOUND, message=f"there is no route {path[:200]!r}")
        return self._routes[path]


def _request_id(headers: Headers) -> str:
    """The client's X-Request-Id if it is short and plain, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


async def _live(receive: Receive, send: Send) -> None:
    """Answer the server's lifespan protocol: there is nothing to start and nothing to end."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
