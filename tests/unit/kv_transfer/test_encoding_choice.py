"""Encoding pays on a link that is slower than the coding, by a margin; averages follow what happens."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvrelay.kv_transfer.encoding_choice import EncodingMeter, worthwhile

SPEEDS = st.floats(1e3, 1e12)
RATIOS = st.floats(0.01, 1.2)


@pytest.mark.parametrize(
    ("bandwidth", "ratio", "encode", "decode", "expected"),
    [
        (1e9, 0.5, 2e9, 3e9, True),
        (1e9, 0.5, 0.9e9, 3e9, False),  # The sender cannot even keep up with the link.
        (1e9, 0.5, 2e9, 0.9e9, False),  # The receiver cannot.
        (1e9, 0.95, 2e9, 3e9, False),  # Hardly smaller: within the margin.
        (1e9, 1.0, 9e9, 9e9, False),
        (1e8, 0.7, 1e9, 1e9, True),
        (1e10, 0.25, 2e9, 3e9, False),  # A link faster than the coding.
    ],
)
def test_the_slowest_stage_decides(
    bandwidth: float, ratio: float, encode: float, decode: float, expected: bool
) -> None:
    assert worthwhile(bandwidth, ratio=ratio, encode_bytes_per_s=encode, decode_bytes_per_s=decode) is expected


@given(SPEEDS, SPEEDS, SPEEDS, RATIOS)
def test_what_pays_on_a_link_pays_on_every_slower_one(
    bandwidth: float, encode: float, decode: float, ratio: float
) -> None:
    def pays(link: float) -> bool:
        return worthwhile(link, ratio=ratio, encode_bytes_per_s=encode, decode_bytes_per_s=decode)

    assert pays(bandwidth / 2) >= pays(bandwidth)


@given(SPEEDS, SPEEDS, SPEEDS, RATIOS, st.floats(0, 1))
def test_it_pays_where_the_slowest_stage_is_faster_than_the_raw_link(
    bandwidth: float, encode: float, decode: float, ratio: float, margin: float
) -> None:
    gain = (1 / bandwidth) / max(1 / encode, ratio / bandwidth, 1 / decode)
    assume(not math.isclose(gain, 1 + margin))
    pays = worthwhile(bandwidth, ratio=ratio, encode_bytes_per_s=encode, decode_bytes_per_s=decode, margin=margin)
    assert pays is (gain > 1 + margin)


def test_without_a_margin_the_border_is_the_slower_of_the_two_coders() -> None:
    for bandwidth, expected in ((0.99e9, True), (1.01e9, False)):
        assert (
            worthwhile(bandwidth, ratio=0.5, encode_bytes_per_s=1e9, decode_bytes_per_s=math.inf, margin=0) is expected
        )


def test_a_meter_knows_nothing_at_first() -> None:
    meter = EncodingMeter()
    assert (meter.bytes_per_s, meter.ratio, meter.worthwhile(1e9)) == (None, None, None)


def test_a_meter_averages_by_bytes() -> None:
    meter = EncodingMeter(half_life_bytes=1e12)
    meter.add(1_000_000, 500_000, 0.001)
    meter.add(3_000_000, 2_700_000, 0.001)
    assert meter.bytes_per_s == pytest.approx(2e9)
    assert meter.ratio == pytest.approx(0.8)


def test_what_is_long_past_fades() -> None:
    meter = EncodingMeter(half_life_bytes=1000)
    meter.add(1_000_000, 1_000_000, 1.0)
    for _ in range(30):
        meter.add(1000, 500, 1e-6)
    assert meter.bytes_per_s == pytest.approx(1e9, rel=0.01)
    assert meter.ratio == pytest.approx(0.5, rel=0.01)


def test_a_meter_decides_for_all_threads() -> None:
    meter = EncodingMeter()
    meter.add(1_000_000, 500_000, 0.001)
    assert meter.worthwhile(1.5e9) is False
    assert meter.worthwhile(1.5e9, num_threads=2) is True


def test_frames_that_took_no_measurable_time_do_not_divide_by_zero() -> None:
    meter = EncodingMeter()
    meter.add(100, 50, 0.0)
    assert meter.bytes_per_s is None
    assert meter.worthwhile(1e9) is None
