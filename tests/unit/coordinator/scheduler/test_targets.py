"""Which plans are left when a request has targets?"""

from __future__ import annotations

from itertools import product

from hypothesis import assume, given
from hypothesis import strategies as st

from kvrelay.coordinator.scheduler.estimates import DecodeEstimate, PromptEstimate
from kvrelay.coordinator.scheduler.option import Option
from kvrelay.coordinator.scheduler.targets import too_late, within_targets
from tests.support.scheduling import DECODE, PREFILL, shape, view

TIMES_S = st.floats(0.001, 10)


def option(queue_s: float, prefill_s: float, itl_s: float, fetch_s: float = 0.0) -> Option:
    wait_s = max(queue_s, fetch_s)
    prompt = PromptEstimate(0.0, view("p1", PREFILL), wait_s, prefill_s, 0, None, fetch_s)
    decode = DecodeEstimate(0.0, view("d1", DECODE), itl_s, 0.0, 0, 0, 0.0, 0.0)
    return Option(0.0, wait_s + prefill_s, 0.0, prompt, decode)


OPTIONS = st.lists(st.builds(option, TIMES_S, TIMES_S, TIMES_S), min_size=1, max_size=6)
WAYS = st.lists(st.tuples(TIMES_S, TIMES_S, st.just(0.1), TIMES_S), min_size=1, max_size=6)


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


@given(ways=WAYS, ttft_s=TIMES_S)
def test_after_the_time_that_was_told_a_plan_is_in_time(
    ways: list[tuple[float, float, float, float]], ttft_s: float
) -> None:
    """Queues have got shorter by then; what is to be fetched has not."""
    options = [option(*way) for way in ways]
    assume(not within_targets(options, shape(ttft_s=ttft_s)))
    error = too_late(options, shape(ttft_s=ttft_s))
    assert error.field == "ttft_s"

    def any_in_time_after(waited_s: float) -> bool:
        later = [option(max(0.0, queue_s - waited_s), *rest) for queue_s, *rest in ways]
        return bool(within_targets(later, shape(ttft_s=ttft_s)))

    if error.retry_after_s is None:
        assert not any_in_time_after(1e6)
    else:
        assert any_in_time_after(error.retry_after_s + 1e-6)
        assert not any_in_time_after(error.retry_after_s - 1e-6)


def test_targets_are_exact() -> None:
    for wait_s, prefill_s in product((0.0, 0.5), (0.25, 0.5)):
        assert within_targets([option(wait_s, prefill_s, 0.1)], shape(ttft_s=wait_s + prefill_s, itl_s=0.1))
        assert not within_targets([option(wait_s, prefill_s, 0.1)], shape(ttft_s=wait_s + prefill_s - 0.01))
