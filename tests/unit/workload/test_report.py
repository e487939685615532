"""The figures of a load, against outcomes that were made by hand."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvrelay.workload.outcome import Outcome, Status
from kvrelay.workload.report import Percentiles, Summary, summarize
from kvrelay.workload.summary_table import comparison_table, latency_table, load_table
from kvrelay.workload.targets import Targets
from tests.support.outcomes import completed, ended

_TIME_S = st.floats(min_value=0, max_value=1e4)


def test_latencies_count_from_when_a_request_was_due() -> None:
    summary = summarize([completed(10.0, 12.0, 12.5, 14.0)])
    assert summary.ttft_s.p50 == pytest.approx(2.0)
    assert summary.e2e_s.p99 == pytest.approx(4.0)
    assert summary.tpot_s.p50 == pytest.approx(1.0)
    assert summary.itl_s.max == pytest.approx(1.5)


def test_itl_has_every_gap_and_tpot_one_mean_per_request() -> None:
    summary = summarize([completed(0.0, 1.0, 2.0, 3.0, 4.0), completed(0.0, 1.0, 11.0)])
    assert summary.itl_s.mean == pytest.approx((1 + 1 + 1 + 10) / 4)
    assert summary.tpot_s.mean == pytest.approx((1 + 10) / 2)
    assert summary.itl_s.p50 == pytest.approx(1.0)


def test_percentiles_interpolate_between_samples() -> None:
    summary = summarize([completed(0.0, float(second)) for second in range(1, 12)])
    assert summary.ttft_s == Percentiles(mean=6.0, p50=6.0, p90=10.0, p99=pytest.approx(10.9), max=11.0)


def test_latencies_are_of_completed_requests_only() -> None:
    broken = Outcome(
        index=1,
        arrived_s=0.0,
        status=Status.FAILED,
        num_prompt_tokens=9,
        num_output_tokens=2,
        token_times_s=[50.0, 90.0],
        error="ended early",
    )
    summary = summarize([completed(0.0, 1.0), broken])
    assert summary.ttft_s.max == pytest.approx(1.0)
    assert summary.num_prompt_tokens == 100
    assert summary.num_output_tokens == 3
    assert summary.duration_s == pytest.approx(90.0)
    assert summary.errors == {"ended early": 1}


def test_rejected_and_failed_requests_lower_the_goodput() -> None:
    outcomes = [
        completed(0.0, 1.0, 1.1),
        completed(0.0, 3.0, 3.1),
        completed(0.0, 1.0, 1.5),
        ended(1.0, Status.REJECTED),
        ended(2.0, Status.FAILED, "500"),
    ]
    goodput = summarize(outcomes, Targets(ttft_s=2.0, tpot_s=0.2), duration_s=10.0).goodput
    assert (goodput.num_requests, goodput.share, goodput.requests_per_s) == (1, 0.2, 0.1)


@pytest.mark.parametrize(
    ("targets", "num_good"),
    [
        (Targets(), 3),
        (Targets(ttft_s=1.0), 2),
        (Targets(tpot_s=2.0), 3),
        (Targets(itl_s=2.0), 2),
        (Targets(e2e_s=1.0), 1),
        (Targets(ttft_s=0.5), 0),
    ],
)
def test_each_target_is_kept_up_to_and_with_its_limit(targets: Targets, num_good: int) -> None:
    outcomes = [completed(0.0, 1.0), completed(0.0, 1.0, 2.0, 5.0), completed(0.0, 2.0, 3.0)]
    assert summarize(outcomes, targets).goodput.num_requests == num_good


def test_a_request_without_a_token_keeps_no_ttft() -> None:
    summary = summarize([completed(0.0)], Targets(ttft_s=100.0))
    assert summary.goodput.num_requests == 0
    assert summary.num_completed == 1
    assert summary.ttft_s.p50 is None


def test_prefix_hit_rate_weighs_by_tokens() -> None:
    outcomes = [
        completed(0.0, 1.0, num_prompt_tokens=900, num_cached_tokens=900),
        completed(0.0, 1.0, num_prompt_tokens=100),
        ended(0.0, Status.REJECTED),
    ]
    assert summarize(outcomes).prefix_hit_rate == pytest.approx(0.9)
    assert summarize(outcomes, caching_known=False).prefix_hit_rate is None


def test_rates_are_over_the_time_from_the_first_arrival_to_the_last_token() -> None:
    summary = summarize([completed(2.0, 3.0), completed(4.0, 6.0, 12.0), ended(6.0, Status.REJECTED)])
    assert summary.duration_s == pytest.approx(10.0)
    assert summary.requests_per_s == pytest.approx(0.2)
    assert summary.output_tokens_per_s == pytest.approx(0.3)
    assert summary.prompt_tokens_per_s == pytest.approx(20.0)
    assert summary.offered_requests_per_s == pytest.approx(0.5)


def test_a_load_without_requests_has_no_figures_and_no_error() -> None:
    summary = summarize([])
    assert (summary.num_requests, summary.duration_s) == (0, 0.0)
    assert summary.requests_per_s is summary.goodput.share is summary.itl_s.p99 is None


@given(
    st.lists(
        st.builds(
            lambda arrived_s, waits_s, status: Outcome(
                index=0,
                arrived_s=arrived_s,
                status=status,
                num_prompt_tokens=10,
                num_cached_tokens=5,
                num_output_tokens=len(waits_s),
                token_times_s=[arrived_s + wait_s for wait_s in sorted(waits_s)],
            ),
            _TIME_S,
            st.lists(_TIME_S, max_size=5),
            st.sampled_from(Status),
        ),
        max_size=20,
    ),
    st.builds(Targets, ttft_s=st.none() | _TIME_S, itl_s=st.none() | _TIME_S),
)
def test_any_load_adds_up_and_goes_into_json(outcomes: list[Outcome], targets: Targets) -> None:
    summary = summarize(outcomes, targets)
    assert summary.num_requests == summary.num_completed + summary.num_rejected + summary.num_failed
    assert summary.goodput.num_requests <= summary.num_completed
    for percentiles in (summary.ttft_s, summary.itl_s, summary.tpot_s, summary.e2e_s):
        known = [
            each for each in (percentiles.p50, percentiles.p90, percentiles.p99, percentiles.max) if each is not None
        ]
        assert len(known) in (0, 4)
        assert known == sorted(known)
        assert all(each >= 0 for each in known)
    assert json.loads(json.dumps(summary.to_json(), allow_nan=False)) == summary.to_json()


def test_tables_tell_counts_latencies_and_targets() -> None:
    summary = summarize(
        [completed(0.0, 1.25, 1.5), ended(3.0, Status.REJECTED)], Targets(ttft_s=2.0, itl_s=0.1), duration_s=4.0
    )
    text = _text(summary)
    for expected in ("1.250", "0.250", "ttft <= 2 s, itl <= 0.1 s", "4.0 s", "0.25 requests/s", "policy cost"):
        assert expected in text


def _text(summary: Summary) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        for table in (load_table(summary), latency_table(summary), comparison_table({"policy cost": summary})):
            console.print(table)
    return captured.get()
