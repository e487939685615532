"""How do the plots of loads look? One place for sizes, colours and scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

ARRIVED, COMPLETED, REJECTED, FAILED = "#555555", "#1f77b4", "#ff7f0e", "#d62728"
SERIES = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
MARKERS = "osD^vPX*"
_DPI = 100
_LOG_FROM_RATIO = 30.0
_LABELS = {
    "ttft_s": "time to first token (s)",
    "itl_s": "gap between tokens (s)",
    "tpot_s": "mean gap of a request (s)",
    "e2e_s": "end to end (s)",
}


def new_figure(title: str, num_rows: int, num_columns: int) -> tuple[Figure, list[Axes]]:
    """Empty axes, row by row. No window and no global state: a figure is garbage like any other object."""
    figure = Figure(figsize=(5.2 * num_columns, 3.7 * num_rows + 0.4), dpi=_DPI)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    return figure, [each for row in axes for each in row]


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", metadata={"Software": None})


def draw_cdfs(axes: Axes, latency: str, runs: Mapping[str, Sequence[float]]) -> None:
    """The share of samples up to a value; `runs` are quantiles at equal steps, by name."""
    shown = {name: np.asarray(values) for name, values in runs.items() if len(values)}
    for color, (name, values) in zip(_cycled(len(shown)), shown.items(), strict=True):
        axes.plot(values, np.linspace(0, 100, len(values)), label=name, color=color, linewidth=1.6)
    finish(axes, _LABELS[latency], "requests (%)" if latency != "itl_s" else "gaps (%)", empty=not shown)
    axes.set_yticks((0, 25, 50, 75, 90, 99), labels=("0", "25", "50", "75", "90", "99"))
    if shown:
        scale_by(axes, "x", np.concatenate(list(shown.values())))
    if len(shown) > 1:
        axes.legend(fontsize=8, loc="lower right")


def finish(axes: Axes, x_label: str, y_label: str, *, empty: bool = False) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if empty:
        axes.text(0.5, 0.5, "nothing to show", ha="center", va="center", transform=axes.transAxes, color="#888888")


def scale_by(axes: Axes, which: str, values: np.typing.NDArray[np.float64]) -> None:
    """Logarithmic where the values span much, from the smallest that is not 0; else linear from 0."""
    positive = values[values > 0]
    if positive.size and np.percentile(positive, 99) > _LOG_FROM_RATIO * np.percentile(positive, 1):
        log_scale(axes, which)
        axes.set(**{f"{which}lim": (max(positive.min(), np.percentile(positive, 99) / 1e4), None)})
    else:
        axes.set(**{f"{which}lim": (0, None)})


def log_scale(axes: Axes, which: str) -> None:
    """With plain numbers at 1, 2 and 5 of every decade, or at its beginning where there are many."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _cycled(count: int) -> list[str]:
    return [SERIES[number % len(SERIES)] for number in range(count)]
