"""What can be tuned in the cost policy?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class CostConfig:
    """The defaults suit interactive use: see docs/adr/0015-scheduling.md for how they were found."""

    local_prefill: Literal["when-cheaper", "never", "always"] = "when-cheaper"
    """Whether decode workers compute prompts; "never" lets them only where no prefill worker can."""
    decode_weight: float = 0.08
    """What a second that a generating sequence loses counts, beside a second before a first token.

    As the targets stand to each other: a delay of 1 % is 20 ms of a TTFT of 2 s, and 256 ms of 256 tokens at 100 ms.
    """
    crowding_weight: float = 0.5
    """What a second of a worker's time counts for each prompt that waits at one, on average: others come after."""
    max_crowding: float = 4.0
    expected_output_tokens: int = 256
    """Of a sequence, when the request allows as many or does not say."""
    overlap_share: float = 0.9
    """Of the computing of a prompt, during which its blocks can travel already."""
    local_bytes_per_s: float = 4e9
    """Between workers on one host that have not been measured; shared memory."""
    remote_bytes_per_s: float = 1e9
    load_bytes_per_s: float = 50e9
    """From a worker's host memory into its engine: that of a GPU on PCIe 5.0. It is not measured; half or
    twice of it hardly changes what is served how (docs/adr/0015-scheduling.md)."""
    near_share: float = 0.03
    """Plans whose costs differ by less than this share of the TTFT are equal: predictions are not better than that."""
    near_s: float = 0.002
    """The same for short ones."""
    num_kept: int = 3
    """Prefill workers and decode workers that are paired with each other, the best of each kind."""
