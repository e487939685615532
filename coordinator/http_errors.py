"""How every failure of the HTTP gateway looks: OpenAI's error object, its status and headers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from pydantic import ValidationError
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param
from vllm.exceptions import VLLMValidationError

from kvrelay.coordinator.vllm_errors import from_vllm_error
from kvrelay.errors import STATUSES, InvalidRequestError, KvrelayError, status_of

logger = logging.getLogger(__name__)

_TYPES = {status.http.value: status.openai_type for status in reversed(STATUSES.values())} | {
    HTTPStatus.METHOD_NOT_ALLOWED.value: "MethodNotAllowedError",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE.value: "UnsupportedMediaTypeError",
    HTTPStatus.REQUEST_TIMEOUT.value: "TimeoutError",
    HTTPStatus.NOT_IMPLEMENTED.value: "NotImplementedError",
}
_RETRIED = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_SSE_ERROR = 'data: {"error"'
_MAX_MESSAGE_CHARS = 2000
_CONSTRAINTS = ("structured_outputs", "response_format")


class HttpError(Exception):
    """An answer that is no success. `message` is written for the client."""

    def __init__(
        self,
        *,
        status: int,
        message: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        retry_after_s: float | None = None,
        generated: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = int(status)
        self.message = message[:_MAX_MESSAGE_CHARS]
        self.param = param
        """The request's field that is wrong, where one is."""
        self.headers = headers or {}
        self.retry_after_s = retry_after_s
        """When a later attempt may succeed, where that can be told."""
        self.generated = generated or {}
        """Token ids that the request had got, by the index of the choice."""

    @property
    def is_retried(self) -> bool:
        """Whether a later attempt may succeed, which Retry-After says."""
        return self.status in _RETRIED

    def body(self) -> dict[str, Any]:
        error: dict[str, Any] = {
            "message": self.message,
            "type": _TYPES.get(self.status, "InvalidRequestError" if self.status < 500 else "InternalServerError"),
            "param": self.param,
            "code": self.status,
        }
        if self.generated:
            error["generated"] = [{"index": index, "token_ids": ids} for index, ids in self.generated.items()]
        return {"error": error}


def error_of(exception: Exception, request_id: str) -> HttpError:
    """The answer to an exception out of our code, vLLM's serving classes or pydantic.

    What nobody foresaw is logged and becomes a 500 that tells the request id and nothing else.
    """
    if isinstance(exception, HttpError):
        return exception
    if isinstance(exception, ValidationError):
        return _of_validation(exception)
    if isinstance(exception, NotImplementedError):
        return HttpError(status=HTTPStatus.NOT_IMPLEMENTED, message=str(exception) or "not offered")
    error = from_vllm_error(exception)
    status = status_of(error).http
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("request %s failed", request_id, exc_info=exception)
        return _internal(request_id)
    return _of_kvrelay(error)


def with_parameter(error: HttpError, given: Mapping[str, Any]) -> HttpError:
    """Name the request's field where vLLM did not: the one its message speaks of, or the constraint on the output."""
    if error.param is not None or error.status != HTTPStatus.BAD_REQUEST:
        return error
    words = set(re.findall(r"\w+", error.message))
    named = [name for name in given if name in words] or [name for name in _CONSTRAINTS if name in given]
    if not named:
        return error
    message = error.message if named[0] in words else f"{named[0]}: {error.message}"
    return HttpError(status=error.status, message=message, param=named[0])


def error_of_response(response: ErrorResponse, request_id: str) -> HttpError:
    """The answer to vLLM's own error object."""
    return _of_parts(response.error.code, response.error.message, response.error.param, request_id)


def error_of_event(event: str, request_id: str) -> HttpError | None:
    """The failure that an SSE event of vLLM's serving classes tells, or None for a chunk."""
    if not event.startswith(_SSE_ERROR):
        return None
    error = msgspec.json.decode(event.removeprefix("data: "))["error"]
    return _of_parts(error["code"], error["message"], error.get("param"), request_id)


def _of_parts(status: int, message: str, param: str | None, request_id: str) -> HttpError:
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("request %s failed: %s", request_id, message)
        return _internal(request_id)
    return HttpError(status=status, message=message, param=param)


def _internal(request_id: str) -> HttpError:
    return HttpError(
        status=HTTPStatus.INTERNAL_SERVER_ERROR,
        message=f"the request failed inside the cluster; its id in the logs is {request_id}",
    )


def _of_kvrelay(error: KvrelayError) -> HttpError:
    return HttpError(
        status=status_of(error).http,
        message=error.message,
        param=error.field,
        retry_after_s=error.retry_after_s,
        generated=error.generated,
    )


def _of_validation(exception: ValidationError) -> HttpError:
    """The first complaint of pydantic; a validator of vLLM's names its own parameter."""
    complaints = exception.errors(include_url=False, include_input=False)
    first = complaints[0]
    for complaint in complaints:
        cause = complaint.get("ctx", {}).get("error")
        if isinstance(cause, VLLMValidationError):
            return _of_kvrelay(InvalidRequestError(str(cause), field=cause.parameter))
    param = clean_loc_for_param(first["loc"]) if first["loc"] else None
    message = f"{param}: {first['msg']}" if param else first["msg"]
    return _of_kvrelay(InvalidRequestError(message, field=param))
