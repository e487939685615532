"""A client's sampling message as vLLM's parameters, before vLLM's front end completes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

from kvrelay.errors import InvalidRequestError
from kvrelay.sampling import structured_to_vllm
from kvrelay.v1 import common_pb2

_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "logprobs",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)


def client_sampling(message: common_pb2.SamplingParams, model_defaults: Mapping[str, Any]) -> SamplingParams:
    """Absent fields take the model's defaults, or else those named in the message's definition.

    Raises `InvalidRequestError`, or vLLM's validation error, for values out of range.
    """
    _refuse_resolved(message)
    given = {field.name for field, _ in message.ListFields()}
    values: dict[str, Any] = {"max_tokens": None, **model_defaults}
    values |= {name: getattr(message, name) for name in _FIELDS if name in given}
    if message.HasField("structured_output"):
        values["structured_outputs"] = structured_to_vllm(message.structured_output)
    return SamplingParams.from_optional(
        stop=list(message.stop),
        stop_token_ids=list(message.stop_token_ids),
        bad_words=list(message.bad_words),
        logit_bias=dict(message.logit_bias) or None,
        allowed_token_ids=list(message.allowed_token_ids) or None,
        output_kind=RequestOutputKind.DELTA,
        **values,
    )


def _refuse_resolved(message: common_pb2.SamplingParams) -> None:
    """What the coordinator resolves is not the client's to set."""
    for name, is_set in (
        ("eos_token_id", message.HasField("eos_token_id")),
        ("bad_words_token_ids", bool(message.bad_words_token_ids)),
        ("all_stop_token_ids", bool(message.all_stop_token_ids)),
        ("structured_output.backend", bool(message.structured_output.backend)),
    ):
        if is_set:
            raise InvalidRequestError(f"sampling.{name} is resolved by the coordinator; leave it empty", field=name)
