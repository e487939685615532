"""What does one load look like: its latencies, and how it went over time?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvrelay.workload.axes import ARRIVED, COMPLETED, FAILED, REJECTED, draw_cdfs, finish, new_figure, save, scale_by
from kvrelay.workload.html_page import write_page
from kvrelay.workload.outcome import Outcome, Status
from kvrelay.workload.run_record import RunRecord

_MOST_BINS = 80
_BINS_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_MOST_POINTS = 5000
_Values = npt.NDArray[np.float64]


def write_plots(record: RunRecord, outcomes: Sequence[Outcome], directory: Path) -> list[Path]:
    """`load.png`, and `load.html` with the picture and all figures in one file. Makes the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    picture, page = directory / "load.png", directory / "load.html"
    save(load_figure(record, outcomes), picture)
    write_page(page, record.name, {record.name: record}, [picture])
    return [picture, page]


def load_figure(record: RunRecord, outcomes: Sequence[Outcome]) -> Figure:
    """Latencies above, the course of the load below."""
    summary = record.summary
    figure, axes = new_figure(
        f"{record.name}: {summary.num_completed:,} completed, {summary.num_rejected:,} rejected, "
        f"{summary.num_failed:,} failed in {summary.duration_s:,.0f} s",
        2,
        3,
    )
    for panel, latency in zip(axes, ("ttft_s", "itl_s", "e2e_s"), strict=False):
        draw_cdfs(panel, latency, {record.name: record.distributions[latency]})
    _draw_ttft(axes[3], outcomes)
    _draw_rates(axes[4], outcomes)
    _draw_in_flight(axes[5], outcomes)
    return figure


def _draw_ttft(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """One point per request, and percentiles of those that were due in the same time."""
    answered = [each for each in outcomes if each.status is Status.COMPLETED and len(each.token_times_s)]
    due_s = np.array([outcome.arrived_s for outcome in answered])
    ttft_s = np.array([outcome.token_times_s[0] - outcome.arrived_s for outcome in answered])
    if answered:
        every = -(-len(answered) // _MOST_POINTS)
        axes.plot(due_s[::every], ttft_s[::every], ".", color=COMPLETED, alpha=0.3, markersize=3, label="one request")
        edges = _bins(due_s.max())
        numbers = np.digitize(due_s, edges)
        filled = np.unique(numbers)
        middles_s = (edges[filled - 1] + edges[filled]) / 2
        for percent, color in ((50, "#0b3c5d"), (90, FAILED)):
            values_s = [np.percentile(ttft_s[numbers == number], percent) for number in filled]
            axes.plot(middles_s, values_s, color=color, linewidth=1.4, label=f"p{percent}")
        scale_by(axes, "y", ttft_s)
        axes.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, markerscale=3)
    finish(axes, "due at (s)", "time to first token (s)", empty=not answered)


def _draw_rates(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    ends_s = {status: _ends_s([each for each in outcomes if each.status is status]) for status in Status}
    arrivals_s = np.array([outcome.arrived_s for outcome in outcomes])
    if outcomes:
        edges = _bins(max(arrivals_s.max(), *(times_s.max() for times_s in ends_s.values() if times_s.size)))
        axes.stairs(_per_s(arrivals_s, edges), edges, color=ARRIVED, label="due", linewidth=1.2)
        for status, color in ((Status.COMPLETED, COMPLETED), (Status.REJECTED, REJECTED), (Status.FAILED, FAILED)):
            if ends_s[status].size:
                label = status.value
                axes.stairs(_per_s(ends_s[status], edges), edges, color=color, label=label, linewidth=1.4)
        axes.set_ylim(0, None)
        axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    finish(axes, "time (s)", "requests per second", empty=not outcomes)


def _draw_in_flight(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """Due and not ended; those that were refused at once, or failed without a token, are in flight for no time."""
    if outcomes:
        arrivals_s = np.sort([outcome.arrived_s for outcome in outcomes])
        ends_s = np.sort(_ends_s(outcomes))
        times_s = np.linspace(arrivals_s[0], ends_s[-1], 1000)
        arrived = np.searchsorted(arrivals_s, times_s, side="right")
        axes.plot(times_s, arrived - np.searchsorted(ends_s, times_s, side="right"), color=COMPLETED, linewidth=1.2)
        axes.set_ylim(0, None)
    finish(axes, "time (s)", "requests in flight", empty=not outcomes)


def _ends_s(outcomes: Sequence[Outcome]) -> _Values:
    return np.array([each.token_times_s[-1] if len(each.token_times_s) else each.arrived_s for each in outcomes])


def _per_s(times_s: _Values, edges: _Values) -> _Values:
    return np.histogram(times_s, edges)[0] / np.diff(edges)


def _bins(until_s: float) -> _Values:
    """Edges of equal bins of a round length from 0 to past `until_s`, not too many."""
    width_s = next((width_s for width_s in _BINS_S if until_s / width_s <= _MOST_BINS), until_s / _MOST_BINS)
    return np.arange(int(until_s / width_s) + 2, dtype=np.float64) * width_s
