"""Which requests does a replay send, when, and how long?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from kvrelay.client.replay.open_loop import PlannedRequest
from kvrelay.workload.prompts import prompt_token_ids
from kvrelay.workload.request_form import TooLong
from kvrelay.workload.trace import TraceRequest

_SPECIAL_TOKENS = 1000
"""Ids below this are often those of special tokens and single bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What the model takes."""

    max_model_len_tokens: int | None = None
    """Prompt and answer; None lets everything through."""
    too_long: TooLong = TooLong.CLIP
    vocab_size: int = 32_000
    """Prompts have ids below this."""
    seed: int = 0
    """Other seeds, other prompts that share their prefixes in the same way: what is cached does not help them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    requests: Sequence[PlannedRequest]
    """In the order in which they are due."""
    num_clipped: int
    num_skipped: int


def plan(trace: Iterable[TraceRequest], fit: Fit) -> Plan:
    """The requests of the trace as they are to be sent; prompts are made when they are needed."""
    requests: list[PlannedRequest] = []
    num_clipped = num_skipped = 0
    for request in trace:
        fitting = _fitting(request, fit.max_model_len_tokens)
        if fitting != request and fit.too_long is TooLong.SKIP:
            num_skipped += 1
            continue
        num_clipped += fitting != request
        first_id = min(_SPECIAL_TOKENS, fit.vocab_size // 2)
        requests.append(
            PlannedRequest(
                index=request.index,
                due_s=request.arrived_s,
                num_prompt_tokens=fitting.num_prompt_tokens,
                max_tokens=fitting.num_output_tokens,
                token_ids=partial(prompt_token_ids, fitting, fit.vocab_size, first_token_id=first_id, seed=fit.seed),
            )
        )
    return Plan(requests=requests, num_clipped=num_clipped, num_skipped=num_skipped)


def _fitting(request: TraceRequest, most_tokens: int | None) -> TraceRequest:
    if most_tokens is None or request.num_prompt_tokens + request.num_output_tokens <= most_tokens:
        return request
    num_output_tokens = min(request.num_output_tokens, most_tokens - 1)
    num_prompt_tokens = min(request.num_prompt_tokens, most_tokens - num_output_tokens)
    num_blocks = -(-num_prompt_tokens // request.block_tokens)
    return replace(
        request,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        block_ids=request.block_ids[:num_blocks],
    )
