"""How much may wait, and where?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """The queue of one coordinator process."""

    max_requests: int = 2048
    max_tokens: int = 8_000_000
    """Of prompts, and of answers as far as they are known. A request that waits alone may have more."""
    max_tenant_share: float = 0.75
    """Of either bound; what is left is for other tenants."""
    quantum_tokens: int = 8192
    """What a tenant takes at its turn."""
    dispatch_ahead_s: float = 0.25
    """For how long a worker has work when it is given more: less is fairer, too little lets workers stand idle."""
    expected_output_tokens: int = 256
    """Of a sequence, when the request allows as many or does not say."""
