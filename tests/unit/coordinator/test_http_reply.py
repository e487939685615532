"""Answers that may succeed later say when."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import pytest

from kvrelay.coordinator.http_errors import HttpError, error_of
from kvrelay.coordinator.http_reply import Reply
from kvrelay.errors import InvalidRequestError, NoWorkersError, OverloadedError


async def retry_after(error: Exception) -> bytes | None:
    """The header of the answer to an exception."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await Reply(send, "id", retry_after_s=2).error(error_of(error, "id"))
    return dict(sent[0]["headers"]).get(b"retry-after")


@pytest.mark.parametrize(
    ("error", "header"),
    [
        (OverloadedError("full", retry_after_s=6.25), b"7"),
        (OverloadedError("full", retry_after_s=0.01), b"1"),
        (OverloadedError("full"), b"2"),
        (NoWorkersError("nobody"), b"2"),
        (HttpError(status=HTTPStatus.SERVICE_UNAVAILABLE, message="not yet"), b"2"),
        (InvalidRequestError("never"), None),
    ],
)
async def test_retry_after_is_what_is_known_or_the_default(error: Exception, header: bytes | None) -> None:
    assert await retry_after(error) == header
