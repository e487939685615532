"""What is simulated? Workers, what they are made of, and how they tell coordinators of themselves."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvrelay.coordinator.admission.config import AdmissionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What an engine has room for."""

    max_batched_tokens: int = 2048
    """In one step; longer prompts are computed in chunks."""
    max_running_requests: int = 256
    capacity_tokens: int = 1_300_000
    """KV of its own; a prompt with its answer must fit."""

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.max_running_requests > self.max_batched_tokens:
            raise ValueError(
                f"max_running_requests, {self.max_running_requests}, is over max_batched_tokens,"
                f" {self.max_batched_tokens}: every running sequence needs a token of each step"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What holds and moves blocks. The defaults are those of eight GPUs on a host and Llama 2 70B in 16 bits."""

    block_tokens: int = 512
    """As in Mooncake's traces. With smaller blocks hits hardly change, but everything takes longer to simulate."""
    token_bytes: int = 2 * 80 * 8 * 128 * 2
    store_bytes: int = 1 << 40
    """Of host memory, for blocks."""
    load_bytes_per_s: float = 100e9
    """From the host store into the engine, all GPUs together."""
    link_bytes_per_s: float = 25e9
    """Between any two workers."""
    message_s: float = 0.001
    """For a message between two processes."""

    def __post_init__(self) -> None:
        _check_positive(self)

    @property
    def num_store_blocks(self) -> int:
        return max(1, self.store_bytes // (self.block_tokens * self.token_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The workers, all alike."""

    num_prefill: int = 8
    num_decode: int = 16
    num_both: int = 0
    """Workers with both roles."""
    engine: EngineLimits = field(default_factory=EngineLimits)
    hardware: Hardware = field(default_factory=Hardware)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    """Of each coordinator's queue."""
    report_interval_s: float = 0.25
    """Between two reports of a worker's load."""
    publish_interval_s: float = 0.2
    """Between two deltas of its blocks."""
    publish_delay_s: float = 0.01
    """From a delta's publication until coordinators have it."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("report_interval_s", "publish_interval_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be over 0")
        for name in ("num_prefill", "num_decode", "num_both", "publish_delay_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be below 0")
        if not self.num_decode + self.num_both:
            raise ValueError("there is no decode worker; at least one must generate")


def _check_positive(limits: EngineLimits | Hardware) -> None:
    for name in limits.__slots__:
        if getattr(limits, name) <= 0:
            raise ValueError(f"{name} is {getattr(limits, name)}; it must be over 0")
