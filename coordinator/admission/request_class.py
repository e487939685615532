"""Which kinds of requests are told apart, and what does each ask for when it does not say?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestClass:
    name: str
    weight: float
    """Of the tokens that leave the queue, relative to the other classes that wait."""
    ttft_s: float | None = None
    """Most seconds to the first token; None: any."""
    itl_s: float | None = None
    """Most seconds between two tokens; None: any."""


INTERACTIVE = RequestClass(name="interactive", weight=16.0, ttft_s=10.0, itl_s=0.2)
STANDARD = RequestClass(name="standard", weight=4.0, ttft_s=120.0)
BATCH = RequestClass(name="batch", weight=1.0)

CLASSES: Mapping[str, RequestClass] = {kind.name: kind for kind in (INTERACTIVE, STANDARD, BATCH)}
"""The most urgent first."""
