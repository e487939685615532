"""What one request may ask for, over HTTP or gRPC, beyond what the model itself limits."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config import ModelConfig

from kvrelay.coordinator.prompt_limits import MAX_CONSTRAINT_BYTES, MAX_N


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    max_body_bytes: int = 16 * 1024 * 1024
    """Larger bodies are refused with 413 while they are read, larger messages by gRPC."""
    body_timeout_s: float = 60.0
    """How long a client may take to send its body."""
    max_json_depth: int = 64
    """Nesting of objects and arrays."""
    max_n: int = MAX_N
    """Completions of one prompt."""
    max_completions: int = 1024
    """n times the number of prompts."""
    max_messages: int = 4096
    max_tools: int = 128
    max_tools_bytes: int = 256 * 1024
    max_constraint_bytes: int = MAX_CONSTRAINT_BYTES
    """Of a JSON schema, regular expression or grammar; compiling one of this size takes an engine some seconds."""
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    """Of one stop string; so many characters of a stream are held back."""
    max_stop_token_ids: int = 256
    max_logit_biases: int = 1024
    max_bad_words: int = 128
    max_bad_word_chars: int = 256
    max_tokenize_chars: int = 1024 * 1024
    """Of a text or chat to tokenize, which need not fit into the model's context."""
    max_detokenize_tokens: int = 128 * 1024
    retry_after_s: int = 1
    """Sent with 429 and 503."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBounds:
    """The limits of one request: the coordinator's and, at this moment, the model's."""

    limits: RequestLimits
    vocab_size: int
    max_model_len_tokens: int
    max_logprobs: int


def bounds_now(limits: RequestLimits, model_config: ModelConfig) -> RequestBounds:
    """The model's context length follows the smallest of the workers, so it is read for each request."""
    return RequestBounds(
        limits=limits,
        vocab_size=model_config.get_vocab_size(),
        max_model_len_tokens=model_config.max_model_len,
        max_logprobs=model_config.max_logprobs,
    )
