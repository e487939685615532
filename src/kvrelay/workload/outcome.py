"""What became of one request of a load, on a real cluster or in the simulator?"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class Status(enum.StrEnum):
    COMPLETED = "completed"
    REJECTED = "rejected"
    """Refused before its first token: 429 or 503."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Times are seconds since the load began."""

    index: int
    """In the trace."""
    arrived_s: float
    """When it was due: what a load generator loses counts, too."""
    status: Status
    num_prompt_tokens: int
    num_output_tokens: int = 0
    """Generated."""
    num_cached_tokens: int = 0
    """Of the prompt, not computed again."""
    token_times_s: Sequence[float] = ()
    """When each token came."""
    error: str = ""
