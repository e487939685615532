"""What is asked of the cluster, as the coordinator's front end has validated it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.coordinator.request_terms import STANDARD_TERMS, RequestTerms
from kvrelay.v1 import common_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sequence that is asked for; `sampling` has max_tokens and everything else resolved."""

    request_id: str
    sampling: common_pb2.SamplingParams
    generated_token_ids: Sequence[int] = ()
    """What the client has of it already, from a coordinator that was lost."""
    is_finished: bool = False
    """The client has all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRequest:
    """A prompt and the completions of it."""

    request_id: str
    """Unique; the id of the only completion, or else of their parent."""
    external_id: str
    prompt_token_ids: Sequence[int]
    completions: Sequence[Completion]
    max_model_len_tokens: int
    cache_salt: str = ""
    priority: int = 0
    terms: RequestTerms = STANDARD_TERMS
    """Its `ttft_s` counts from when the request is dispatched."""

    @property
    def open_completions(self) -> Sequence[Completion]:
        """Those of which something is to come."""
        return [completion for completion in self.completions if not completion.is_finished]

    @property
    def longest(self) -> Sequence[int]:
        """The prompt, and what the client has already of the completion of which it has most."""
        had = max((completion.generated_token_ids for completion in self.open_completions), key=len)
        return [*self.prompt_token_ids, *had] if had else self.prompt_token_ids

    @property
    def has_begun(self) -> bool:
        """Whether a coordinator that was lost has given the client some of it."""
        return any(completion.generated_token_ids for completion in self.completions)
