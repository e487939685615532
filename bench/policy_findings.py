"""What follows from a sweep of policies? Ratios, and whether any arm beats the default by more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Row = Mapping[str, Any]

KEPT_UP_SHARE = 0.95
"""Of requests, that have ended by the time the last one arrives."""
NOISE_SHARE = 0.02
"""Differences below this, or below what seeds differ by, are none."""
BETTER_LOW = ("ttft_p90_s", "e2e_p90_s")
BETTER_HIGH = ("goodput_share",)


def findings(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One for each trace, in the order of the rows."""
    traces = dict.fromkeys(row["trace"] for row in rows)
    return [_of_trace(trace, [row for row in rows if row["trace"] == trace]) for trace in traces]


def _of_trace(trace: str, rows: Sequence[Row]) -> dict[str, Any]:
    losses = [
        loss
        for speed, cluster in dict.fromkeys((row["speed"], row["cluster"]) for row in rows)
        for other in ("always split", "never split")
        for loss in losses_at([row for row in rows if (row["speed"], row["cluster"]) == (speed, cluster)], other)
    ]
    cost = [row for row in rows if row["policy"] == "cost"]
    found: dict[str, Any] = {
        "trace": trace,
        "round_robin": _against_round_robin(rows),
        "least_oracle_hit_share": min((row["oracle_hit_share"] for row in cost), default=None),
        "most_idle_prefill": max((row["idle_prefill"] for row in cost), default=None),
        "most_idle_decode": max((row["idle_decode"] for row in cost), default=None),
        "losses": losses,
    }
    return found | {"notes": _notes(found)}


def _against_round_robin(rows: Sequence[Row]) -> dict[str, float] | None:
    """At the highest load that round-robin keeps up with."""
    kept = [row for row in rows if row["policy"] == "round-robin" and row["ended_share"] >= KEPT_UP_SHARE]
    if not kept:
        return None
    other = max(kept, key=lambda row: row["speed"])
    same = [row for row in rows if (row["speed"], row["cluster"]) == (other["speed"], other["cluster"])]
    ours = [row["ttft_p90_s"] for row in same if row["policy"] == "cost"]
    if not ours:
        return None
    return {
        "speed": other["speed"],
        "requests_per_s": other["requests_per_s"],
        "round_robin_ttft_p90_s": other["ttft_p90_s"],
        "cost_ttft_p90_s": median(ours),
        "ratio": other["ttft_p90_s"] / median(ours),
    }


def losses_at(rows: Sequence[Row], other: str) -> list[dict[str, Any]]:
    """In which figures `other` beats "cost" at one load by more than chance."""
    losses = []
    for figure in (*BETTER_LOW, *BETTER_HIGH):
        ours = [row[figure] for row in rows if row["policy"] == "cost"]
        theirs = [row[figure] for row in rows if row["policy"] == other]
        if not ours or not theirs:
            continue
        worse_by = median(ours) - median(theirs)
        if figure in BETTER_HIGH:
            worse_by = -worse_by
        noise = max(max(ours) - min(ours), max(theirs) - min(theirs), NOISE_SHARE * median(theirs))
        if worse_by > noise:
            losses.append(
                {
                    "speed": rows[0]["speed"],
                    "cluster": rows[0]["cluster"],
                    "against": other,
                    "figure": figure,
                    "cost": median(ours),
                    "other": median(theirs),
                    "noise": noise,
                }
            )
    return losses


def _notes(found: Mapping[str, Any]) -> list[str]:
    trace, notes = found["trace"], []
    if against := found["round_robin"]:
        notes.append(
            f"{trace}: at x{against['speed']:g}, the highest load that round-robin keeps up with, its TTFT p90 is "
            f"{against['round_robin_ttft_p90_s']:.3f} s and that of cost {against['cost_ttft_p90_s']:.3f} s: "
            f"{against['ratio']:.1f} times less"
        )
    if found["least_oracle_hit_share"] is not None:
        notes.append(
            f"{trace}: cost has at least {found['least_oracle_hit_share']:.1%} of the prefix hits of an oracle; a"
            f" prefill worker is idle while a prompt waits somewhere for at most {found['most_idle_prefill']:.2%}"
            f" of the time, a decode worker {found['most_idle_decode']:.2%}"
        )
    notes.extend(
        f"{trace} x{loss['speed']:g}, {loss['cluster']}: cost loses against {loss['against']!r} in {loss['figure']}:"
        f" {loss['cost']:.3f} to {loss['other']:.3f}"
        for loss in found["losses"]
    )
    return notes
