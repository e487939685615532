"""Which values of the sampling parameters are taken, whatever API they come by?"""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message

from kvrelay.coordinator.json_checks import (
    Check,
    boolean,
    integer,
    logit_bias,
    number,
    strings,
    token_ids,
)
from kvrelay.coordinator.request_limits import RequestBounds
from kvrelay.v1 import common_pb2

_INT31 = 2**31 - 1
_INT64 = 2**63 - 1

SAMPLING: dict[str, Check] = {
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "repetition_penalty": number(0.01, 10),
    "temperature": number(0, 2),
    "top_p": number(1e-6, 1),
    "top_k": integer(-1, _INT31),
    "min_p": number(0, 1),
    "seed": integer(-(2**63), _INT64),
    "min_tokens": integer(0, lambda bounds: bounds.max_model_len_tokens),
    "ignore_eos": boolean,
    "stop": strings(
        lambda bounds: bounds.limits.max_stop_strings, lambda bounds: bounds.limits.max_stop_chars, or_one=True
    ),
    "stop_token_ids": token_ids(lambda bounds: bounds.limits.max_stop_token_ids),
    "include_stop_str_in_output": boolean,
    "logit_bias": logit_bias,
    "allowed_token_ids": token_ids(lambda bounds: bounds.vocab_size),
    "bad_words": strings(lambda bounds: bounds.limits.max_bad_words, lambda bounds: bounds.limits.max_bad_word_chars),
    "prompt_logprobs": integer(0, lambda bounds: bounds.max_logprobs),
    "skip_special_tokens": boolean,
    "spaces_between_special_tokens": boolean,
    "n": integer(1, lambda bounds: bounds.limits.max_n),
}
"""Those that both APIs have, under the same names."""

_ONLY_GRPC: dict[str, Check] = {"logprobs": integer(0, lambda bounds: bounds.max_logprobs)}


def check_sampling(message: common_pb2.SamplingParams, bounds: RequestBounds) -> None:
    """Raises `InvalidRequestError` for the first field that is set to what the OpenAI API would not take either."""
    for field, value in message.ListFields():
        check = SAMPLING.get(field.name) or _ONLY_GRPC.get(field.name)
        if check is not None:
            check(field.name, _plain(field.name, value), bounds)


def _plain(name: str, value: Any) -> Any:
    """As it would come out of JSON."""
    if name == "logit_bias":
        return {str(token_id): bias for token_id, bias in value.items()}
    return value if isinstance(value, bool | int | float | str | Message) else list(value)
