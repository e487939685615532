"""The limits of a request that are checked before anything of it leaves the coordinator."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vllm.sampling_params import SamplingParams

from kvrelay.errors import InvalidRequestError

PRIORITY_LIMIT = 2**31
MAX_N = 128
"""Completions of one prompt: each is a sequence on the same decode worker."""
MAX_CACHE_SALT_CHARS = 128
MAX_CONSTRAINT_BYTES = 64 * 1024
"""A grammar compiles in seconds at this size, in the engine; time grows with the square of it."""


def check_prompt(token_ids: Sequence[int], *, max_model_len_tokens: int, vocab_size: int) -> None:
    """Raises `InvalidRequestError` unless the prompt and one more token fit, and every id is the model's.

    An id past the model's embedding would end the engine, so the tokenizer's larger range does not count.
    """
    if not token_ids:
        raise InvalidRequestError("the prompt is empty; it needs at least one token", field="prompt")
    if len(token_ids) >= max_model_len_tokens:
        raise InvalidRequestError(
            f"the prompt has {len(token_ids)} tokens; together with at least one generated token it must fit "
            f"into the model's context of {max_model_len_tokens} tokens",
            field="prompt",
        )
    check_token_ids(token_ids, vocab_size, field="prompt")


def check_token_ids(token_ids: Sequence[int], vocab_size: int, *, field: str) -> None:
    """Raises `InvalidRequestError` for an id that is not the model's."""
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{field} has the token id {token_id}; ids must be from 0 to {vocab_size - 1}", field=field
            )


def check_request(params: SamplingParams, priority: int, *, max_completions: int) -> None:
    """Raises `InvalidRequestError` for what no worker should see."""
    if params.n > max_completions:
        raise InvalidRequestError(f"n is {params.n}; at most {max_completions} completions are offered", field="n")
    if not -PRIORITY_LIMIT <= priority < PRIORITY_LIMIT:
        raise InvalidRequestError(f"priority is {priority}; it must fit into 32 bits", field="priority")
    _check_constraint(params)


def _check_constraint(params: SamplingParams) -> None:
    constraint = params.structured_outputs
    if constraint is None:
        return
    texts = [constraint.json, constraint.regex, constraint.grammar, constraint.structural_tag, constraint.choice]
    num_bytes = sum(len(text if isinstance(text, str) else json.dumps(text)) for text in texts if text)
    if num_bytes > MAX_CONSTRAINT_BYTES:
        raise InvalidRequestError(
            f"structured_output has {num_bytes} bytes; at most {MAX_CONSTRAINT_BYTES} are taken",
            field="structured_output",
        )


def clamp_max_tokens(params: SamplingParams, num_prompt_tokens: int, max_model_len_tokens: int) -> None:
    """Ask for no more tokens than the context has room for: one engine would stop there, too.

    Raises `InvalidRequestError` when min_tokens cannot be reached.
    """
    room = max_model_len_tokens - num_prompt_tokens
    params.max_tokens = min(params.max_tokens or room, room)
    if params.min_tokens > params.max_tokens:
        raise InvalidRequestError(
            f"min_tokens is {params.min_tokens}; a prompt of {num_prompt_tokens} tokens leaves room for "
            f"{params.max_tokens} in a context of {max_model_len_tokens}",
            field="min_tokens",
        )
