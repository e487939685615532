"""What does the queue know of a request?"""

from __future__ import annotations

from dataclasses import dataclass

from kvrelay.coordinator.admission.request_class import STANDARD, RequestClass


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """One request; equal to itself only."""

    num_tokens: int
    """What it costs the cluster: the prompt, and the answer as far as it is known. At least 1."""
    tenant: str = ""
    request_class: RequestClass = STANDARD
    priority: int = 0
    """Among those of its tenant and class: lower is served earlier."""
    ttft_s: float | None = None
    """Most seconds to the first token."""
    queued_at_s: float | None = None
    """By the queue's clock; None when it did not have to wait."""
