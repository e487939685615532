"""How a request's JSON body comes in: with a limit while it is read, and strictly decoded."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive

from kvrelay.coordinator.http_errors import HttpError
from kvrelay.coordinator.request_limits import RequestLimits
from kvrelay.errors import InvalidRequestError, RequestTooLargeError


class ClientGoneError(Exception):
    """The connection was closed; nobody waits for an answer."""


async def read_json(receive: Receive, headers: Headers, limits: RequestLimits) -> Any:
    """The decoded body: no NaN, no infinity, no broken Unicode.

    Raises `ClientGoneError`, `RequestTooLargeError`, `InvalidRequestError`, or `HttpError` for another media type.
    """
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HttpError(
            status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            message=f"Content-Type is {media_type[:80]!r}; it must be application/json",
        )
    body = await _read(receive, headers, limits)
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error


async def _read(receive: Receive, headers: Headers, limits: RequestLimits) -> bytes:
    announced = headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > limits.max_body_bytes:
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > limits.max_body_bytes:
                    raise _too_large(limits)
    except TimeoutError as error:
        raise HttpError(
            status=HTTPStatus.REQUEST_TIMEOUT,
            message=f"the body did not arrive within {limits.body_timeout_s:g} s",
            headers={"connection": "close"},
        ) from error
    return bytes(body)


def _too_large(limits: RequestLimits) -> RequestTooLargeError:
    return RequestTooLargeError(f"the body is larger than the limit of {limits.max_body_bytes} bytes")
