"""What does the scheduler know of a worker, and of a request?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvrelay.step_times.model import StepTimes
from kvrelay.v1 import cluster_pb2

_PREFILLING = frozenset((cluster_pb2.ROLE_PREFILL, cluster_pb2.ROLE_BOTH))
_DECODING = frozenset((cluster_pb2.ROLE_DECODE, cluster_pb2.ROLE_BOTH))


@dataclass(slots=True, kw_only=True)
class WorkerView:
    """One connected worker; the pool keeps the figures current. Loads are of all coordinators together."""

    worker_id: str
    role: cluster_pb2.Role.ValueType
    model: str
    address: str
    fingerprint: bytes
    block_size_tokens: int
    max_model_len_tokens: int
    token_bytes: int = 0
    """KV of one token, all layers and heads; 0 when unknown."""
    capacity_tokens: int = 0
    """KV that the engine has room for; 0 when unknown."""
    max_running_requests: int = 0
    """Sequences that the engine computes at a time; 0 when unknown."""
    weight: float = 1.0
    draining: bool = False
    avoided: bool = False
    """It fails requests or is far slower than it should be: only what would go nowhere else goes there."""
    num_queued_prompt_tokens: int = 0
    """Prompt tokens given to it, whoever computes the prompt, and not yet computed; those that it finds stored left out
    as far as that is known."""
    num_queued_prompts: int = 0
    num_running_requests: int = 0
    """Sequences that are its to generate, those still in prefill elsewhere included."""
    num_context_tokens: int = 0
    """Of these sequences: prompts, and what was generated."""
    num_assigned: int = 0
    """Requests it was ever given; breaks ties."""
    times: StepTimes = field(default_factory=StepTimes)
    link_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    """To other workers, by their address; measured, so those it has pushed to."""

    @property
    def prefills(self) -> bool:
        """Whether its role is to prefill for others."""
        return self.role in _PREFILLING

    @property
    def decodes(self) -> bool:
        return self.role in _DECODING

    def serves(self, model: str) -> bool:
        """Whether it generates for this model, and goes on to."""
        return self.decodes and not self.draining and self.model == model


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestShape:
    """What of a request its plan depends on."""

    model: str
    num_prompt_tokens: int
    num_sequences: int = 1
    max_tokens: int = 0
    """Most tokens of each sequence; 0 when unknown."""
    num_stored_blocks: Mapping[str, int] = field(default_factory=dict)
    """Worker id -> blocks of the prompt's prefix that it has. Who has none may be left out."""
    ttft_s: float | None = None
    """Most seconds to the first token."""
    itl_s: float | None = None
    """Most seconds between two tokens."""
    may_split: bool = True
    """Whether a prefill worker may compute the prompt for another."""
