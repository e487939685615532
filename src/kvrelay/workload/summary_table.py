"""What does a person see of a load, or of several side by side?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.table import Table

from kvrelay.workload.report import Percentiles, Summary
from kvrelay.workload.targets import Targets

_UNKNOWN = "-"
TITLES = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2e": "end to end"}
PERCENTILES = ("mean", "p50", "p90", "p99", "max")


def latency_table(summary: Summary) -> Table:
    """One row per latency."""
    table = Table(title="Latency in seconds, of completed requests", title_justify="left")
    table.add_column("")
    for name in PERCENTILES:
        table.add_column(name, justify="right")
    for latency, title in TITLES.items():
        percentiles: Percentiles = getattr(summary, f"{latency}_s")
        table.add_row(title, *(seconds(getattr(percentiles, name)) for name in PERCENTILES))
    return table


def load_table(summary: Summary) -> Table:
    """What came in, what became of it, and how fast."""
    table = Table(title="Load", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, text in load_rows(summary).items():
        table.add_row(name, text)
    return table


def load_rows(summary: Summary) -> dict[str, str]:
    """The rows of `load_table`: name -> figure with its unit."""
    goodput = summary.goodput
    return {
        "requests": f"{summary.num_requests:,}",
        "completed": f"{summary.num_completed:,}",
        "rejected": f"{summary.num_rejected:,}",
        "failed": f"{summary.num_failed:,}",
        "duration": f"{summary.duration_s:,.1f} s",
        "offered": rate(summary.offered_requests_per_s, "requests/s"),
        "throughput": rate(summary.requests_per_s, "requests/s"),
        "prompt": rate(summary.prompt_tokens_per_s, "tokens/s"),
        "output": rate(summary.output_tokens_per_s, "tokens/s"),
        "prefix hits": share(summary.prefix_hit_rate, "of prompt tokens"),
        "targets": targets_text(goodput.targets),
        "goodput": rate(goodput.requests_per_s, "requests/s"),
        "goodput share": share(goodput.share, "of requests"),
    }


_COMPARED: dict[str, Callable[[Summary], str]] = {
    "offered req/s": lambda summary: number(summary.offered_requests_per_s),
    "completed": lambda summary: f"{summary.num_completed:,}",
    "rejected": lambda summary: f"{summary.num_rejected:,}",
    "failed": lambda summary: f"{summary.num_failed:,}",
    "TTFT p50 s": lambda summary: seconds(summary.ttft_s.p50),
    "TTFT p90 s": lambda summary: seconds(summary.ttft_s.p90),
    "TTFT p99 s": lambda summary: seconds(summary.ttft_s.p99),
    "ITL p50 s": lambda summary: seconds(summary.itl_s.p50),
    "ITL p99 s": lambda summary: seconds(summary.itl_s.p99),
    "TPOT p90 s": lambda summary: seconds(summary.tpot_s.p90),
    "e2e p90 s": lambda summary: seconds(summary.e2e_s.p90),
    "goodput": lambda summary: share(summary.goodput.share),
    "prefix hits": lambda summary: share(summary.prefix_hit_rate),
}


def comparison_table(summaries: Mapping[str, Summary]) -> Table:
    """One column per load, under its name: figures that are to be compared stand side by side."""
    table = Table(title="Loads compared", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in summaries:
        table.add_column(name, justify="right", overflow="fold")
    for title, text in _COMPARED.items():
        table.add_row(title, *(text(summary) for summary in summaries.values()))
    return table


def targets_text(targets: Targets) -> str:
    """`ttft <= 2 s, tpot <= 0.1 s`, or that there is none."""
    limits = {name: getattr(targets, f"{name}_s") for name in TITLES}
    kept = [f"{name} <= {limit:g} s" for name, limit in limits.items() if limit is not None]
    return ", ".join(kept) or "no target"


def seconds(value: float | None) -> str:
    """Three digits that matter, and no less than a tenth of a millisecond."""
    if value is None:
        return _UNKNOWN
    return f"{value:,.1f}" if value >= 100 else f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"


def number(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def rate(value: float | None, unit: str) -> str:
    return _UNKNOWN if value is None else f"{number(value)} {unit}"


def share(value: float | None, of_what: str = "") -> str:
    return _UNKNOWN if value is None else f"{value:.1%} {of_what}".strip()
