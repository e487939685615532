"""Which tokens does the prompt of a recorded request have? Those that share the prefixes that were shared."""

from __future__ import annotations

import numpy as np

from kvrelay.workload.trace import TraceRequest

_BLOCK, _REST = 0, 1
"""What a random stream is for; keeps those of blocks and requests apart."""


def prompt_token_ids(request: TraceRequest, vocab_size: int, *, first_token_id: int = 0, seed: int = 0) -> list[int]:
    """`num_prompt_tokens` ids of `first_token_id` up to `vocab_size`, without the latter.

    A block's tokens depend on its id and the seed alone: prompts share prefixes exactly as their block ids do, across
    processes and machines. What no block id covers is the request's own. Raises `ValueError` when no id is left.
    """
    if not 0 <= first_token_id < vocab_size:
        raise ValueError(f"first_token_id is {first_token_id}; it must be from 0 to below vocab_size, {vocab_size}")
    streams = [(_BLOCK, block_id) for block_id in request.block_ids] or [(_REST, request.index)]
    num_tokens = request.block_tokens if request.block_ids else request.num_prompt_tokens
    parts = [
        np.random.default_rng((seed, *stream)).integers(first_token_id, vocab_size, num_tokens) for stream in streams
    ]
    token_ids: list[int] = np.concatenate(parts)[: request.num_prompt_tokens].tolist()
    return token_ids
