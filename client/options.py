"""What can a caller ask for? The prompt's three forms and the options of one generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


Messages = Sequence[Message] | Sequence[Mapping[str, str]]
Prompt = str | Sequence[int] | Messages
"""Text, token ids, or a conversation, to which the chat template applies."""


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen. What is left out has the model's own default; ranges are those of vLLM."""

    n: int
    temperature: float
    """0 always takes the most likely token."""
    top_p: float
    top_k: int
    min_p: float
    seed: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    logprobs: int
    """Number of most likely tokens to report for each generated one."""
    prompt_logprobs: int
    """The same for each token of the prompt but the first."""
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    bad_words: Sequence[str]
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    json_schema: str | Mapping[str, Any]
    """The output is JSON of this schema. At most one of this and the next four."""
    json_object: bool
    regex: str
    choice: Sequence[str]
    grammar: str


class GenerateOptions(SamplingOptions, total=False):
    """Everything but the prompt."""

    model: str
    """Needed only when the cluster serves several."""
    request_id: str
    """At most 128 characters of `[A-Za-z0-9._-]`; chosen by the cluster when left out."""
    cache_salt: str
    """Cached KV blocks are shared only among requests of the same salt."""
    priority: int
    """Lower is served earlier among the requests of a tenant and class; 0 when left out."""
    request_class: str
    """`interactive`, `standard` or `batch`; `standard` when left out. It brings targets where the next two do not."""
    ttft_s: float
    """Most seconds to the first token. What cannot be in time is refused at once: `OverloadedError.retry_after_s`."""
    itl_s: float
    """Most seconds between two tokens."""
    tenant: str
    """Whom the request counts for: tenants share the cluster evenly by tokens."""
    include_timeline: bool
    timeout_s: float
    """The whole call ends with `DeadlineError` after this long."""
