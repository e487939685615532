"""How does a run look to people and to machines?"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.report import commit, machine_facts
from tests.chaos.findings import Findings, percentile, rows
from tests.chaos.verdict import Verdict

_MAX_LINES = 20


def to_json(findings: Findings) -> dict[str, Any]:
    """Everything; `requests` is the sum of the verdicts."""
    recovery_s = findings.recovery_s()
    return {
        "seed": findings.seed,
        "seconds": findings.seconds,
        "machine": machine_facts(),
        "commit": commit(),
        "requests": len(findings.judged),
        **{verdict.value: findings.totals[verdict] for verdict in Verdict},
        "leaks": len(findings.leaks),
        "leaked": findings.leaks,
        "unexpected_ends": findings.unexpected_ends,
        "recovery_s": {
            "streams": len(recovery_s),
            "p50": percentile(recovery_s, 0.5),
            "p90": percentile(recovery_s, 0.9),
            "max": percentile(recovery_s, 1.0),
        },
        "faults": {row["fault"]: {key: row[key] for key in row if key != "fault"} for row in rows(findings)},
        "not_healed": [hit.error for hit in findings.injections if hit.error],
        "errors": dict(findings.errors().most_common()),
        "bad": [each.text() for each in findings.bad()],
        "failed": [each.text() for each in findings.failed()],
    }


def print_report(findings: Findings) -> None:
    """The table of faults and outcomes, the totals, and what is wrong."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(_table(findings))
    report = to_json(findings)
    totals = ", ".join(f"{report[verdict.value]} {verdict.value.replace('_', ' ')}" for verdict in Verdict)
    _say(console, f"{report['requests']} requests: {totals}; {report['leaks']} leaks.")
    if report["recovery_s"]["streams"]:
        shown = ", ".join(f"{name} {report['recovery_s'][name]:.2f} s" for name in ("p50", "p90", "max"))
        _say(console, f"Pauses of {report['recovery_s']['streams']} streams whose decode worker was killed: {shown}.")
    _list(console, "What clients were told:", [f"{number} x {text}" for text, number in report["errors"].items()])
    _list(console, "Not as it must be:", report["bad"])
    _list(console, "Ended without being told to:", report["unexpected_ends"])
    _list(console, "Left:", report["leaked"])
    _list(console, "Not healed:", report["not_healed"])
    _say(console, f"Seed {findings.seed}: {'all is well' if findings.is_good else 'NOT all is well'}.")


def _table(findings: Findings) -> Table:
    table = Table(title=f"Faults and the requests that they met, {findings.seconds:g} s")
    for number, row in enumerate(rows(findings)):
        if not number:
            for name in row:
                table.add_column(name.replace("_", " "), justify="left" if name == "fault" else "right")
        table.add_row(*map(_cell, row.values()))
    return table


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _list(console: Console, title: str, lines: list[str]) -> None:
    if lines:
        _say(console, title)
    for line in lines[:_MAX_LINES]:
        _say(console, f"  {line}")
    if len(lines) > _MAX_LINES:
        _say(console, f"  and {len(lines) - _MAX_LINES} more")


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
