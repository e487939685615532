"""How do several loads compare: by their latencies, and over the load that was offered?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvrelay.workload.axes import MARKERS, SERIES, draw_cdfs, finish, log_scale, new_figure, save
from kvrelay.workload.html_page import write_page
from kvrelay.workload.report import Summary
from kvrelay.workload.run_record import RunRecord

Series = Mapping[str, Sequence[tuple[float, Summary]]]
"""Name, for example of a policy -> load and what came of it, by rising load."""

_OVER_LOAD: Mapping[str, Callable[[Summary], float | None]] = {
    "TTFT p50 (s)": lambda summary: summary.ttft_s.p50,
    "TTFT p90 (s)": lambda summary: summary.ttft_s.p90,
    "TPOT p90 (s)": lambda summary: summary.tpot_s.p90,
    "goodput (% of requests)": lambda summary: _percent(summary.goodput.share),
    "rejected or failed (% of requests)": lambda summary: _percent(
        (summary.num_rejected + summary.num_failed) / max(1, summary.num_requests)
    ),
    "prefix hits (% of prompt tokens)": lambda summary: _percent(summary.prefix_hit_rate),
}
_LOGARITHMIC = ("TTFT p50 (s)", "TTFT p90 (s)")


def write_comparison(title: str, records: Mapping[str, RunRecord], directory: Path) -> list[Path]:
    """`comparison.png`, and `comparison.html` with the picture and all figures. Makes the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    picture, page = directory / "comparison.png", directory / "comparison.html"
    save(comparison_figure(title, records), picture)
    write_page(page, title, records, [picture])
    return [picture, page]


def comparison_figure(title: str, records: Mapping[str, RunRecord]) -> Figure:
    """The distribution of every latency, all loads in one panel."""
    latencies = ("ttft_s", "itl_s", "tpot_s", "e2e_s")
    figure, axes = new_figure(title, 2, 2)
    for panel, latency in zip(axes, latencies, strict=True):
        draw_cdfs(panel, latency, {name: record.distributions[latency] for name, record in records.items()})
    return figure


def sweep_figure(title: str, load_label: str, series: Series) -> Figure:
    """Latency, goodput, refusals and prefix hits over load; one line per series. `save` writes it."""
    figure, axes = new_figure(title, 2, 3)
    for panel, (label, figure_of) in zip(axes, _OVER_LOAD.items(), strict=True):
        _draw_over_load(panel, series, figure_of)
        finish(panel, load_label, label)
        if label in _LOGARITHMIC:
            log_scale(panel, "y")
        else:
            panel.set_ylim(0, None)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(8, max(1, len(labels))), fontsize=9)
    return figure


def _draw_over_load(axes: Axes, series: Series, figure_of: Callable[[Summary], float | None]) -> None:
    for number, (name, points) in enumerate(series.items()):
        known = [(load, value) for load, summary in points if (value := figure_of(summary)) is not None]
        axes.plot(
            [load for load, _ in known],
            [value for _, value in known],
            label=name,
            color=SERIES[number % len(SERIES)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4.5,
            linewidth=1.5,
        )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
