"""What does a role hand to the engine for one request?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvrelay.v1 import common_pb2, worker_pb2


@dataclass(slots=True, kw_only=True)
class Work:
    """What a role submits. `timeline` goes out with the last tokens."""

    name: str
    """Of the role; the timeline's events begin with it."""
    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: common_pb2.SamplingParams
    cache_salt: str
    priority: int
    trace: common_pb2.TraceContext
    num_generated_tokens: int = 0
    """At the prompt's end, of which the sampler keeps account."""
    timeline: common_pb2.Timeline = field(default_factory=common_pb2.Timeline)

    @classmethod
    def of(cls, request: worker_pb2.Prefill | worker_pb2.Decode, name: str) -> Work:
        """A coordinator's request, received now."""
        work = cls(
            name=name,
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            cache_salt=request.cache_salt,
            priority=request.priority,
            trace=request.trace,
            num_generated_tokens=request.num_generated_tokens if isinstance(request, worker_pb2.Decode) else 0,
        )
        work.mark("received")
        return work

    def note_restored(self, num_tokens: int) -> None:
        """So many of the prompt's tokens were read from disk."""
        if num_tokens:
            self.timeline.counters[f"{self.name}.tokens_restored"] = num_tokens

    def mark(self, event: str, unix_ns: int | None = None) -> None:
        """Note that something happened, now unless told otherwise."""
        self.timeline.events.add(name=f"{self.name}.{event}", unix_ns=unix_ns or time.time_ns())
