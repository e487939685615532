"""Errors between our tree and vLLM's, whose serving classes answer HTTP requests."""

from __future__ import annotations

from http import HTTPStatus

from vllm.exceptions import (
    GracefulHTTPError,
    VLLMClientError,
    VLLMError,
    VLLMNotFoundError,
    VLLMValidationError,
)

from kvrelay.errors import (
    GenerationFailedError,
    InvalidRequestError,
    KvrelayError,
    ModelNotFoundError,
    status_of,
)


class ClusterRequestError(GracefulHTTPError):
    """One of our errors on its way through vLLM's serving classes, which answer with its HTTP status."""

    def __init__(self, error: KvrelayError) -> None:
        super().__init__(error.message, HTTPStatus(status_of(error).http))
        self.error = error


def to_vllm_error(error: KvrelayError) -> VLLMError:
    """What to raise out of `EngineClient.generate`."""
    if isinstance(error, InvalidRequestError):
        return VLLMValidationError(error.message, parameter=error.field)
    return ClusterRequestError(error)


def from_vllm_error(error: Exception) -> KvrelayError:
    """What an exception of vLLM's front end means to our clients.

    vLLM raises bare ValueError, TypeError and template errors for some bad requests.
    """
    if isinstance(error, KvrelayError):
        return error
    if isinstance(error, ClusterRequestError):
        return error.error
    if isinstance(error, VLLMNotFoundError):
        return ModelNotFoundError(str(error))
    if isinstance(error, VLLMValidationError):
        return InvalidRequestError(str(error), field=error.parameter)
    bad_request = isinstance(error, VLLMClientError | ValueError | TypeError | OverflowError)
    if bad_request or any(kind.__name__ == "TemplateError" for kind in type(error).__mro__):
        return InvalidRequestError(str(error))
    return GenerationFailedError(f"{type(error).__name__}: {error}")
