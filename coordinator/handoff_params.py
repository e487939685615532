"""What of a request's sampling goes to the prefill worker and what to the decode worker."""

from __future__ import annotations

from kvrelay.v1 import common_pb2

GREEDY_BELOW = 1e-5
"""vLLM samples greedily below this temperature (vllm/sampling_params.py, _SAMPLING_EPS)."""


def exact_on_prefill(params: common_pb2.SamplingParams, num_sequences: int) -> bool:
    """Whether a token sampled by the prefill worker leaves the decode worker as one engine would be.

    Not so where the sampler keeps state over the output: a seeded generator that has advanced,
    penalties and bad words over what was generated, min_tokens, a grammar, several sequences.
    """
    return not (
        num_sequences != 1 or keeps_sampler_state(params) or params.repetition_penalty != 1.0 or params.min_tokens
    )


def keeps_sampler_state(params: common_pb2.SamplingParams) -> bool:
    """Whether a sampler goes by more than the tokens so far: which of them it has generated, how often it has drawn.

    Not so for a repetition penalty, which counts the prompt as well.
    """
    seeded = params.HasField("seed") and params.temperature >= GREEDY_BELOW
    return bool(
        seeded
        or params.presence_penalty
        or params.frequency_penalty
        or params.bad_words_token_ids
        or params.HasField("structured_output")
    )


def prefill_params(params: common_pb2.SamplingParams, *, exact: bool) -> common_pb2.SamplingParams:
    """One token as asked for where it counts, else the cheapest one; prompt log probabilities either way."""
    if exact:
        first = common_pb2.SamplingParams()
        first.CopyFrom(params)
        first.max_tokens = 1
        return first
    first = common_pb2.SamplingParams(
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        min_tokens=0,
        ignore_eos=True,
        max_tokens=1,
    )
    if params.HasField("prompt_logprobs"):
        first.prompt_logprobs = params.prompt_logprobs
    return first


def decode_params(params: common_pb2.SamplingParams, *, num_sampled: int, prefilled: bool) -> common_pb2.SamplingParams:
    """The rest of the request after `num_sampled` tokens.

    After a prefill elsewhere the prompt's log probabilities are known, and asking again would forbid
    the engine to use the KV blocks it was sent.
    """
    rest = common_pb2.SamplingParams()
    rest.CopyFrom(params)
    rest.max_tokens = params.max_tokens - num_sampled
    rest.min_tokens = max(0, params.min_tokens - num_sampled)
    if prefilled:
        rest.ClearField("prompt_logprobs")
    return rest
