"""Pictures and pages of loads."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from kvrelay.workload.comparison_plots import comparison_figure, sweep_figure, write_comparison
from kvrelay.workload.outcome import Outcome, Status
from kvrelay.workload.plots import load_figure, write_plots
from kvrelay.workload.run_record import RunRecord, record_of
from tests.support.outcomes import completed, ended, mixed_load

_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_BYTES = 400_000


def record(outcomes: list[Outcome], name: str = "cost") -> RunRecord:
    return record_of(outcomes, name=name, kind="replay", config={"trace": "a & b"})


def labels(figure: Figure) -> set[str]:
    return {text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel())}


def test_a_load_is_written_as_a_small_picture_and_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    outcomes = mixed_load(3000)
    picture, page = write_plots(record(outcomes, "<cost>"), outcomes, tmp_path / "new" / "folder")
    assert picture.read_bytes().startswith(_PNG)
    assert picture.stat().st_size < _MOST_BYTES
    html = page.read_text()
    assert "&lt;cost&gt;" in html
    assert "<cost>" not in html
    assert "a &amp; b" in html
    (source,) = re.findall(r'src="([^"]*)"', html)
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == picture.read_bytes()
    assert "http" not in html
    assert "rejected</th><td>300<" in html


def test_every_panel_says_what_it_shows_in_which_unit() -> None:
    outcomes = mixed_load(50)
    assert labels(load_figure(record(outcomes), outcomes)) == {
        "time to first token (s)",
        "gap between tokens (s)",
        "end to end (s)",
        "requests (%)",
        "gaps (%)",
        "due at (s)",
        "time (s)",
        "requests per second",
        "requests in flight",
    }


def test_requests_in_flight_are_those_due_and_not_ended() -> None:
    outcomes = [completed(0.0, 1.0, 4.0), completed(2.0, 3.0), ended(2.5, Status.REJECTED)]
    (line,) = load_figure(record(outcomes), outcomes).axes[5].lines
    times_s, in_flight = line.get_data()
    assert list(np.interp([0.5, 2.2, 2.8, 3.5], times_s, in_flight)) == [1, 2, 2, 1]
    assert np.asarray(in_flight)[-1] == 0


def test_rates_add_up_to_the_requests() -> None:
    outcomes = mixed_load(500)
    for stairs, expected in zip(
        load_figure(record(outcomes), outcomes).axes[4].patches, (500, 425, 50, 25), strict=True
    ):
        assert isinstance(stairs, StepPatch)
        values, edges, _ = stairs.get_data()
        assert float((values * np.diff(edges)).sum()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "outcomes",
    [
        [],
        [completed(0.0, 0.5)],
        [completed(3.0)],
        [ended(1.0, Status.REJECTED), ended(2.0, Status.FAILED, "x")],
        [completed(0.0, 0.0, 0.0), completed(0.0, 1e-7, 5000.0)],
    ],
)
def test_loads_at_the_edges_have_pictures_too(tmp_path: Path, outcomes: list[Outcome]) -> None:
    for path in write_plots(record(outcomes), outcomes, tmp_path):
        assert path.stat().st_size > 0


def test_a_comparison_has_a_line_for_each_load_in_each_panel(tmp_path: Path) -> None:
    records = {name: record(mixed_load(200, seed), name) for seed, name in enumerate(("cost", "random", "oracle"))}
    for axes in comparison_figure("Policies", records).axes:
        assert [line.get_label() for line in axes.lines] == ["cost", "random", "oracle"]
        for line in axes.lines:
            assert np.all(np.diff(line.get_xdata()) >= 0)
            assert np.asarray(line.get_ydata())[-1] == 100
    picture, page = write_comparison("Policies", records, tmp_path)
    assert picture.stat().st_size < _MOST_BYTES
    assert page.read_text().count("<th>TTFT</th>") == 3


def test_a_sweep_has_a_line_for_each_series_over_its_loads() -> None:
    def point(load: float, outcomes: list[Outcome]) -> tuple[float, object]:
        return load, record(outcomes).summary

    series = {
        "cost": [point(1.0, mixed_load(50)), point(2.0, mixed_load(100))],
        "random": [point(1.0, [ended(0.0, Status.REJECTED)]), point(2.0, mixed_load(50))],
    }
    figure = sweep_figure("Policies", "requests/s", series)
    ttft, rejected = figure.axes[1], figure.axes[4]
    assert [list(line.get_xdata()) for line in ttft.lines] == [[1.0, 2.0], [2.0]]
    assert list(rejected.lines[1].get_ydata()) == [100.0, pytest.approx(16.0)]
