"""What became of a request? Its tokens compared with those that had to come, and its error with what is allowed."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import httpx

from kvrelay.client import NoWorkersError, OverloadedError, WorkerLostError

_RETRYABLE = (OverloadedError, NoWorkersError, WorkerLostError)
_RETRYABLE_HTTP = (429, 503)


class Verdict(enum.Enum):
    """How a request ended, worst last."""

    COMPLETED = "completed"
    """With exactly the tokens that had to come."""
    CLEAR_ERROR = "clear_errors"
    """Before its first token, an error after which the same request may be sent again."""
    CANCELLED = "cancelled"
    """By its client, which had the right tokens until then."""
    CUT = "http_streams_cut"
    """Events over HTTP that ended with their coordinator, or the connection to it: nobody resumes these."""
    LOST = "lost"
    """Tokens are missing, or an error came that does not allow to try again."""
    DOUBLED = "doubled"
    """Tokens came twice."""
    WRONG = "wrong"
    """Tokens came that never had to."""


BAD = (Verdict.LOST, Verdict.DOUBLED, Verdict.WRONG)
_SEVERITY = list(Verdict)


class HttpStatusError(Exception):
    """The HTTP API answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status
        self.message = message


def verdict_of_tokens(expected: Sequence[int], got: Sequence[int]) -> Verdict:
    """`COMPLETED` when they are equal, `LOST` when some are missing, at the end or before others.

    Of what differs in the middle the tokens before and after it decide: `DOUBLED` when it repeats what came right
    before, `LOST` when it is what had to come later, else `WRONG`.
    """
    common = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
    if common is None:
        common = min(len(expected), len(got))
    if common == len(got):
        return Verdict.COMPLETED if common == len(expected) else Verdict.LOST
    rest = list(got[common:])
    for length in range(1, common + 1):
        again = list(expected[common - length : common])
        if rest[:length] == again[: len(rest)]:
            return Verdict.DOUBLED
    for skipped in range(1, len(expected) - common):
        if rest == list(expected[common + skipped :])[: len(rest)]:
            return Verdict.LOST
    return Verdict.WRONG


def verdict_of(
    expected: Sequence[int],
    got: Sequence[Sequence[int]],
    error: Exception | None,
    *,
    cancelled: bool = False,
    cannot_resume: bool = False,
) -> Verdict:
    """Of a whole request whose completions all have to be `expected`.

    `cannot_resume`: its client has a stream that goes on nowhere else, and its coordinator or the way to it was hit.
    """
    if error is None and not cancelled:
        return worst([verdict_of_tokens(expected, tokens) for tokens in got])
    shown = worst([verdict_of_tokens(expected[: len(tokens)], tokens) for tokens in got])
    if shown is not Verdict.COMPLETED:
        return shown
    if cancelled:
        return Verdict.CANCELLED
    if not any(got):
        return Verdict.CLEAR_ERROR if error is not None and is_clear(error) else Verdict.LOST
    if cannot_resume and isinstance(error, httpx.TransportError) and not isinstance(error, httpx.TimeoutException):
        return Verdict.CUT
    return Verdict.LOST


def is_clear(error: Exception) -> bool:
    """Whether it allows another attempt, and says something."""
    if isinstance(error, httpx.TimeoutException):
        return False
    if isinstance(error, HttpStatusError):
        return error.status in _RETRYABLE_HTTP and bool(error.message)
    return isinstance(error, (*_RETRYABLE, httpx.TransportError)) and bool(str(error) or type(error).__name__)


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """`COMPLETED` when there is none."""
    return max(verdicts, key=_SEVERITY.index, default=Verdict.COMPLETED)
