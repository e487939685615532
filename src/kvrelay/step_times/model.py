"""How long does an engine take for a prompt, and for a step of decoding? A formula and its coefficients."""

from __future__ import annotations

from dataclasses import dataclass

from kvrelay.v1 import cluster_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Coefficients of one engine; seconds. The defaults are a guess for an engine of which nothing is known."""

    prefill_fixed_s: float = 0.005
    prefill_token_s: float = 1e-4
    prefill_pair_s: float = 0.0
    """For each pair of a computed token and one that it attends to."""
    num_prefills: int = 0
    """What the fit rests on; 0: a guess."""
    step_fixed_s: float = 0.02
    step_request_s: float = 1e-4
    step_context_token_s: float = 0.0
    num_steps: int = 0

    def prefill_s(self, num_tokens: int, num_context_tokens: int = 0) -> float:
        """To compute `num_tokens` behind `num_context_tokens` whose KV is there; 0 for no tokens."""
        if num_tokens <= 0:
            return 0.0
        pairs = num_tokens * (num_context_tokens + num_tokens / 2)
        return self.prefill_fixed_s + self.prefill_token_s * num_tokens + self.prefill_pair_s * pairs

    def step_s(self, num_requests: int, num_context_tokens: int = 0) -> float:
        """One decode step of so many sequences, with so many tokens of context in all."""
        return self.step_fixed_s + self.step_request_s * num_requests + self.step_context_token_s * num_context_tokens

    def to_proto(self) -> cluster_pb2.StepTimes:
        return cluster_pb2.StepTimes(**{name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def of(cls, message: cluster_pb2.StepTimes) -> StepTimes:
        return cls(**{name: getattr(message, name) for name in cls.__slots__})
