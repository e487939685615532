"""What does a replay tell of itself, beside how the load was served?"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvrelay.client.replay.open_loop import Replayed
from kvrelay.client.replay.planning import Plan

_LATE_S = 0.05


def details_of(replayed: Replayed, plan: Plan) -> dict[str, Any]:
    """Ready for JSON."""
    delays_s = np.asarray(replayed.send_delays_s)
    p50, p99, most = np.percentile(delays_s, (50, 99, 100)).tolist() if delays_s.size else (None, None, None)
    return {
        "num_planned": replayed.num_planned,
        "num_unfinished": replayed.num_unfinished,
        "num_clipped": plan.num_clipped,
        "num_skipped": plan.num_skipped,
        "num_waited_for_connection": replayed.num_waited,
        "send_delay_s": {"p50": p50, "p99": p99, "max": most},
        "rejections_by_status": {str(status): count for status, count in sorted(replayed.rejections.items())},
        "retry_after_s": _median_and_most(replayed.retry_after_s),
    }


def notes(details: dict[str, Any], max_connections: int) -> list[str]:
    """Sentences for people: what they must know to believe the figures."""
    said = []
    if details["num_unfinished"]:
        said.append(f"Interrupted: {details['num_unfinished']:,} of {details['num_planned']:,} requests are left out.")
    if details["num_clipped"]:
        said.append(f"{details['num_clipped']:,} requests were cut to fit into the model's context.")
    if details["num_skipped"]:
        said.append(f"{details['num_skipped']:,} requests of the trace were skipped: too long for the model's context.")
    if details["num_waited_for_connection"]:
        said.append(
            f"Not an open loop: {details['num_waited_for_connection']:,} requests waited for one of {max_connections:,}"
            " connections; the wait counts in their latency. More: --max-connections."
        )
    late_s = details["send_delay_s"]["p99"]
    if late_s is not None and late_s > _LATE_S:
        said.append(f"Requests were sent late (p99 {late_s:.3f} s): this machine does not keep up with the load.")
    if details["rejections_by_status"]:
        counts = ", ".join(f"{count:,} with {status}" for status, count in details["rejections_by_status"].items())
        waits = details["retry_after_s"]
        asked = f"; Retry-After p50 {waits['p50']:g} s, at most {waits['max']:g} s" if waits["p50"] is not None else ""
        said.append(f"Rejected: {counts}{asked}.")
    return said


def _median_and_most(values: list[float]) -> dict[str, float | None]:
    return {"p50": float(np.median(values)) if values else None, "max": max(values, default=None)}
