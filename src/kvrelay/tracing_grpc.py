"""Which span does a gRPC call of a client get? One server span, ended with the call's real status.

Own code because the OpenTelemetry instrumentation for grpc.aio loses spans of cancelled calls and leaves those of
failed ones unset (docs/adr/0006-tracing.md).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import SpanKind

from kvrelay.tracing import Span, Tracing, context_from_headers

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class TracingServerInterceptor(grpc.aio.ServerInterceptor):
    """Makes a server span for every call of `services` that has one request message.

    The span is the current one inside the handler. Calls with a stream of requests carry many requests at once and
    pass untouched: their spans come from the trace context inside the messages.
    """

    def __init__(self, tracing: Tracing, *services: str) -> None:
        self._tracing = tracing
        self._prefixes = tuple(f"/{service}/" for service in services)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not self._tracing.enabled or not method.startswith(self._prefixes):
            return handler
        metadata = {key: str(value) for key, value in handler_call_details.invocation_metadata}
        name = method.lstrip("/")

        def start() -> Span:
            span = self._tracing.start_span(
                name, context_from_headers(metadata), attributes=_attributes(name), kind=SpanKind.SERVER
            )
            # Handlers run in a task of their own, whose context ends with it: nothing to detach.
            otel_context.attach(trace.set_span_in_context(span.otel_span))
            return span

        if handler.unary_unary:
            return _replace(handler, "unary_unary", _call(handler.unary_unary, start))
        if handler.unary_stream and inspect.isasyncgenfunction(handler.unary_stream):
            return _replace(handler, "unary_stream", _stream(handler.unary_stream, start))
        if handler.unary_stream:
            return _replace(handler, "unary_stream", _call(handler.unary_stream, start))
        return handler


def _call(behavior: Any, start: Callable[[], Span]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def traced(request: Any, context: Any) -> Any:
        span = start()
        error: BaseException | None = None
        try:
            return await behavior(request, context)
        except BaseException as e:
            error = e
            raise
        finally:
            _end(span, context, error)

    return traced


def _stream(behavior: Any, start: Callable[[], Span]) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def traced(request: Any, context: Any) -> AsyncIterator[Any]:
        span = start()
        error: BaseException | None = None
        try:
            async with aclosing(behavior(request, context)) as messages:
                async for message in messages:
                    yield message
        except BaseException as e:
            error = e
            raise
        finally:
            _end(span, context, error)

    return traced


def _end(span: Span, context: Any, error: BaseException | None) -> None:
    code = _status(context, error)
    span.set({"rpc.grpc.status_code": code.value[0]})
    if code is not grpc.StatusCode.OK:
        details = context.details() or (repr(error) if error else "")
        span.fail(f"{code.name}: {details}" if details else code.name)
    span.end()


def _status(context: Any, error: BaseException | None) -> grpc.StatusCode:
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return grpc.StatusCode.CANCELLED
    if error is not None and not isinstance(error, grpc.aio.AbortError):
        return grpc.StatusCode.UNKNOWN
    code = context.code() or grpc.StatusCode.OK
    return _CODES[code] if isinstance(code, int) else code


def _attributes(name: str) -> dict[str, str]:
    service, _, method = name.rpartition("/")
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}


def _replace(handler: grpc.RpcMethodHandler[Any, Any], kind: str, behavior: Any) -> grpc.RpcMethodHandler[Any, Any]:
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    replaced: grpc.RpcMethodHandler[Any, Any] = make(
        behavior, handler.request_deserializer, handler.response_serializer
    )
    return replaced
