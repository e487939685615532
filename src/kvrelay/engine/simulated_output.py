"""How does a simulated token become the delta that a worker sends?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvrelay.engine.simulated_batch import SequenceState
from kvrelay.engine.simulated_model import SimulatedConfig, TokenChain, top_tokens
from kvrelay.v1 import common_pb2, worker_pb2


@dataclass(frozen=True, slots=True)
class Sampled:
    """One generated token."""

    token_id: int
    digest: bytes
    """Digest of all tokens before it."""
    finish_reason: common_pb2.FinishReason.ValueType
    stop_token_id: int | None
    """The token, if it ended the request and is not EOS."""


def to_delta(config: SimulatedConfig, sequence: SequenceState, sampled: Sampled) -> worker_pb2.TokenDelta:
    """The delta for a token that was just appended to `sequence`."""
    sampling = sequence.request.sampling
    delta = worker_pb2.TokenDelta(
        request_id=sequence.request.request_id,
        token_ids=[sampled.token_id],
        finish_reason=sampled.finish_reason,
        stop_token_id=sampled.stop_token_id,
    )
    if sampling.HasField("logprobs"):
        rows = [(sampled.digest, sampled.token_id)]
        delta.logprobs.CopyFrom(_logprobs(config, rows, sampling.logprobs))
    if len(sequence.output_token_ids) == 1:
        delta.num_cached_tokens = sequence.request.kv.load_tokens
        if sampling.HasField("prompt_logprobs"):
            rows = _prompt_rows(config, sequence.request.prompt_token_ids)
            delta.prompt_logprobs.CopyFrom(_logprobs(config, rows, sampling.prompt_logprobs))
    return delta


def _prompt_rows(config: SimulatedConfig, prompt: Iterable[int]) -> list[tuple[bytes, int]]:
    chain = TokenChain(config)
    rows = []
    for token in prompt:
        rows.append((chain.digest(), token))
        chain.append([token])
    return rows[1:]


def _logprobs(config: SimulatedConfig, rows: list[tuple[bytes, int]], num_top: int) -> common_pb2.Logprobs:
    """Rows of the chosen token, then the `num_top` most likely ones, of which it is the first. -1: all."""
    num_top = config.vocab_size if num_top < 0 else min(num_top, config.vocab_size)
    logprobs = common_pb2.Logprobs(width=num_top + 1, sampled_ranks=[1] * len(rows))
    for digest, token in rows:
        top = top_tokens(config, digest, token, max(1, num_top))
        for token_id, logprob in [top[0], *top[:num_top]]:
            logprobs.token_ids.append(token_id)
            logprobs.logprobs.append(logprob)
    return logprobs
