"""What can go wrong with a request, and how each surface says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import grpc

RETRY_AFTER_METADATA = "retry-after-ms"
"""Trailing metadata of a gRPC status: `KvrelayError.retry_after_s`, in milliseconds."""


class KvrelayError(Exception):
    """Base of all errors that a client may see. The message is written for the client."""

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        """The request's field that is wrong, where one is."""
        self.retry_after_s = retry_after_s
        """When another attempt may succeed, where that can be told."""
        self.generated: Mapping[int, Sequence[int]] = {}
        """Token ids that a request had got before it failed, by the index of the completion."""


class InvalidRequestError(KvrelayError):
    """The request can never succeed as it is; the message names the field and the limit."""


class ModelNotFoundError(KvrelayError):
    """The cluster does not serve that model."""


class RequestTooLargeError(KvrelayError):
    """The body is over the limit."""


class OverloadedError(KvrelayError):
    """A bounded queue is full; a later attempt may succeed."""


class NoWorkersError(KvrelayError):
    """No worker can take the request now."""


class WorkerLostError(KvrelayError):
    """The worker that had the request is gone."""


class DeadlineError(KvrelayError):
    """The caller's deadline passed first."""


class GenerationFailedError(KvrelayError):
    """A worker failed in a way that was not foreseen."""


@dataclass(frozen=True, slots=True)
class ErrorStatus:
    """How one kind of error looks over gRPC, over HTTP and in OpenAI's error object."""

    grpc: grpc.StatusCode
    http: HTTPStatus
    openai_type: str


STATUSES: dict[type[KvrelayError], ErrorStatus] = {
    InvalidRequestError: ErrorStatus(grpc.StatusCode.INVALID_ARGUMENT, HTTPStatus.BAD_REQUEST, "BadRequestError"),
    ModelNotFoundError: ErrorStatus(grpc.StatusCode.NOT_FOUND, HTTPStatus.NOT_FOUND, "NotFoundError"),
    RequestTooLargeError: ErrorStatus(
        grpc.StatusCode.OUT_OF_RANGE, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "RequestTooLargeError"
    ),
    OverloadedError: ErrorStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, HTTPStatus.TOO_MANY_REQUESTS, "OverloadedError"),
    NoWorkersError: ErrorStatus(grpc.StatusCode.UNAVAILABLE, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"),
    WorkerLostError: ErrorStatus(grpc.StatusCode.ABORTED, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"),
    DeadlineError: ErrorStatus(grpc.StatusCode.DEADLINE_EXCEEDED, HTTPStatus.GATEWAY_TIMEOUT, "TimeoutError"),
    GenerationFailedError: ErrorStatus(
        grpc.StatusCode.INTERNAL, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError"
    ),
}
"""The one table. Every kind has its own gRPC status, so a status leads back to the exception."""


def status_of(error: KvrelayError) -> ErrorStatus:
    return STATUSES[type(error)]


def first_leaf(error: BaseException) -> BaseException:
    """The error itself, or the first one inside of a group of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def error_from_grpc(code: grpc.StatusCode, details: str, retry_after_s: float | None = None) -> KvrelayError:
    """The exception behind a gRPC status; statuses outside the table become `GenerationFailedError`.

    A message over the size limit never reaches a service: gRPC itself refuses it, with the status of an overload.
    """
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in details:
        return RequestTooLargeError(details)
    for kind, status in STATUSES.items():
        if status.grpc is code:
            return kind(details, retry_after_s=retry_after_s)
    return GenerationFailedError(f"{code.name}: {details}")


def error_from_http(status_code: int, message: str, *, field: str | None = None) -> KvrelayError:
    """The exception behind an HTTP status; the first kind of the table that has it."""
    for kind, status in STATUSES.items():
        if status.http == status_code:
            return kind(message, field=field)
    if 400 <= status_code < 500:
        return InvalidRequestError(message, field=field)
    return GenerationFailedError(message, field=field)
