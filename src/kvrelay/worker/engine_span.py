"""What was the engine's part of a request, as a span?"""

from __future__ import annotations

from kvrelay.tracing import Tracing
from kvrelay.worker.work import Work


def trace_engine(tracing: Tracing, work: Work) -> None:
    """A span of a request that has its last token, made from the times that the engine told."""
    if not tracing.enabled:
        return
    times = {event.name.removeprefix(f"{work.name}."): event.unix_ns for event in work.timeline.events}
    start, end = times.get("queued"), times.get("last_token")
    span = tracing.start_span("engine." + work.name, work.trace, start_unix_ns=start)
    for name in ("scheduled", "sampled"):
        if name in times:
            span.event(name, times[name])
    span.set({"prompt.tokens": len(work.prompt_token_ids), **work.timeline.counters})
    span.end(end)
