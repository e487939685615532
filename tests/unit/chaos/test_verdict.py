"""The run notices what goes wrong, and calls it by its name."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.client import GenerationFailedError, NoWorkersError, UnreachableError, WorkerLostError
from tests.chaos.verdict import HttpStatusError, Verdict, is_clear, verdict_of, verdict_of_tokens

EXPECTED = list(range(100, 120))


@pytest.mark.parametrize(
    ("got", "verdict"),
    [
        (EXPECTED, Verdict.COMPLETED),
        (EXPECTED[:-1], Verdict.LOST),
        ([], Verdict.LOST),
        ([*EXPECTED[:5], *EXPECTED[6:]], Verdict.LOST),
        (EXPECTED[1:], Verdict.LOST),
        ([*EXPECTED[:5], EXPECTED[4], *EXPECTED[5:]], Verdict.DOUBLED),
        ([*EXPECTED[:8], *EXPECTED[3:]], Verdict.DOUBLED),
        ([*EXPECTED, EXPECTED[-1]], Verdict.DOUBLED),
        ([*EXPECTED[:8], *EXPECTED[6:7]], Verdict.DOUBLED),
        ([*EXPECTED, 7], Verdict.WRONG),
        ([7, *EXPECTED[1:]], Verdict.WRONG),
        ([*EXPECTED[:5], 7, *EXPECTED[6:]], Verdict.WRONG),
        (list(reversed(EXPECTED)), Verdict.WRONG),
    ],
)
def test_tokens_are_compared(got: list[int], verdict: Verdict) -> None:
    assert verdict_of_tokens(EXPECTED, got) is verdict


@given(st.integers(1, 19), st.integers(1, 19))
def test_whatever_is_repeated_or_left_out_is_seen(place: int, length: int) -> None:
    repeated = [*EXPECTED[:place], *EXPECTED[max(0, place - length) : place], *EXPECTED[place:]]
    assert verdict_of_tokens(EXPECTED, repeated) is Verdict.DOUBLED
    short = [*EXPECTED[:place], *EXPECTED[place + length :]]
    assert verdict_of_tokens(EXPECTED, short) is Verdict.LOST


@pytest.mark.parametrize(
    ("error", "clear"),
    [
        (NoWorkersError("none; try again"), True),
        (WorkerLostError("lost; try again"), True),
        (UnreachableError("no coordinator"), True),
        (GenerationFailedError("INTERNAL"), False),
        (HttpStatusError(503, "try again"), True),
        (HttpStatusError(503, ""), False),
        (HttpStatusError(500, "broken"), False),
        (httpx.ReadError("reset"), True),
        (httpx.ReadTimeout("late"), False),
    ],
)
def test_an_error_before_the_first_token_is_clear_when_it_allows_another_attempt(error: Exception, clear: bool) -> None:
    assert is_clear(error) is clear
    assert verdict_of(EXPECTED, [[]], error) is (Verdict.CLEAR_ERROR if clear else Verdict.LOST)


def test_an_error_after_the_first_token_is_a_loss() -> None:
    begun = [EXPECTED[:3]]
    assert verdict_of(EXPECTED, begun, WorkerLostError("lost; try again")) is Verdict.LOST
    assert verdict_of(EXPECTED, begun, NoWorkersError("x")) is Verdict.LOST
    assert verdict_of(EXPECTED, begun, GenerationFailedError("x")) is Verdict.LOST
    assert verdict_of(EXPECTED, begun, httpx.ReadError("reset")) is Verdict.LOST
    assert verdict_of(EXPECTED, begun, httpx.ReadError("reset"), cannot_resume=True) is Verdict.CUT
    assert verdict_of(EXPECTED, begun, HttpStatusError(503, "x"), cannot_resume=True) is Verdict.LOST


def test_wrong_tokens_are_wrong_although_the_request_failed_or_was_cancelled() -> None:
    wrong = [[EXPECTED[0], 7]]
    assert verdict_of(EXPECTED, wrong, WorkerLostError("x")) is Verdict.WRONG
    assert verdict_of(EXPECTED, wrong, None, cancelled=True) is Verdict.WRONG
    assert verdict_of(EXPECTED, [EXPECTED[:2]], None, cancelled=True) is Verdict.CANCELLED


def test_the_worst_of_several_completions_counts() -> None:
    assert verdict_of(EXPECTED, [EXPECTED, EXPECTED], None) is Verdict.COMPLETED
    assert verdict_of(EXPECTED, [EXPECTED, EXPECTED[:4]], None) is Verdict.LOST
    assert verdict_of(EXPECTED, [[*EXPECTED[:4], 7], EXPECTED[:4]], None) is Verdict.WRONG
