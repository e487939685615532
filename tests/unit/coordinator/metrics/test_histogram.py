"""Durations counted in buckets."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.coordinator.metrics.histogram import Histogram

_BOUNDS = (0.1, 0.5, 2.0)


@given(st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.5, 0.51, 2.0, 2.5, 1e9])))
def test_each_bound_counts_what_is_not_above_it(values: list[float]) -> None:
    histogram = Histogram(_BOUNDS)
    for value in values:
        histogram.observe(value)
    expected = [(bound, sum(value <= bound for value in values)) for bound in (*_BOUNDS, math.inf)]
    assert list(histogram.cumulative()) == expected
    assert histogram.sum == pytest.approx(sum(values))
