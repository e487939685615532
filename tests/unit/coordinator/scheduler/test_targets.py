"""Which plans are left when a request has targets?"""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvrelay.coordinator.scheduler.estimates import DecodeEstimate, PromptEstimate
from kvrelay.coordinator.scheduler.option import Option
from kvrelay.coordinator.scheduler.targets import within_targets
from kvrelay.errors import OverloadedError
from tests.support.scheduling import DECODE, PREFILL, shape, view

TIMES_S = st.floats(0.001, 10)


def option(wait_s: float, prefill_s: float, itl_s: float) -> Option:
    prompt = PromptEstimate(0.0, view("p1", PREFILL), wait_s, prefill_s, 0, None)
    decode = DecodeEstimate(0.0, view("d1", DECODE), itl_s, 0.0, 0, 0)
    return Option(0.0, wait_s + prefill_s, 0.0, prompt, decode)


OPTIONS = st.lists(st.builds(option, TIMES_S, TIMES_S, TIMES_S), min_size=1, max_size=6)


@given(options=OPTIONS)
def test_without_targets_all_are_left(options: list[Option]) -> None:
    assert within_targets(options, shape()) is options


@given(options=OPTIONS, ttft_s=TIMES_S, itl_s=TIMES_S)
def test_what_is_left_meets_the_targets_as_far_as_any_does(options: list[Option], ttft_s: float, itl_s: float) -> None:
    in_time = [option for option in options if option.ttft_s <= ttft_s]
    assume(in_time)
    left = within_targets(options, shape(ttft_s=ttft_s, itl_s=itl_s))
    limit_s = max(itl_s, min(option.decode.itl_s for option in in_time))
    assert left == [option for option in in_time if option.decode.itl_s <= limit_s]


@given(options=OPTIONS, ttft_s=TIMES_S)
def test_after_the_time_that_was_told_a_plan_is_in_time(options: list[Option], ttft_s: float) -> None:
    assume(all(option.ttft_s > ttft_s for option in options))
    with pytest.raises(OverloadedError) as raised:
        within_targets(options, shape(ttft_s=ttft_s))
    assert raised.value.field == "ttft_s"
    retry_after_s = raised.value.retry_after_s
    waited_s = 1e6 if retry_after_s is None else retry_after_s + 1e-6
    later = [option(max(0.0, o.prompt.wait_s - waited_s), o.prompt.prefill_s, 1.0) for o in options]
    assert any(o.ttft_s <= ttft_s for o in later) == (retry_after_s is not None)


def test_targets_are_exact() -> None:
    for wait_s, prefill_s in product((0.0, 0.5), (0.25, 0.5)):
        assert within_targets([option(wait_s, prefill_s, 0.1)], shape(ttft_s=wait_s + prefill_s, itl_s=0.1))
        with pytest.raises(OverloadedError):
            within_targets([option(wait_s, prefill_s, 0.1)], shape(ttft_s=wait_s + prefill_s - 0.01))
