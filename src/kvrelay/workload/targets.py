"""What must a request keep to count as good?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Most seconds, inclusive; None asks for nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    """The mean gap of the request."""
    itl_s: float | None = None
    """Its longest gap."""
    e2e_s: float | None = None
