"""One request inside a simulated engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from kvrelay.simulator.timing import Seconds


class SequenceListener(Protocol):
    """Who is told what an engine does with a sequence, between two steps. Must not submit to that engine at once."""

    def on_started(self, sequence: EngineSequence) -> None:
        """The engine has room for it and works on it from now on; once, preempted or not.

        More of its prompt may have been stored meanwhile: `num_computed_tokens` may be raised here.
        """

    def on_computed(self, sequence: EngineSequence) -> None:
        """`num_computed_tokens` of its prompt have their KV now."""

    def on_first_token(self, sequence: EngineSequence) -> None:
        """Its first token here is there; `on_finished` follows at once if that was all."""

    def on_finished(self, sequence: EngineSequence) -> None:
        """All its tokens are there; the engine has forgotten it."""


@dataclass(slots=True, eq=False, kw_only=True)
class EngineSequence:
    """Prompt tokens to have, output tokens to generate."""

    listener: SequenceListener
    num_prompt_tokens: int
    num_computed_tokens: int
    """Of the prompt: loaded from the store at first; less than the prompt."""
    num_output_tokens: int
    load_s: float = 0.0
    """To bring what is stored of it into the engine; the step that begins with it takes so much longer."""
    num_queued_tokens: int = 0
    """What its worker reports of it until the first token."""
    num_generated_tokens: int = 0
    token_times_s: list[Seconds] = field(default_factory=list)
    """When the generated tokens came, piece by piece; pieces may be shared between sequences."""
    started: bool = False

    @property
    def num_tokens(self) -> int:
        """Those that it has: the prompt and what was generated."""
        return self.num_prompt_tokens + self.num_generated_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Before it can decode; those generated before a preemption count."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_missing_tokens(self) -> int:
        """Output tokens that are still to come."""
        return self.num_output_tokens - self.num_generated_tokens
