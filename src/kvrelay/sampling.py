"""Sampling parameters between vLLM's class and the message that workers get."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from kvrelay.errors import InvalidRequestError
from kvrelay.v1 import common_pb2

CARRIED = frozenset(
    {
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
        "stop_token_ids",
        "logprobs",
        "prompt_logprobs",
        "logit_bias",
        "allowed_token_ids",
        "structured_outputs",
        "_eos_token_id",
        "_all_stop_token_ids",
        "_bad_words_token_ids",
    }
)
"""Fields of vLLM's class that reach the worker."""

FRONT_END_ONLY = frozenset(
    {
        "stop",
        "include_stop_str_in_output",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "output_kind",
        "output_text_buffer_length",
        "stream_interval",
        "flat_logprobs",
        "skip_clone",
        "bad_words",
        "_watermarking_skipped",
    }
)
"""Fields whose work is done where the text is."""

REFUSED: dict[str, Callable[[SamplingParams], bool]] = {
    "n": lambda params: params.n != 1,
    "watermarking": lambda params: bool(params.watermarking),
    "extra_args": lambda params: bool(params.extra_args),
    "logprob_token_ids": lambda params: params.logprob_token_ids is not None,
    "prompt_logprob_token_ids": lambda params: params.prompt_logprob_token_ids is not None,
    "prompt_logprob_start": lambda params: params.prompt_logprob_start is not None,
    "thinking_token_budget": lambda params: params.thinking_token_budget is not None,
    "repetition_detection": lambda params: params.repetition_detection is not None,
    "trace_decode_token_ids": lambda params: params.trace_decode_token_ids is not None,
    "routed_experts_prompt_start": lambda params: params.routed_experts_prompt_start != 0,
    "skip_reading_prefix_cache": lambda params: (
        params.skip_reading_prefix_cache != (params.prompt_logprobs is not None)
    ),
}
"""Fields that cannot cross the network, each with the test whether it is in use."""

_SCALARS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
)
_OPTIONALS = ("seed", "max_tokens", "logprobs", "prompt_logprobs")


def to_proto(params: SamplingParams) -> common_pb2.SamplingParams:
    """Express parameters that vLLM's `InputProcessor` has completed for one sequence.

    Raises `InvalidRequestError` for anything a worker could not do exactly as asked.
    """
    for name, in_use in REFUSED.items():
        if in_use(params):
            raise InvalidRequestError(f"{name}={getattr(params, name)!r} is not supported", field=name)
    message = common_pb2.SamplingParams()
    for name in _SCALARS:
        _assign(message, name, getattr(params, name))
    for name in _OPTIONALS:
        if (value := getattr(params, name)) is not None:
            _assign(message, name, value)
    _extend(message, "stop_token_ids", params.stop_token_ids or ())
    _extend(message, "allowed_token_ids", params.allowed_token_ids or ())
    _extend(message, "all_stop_token_ids", sorted(params.all_stop_token_ids))
    if params.eos_token_id is not None:
        message.eos_token_id = params.eos_token_id
    for token_id, bias in (params.logit_bias or {}).items():
        message.logit_bias[token_id] = bias
    for word in params.bad_words_token_ids or ():
        message.bad_words_token_ids.add(ids=word)
    if params.structured_outputs is not None:
        message.structured_output.CopyFrom(structured_to_proto(params.structured_outputs))
    return message


def to_vllm(message: common_pb2.SamplingParams) -> SamplingParams:
    """The parameters for a worker's engine: token ids in steps, no text, no tokenizer needed.

    Raises `InvalidRequestError` when a value is out of vLLM's range.
    """
    given = {field.name for field, _ in message.ListFields()}
    values: dict[str, Any] = {name: getattr(message, name) for name in _SCALARS if name in given}
    values |= {name: getattr(message, name) if name in given else None for name in _OPTIONALS}
    if message.HasField("structured_output"):
        values["structured_outputs"] = structured_to_vllm(message.structured_output)
    try:
        params = SamplingParams(
            stop_token_ids=list(message.stop_token_ids),
            allowed_token_ids=list(message.allowed_token_ids) or None,
            logit_bias=dict(message.logit_bias) or None,
            watermarking=False,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            skip_clone=True,
            **values,
        )
    except (VLLMClientError, ValueError) as error:
        raise InvalidRequestError(str(error)) from error
    params._eos_token_id = message.eos_token_id if message.HasField("eos_token_id") else None
    params._all_stop_token_ids = set(message.all_stop_token_ids)
    params._bad_words_token_ids = [list(word.ids) for word in message.bad_words_token_ids] or None
    return params


def structured_to_proto(params: StructuredOutputsParams) -> common_pb2.StructuredOutput:
    """A JSON schema given as an object becomes the text that vLLM itself would make of it."""
    message = common_pb2.StructuredOutput(
        disable_any_whitespace=params.disable_any_whitespace,
        disable_additional_properties=params.disable_additional_properties,
        whitespace_pattern=params.whitespace_pattern,
        backend=params._backend or "",
    )
    if params.json is not None:
        message.json_schema = params.json if isinstance(params.json, str) else json.dumps(params.json)
    elif params.regex is not None:
        message.regex = params.regex
    elif params.choice is not None:
        message.choice.values.extend(params.choice)
        message.choice.SetInParent()
    elif params.grammar is not None:
        message.grammar = params.grammar
    elif params.json_object is not None:
        message.json_object = params.json_object
    elif params.structural_tag is not None:
        message.structural_tag = params.structural_tag
    return message


_CONSTRAINTS = {
    "json_schema": "json",
    "regex": "regex",
    "grammar": "grammar",
    "json_object": "json_object",
    "structural_tag": "structural_tag",
}


def structured_to_vllm(message: common_pb2.StructuredOutput) -> StructuredOutputsParams:
    """Raises `InvalidRequestError` when no constraint is set."""
    kind = message.WhichOneof("constraint")
    if kind is None:
        raise InvalidRequestError("structured_output needs a constraint", field="structured_output")
    value = list(message.choice.values) if kind == "choice" else getattr(message, kind)
    params = StructuredOutputsParams(
        disable_any_whitespace=message.disable_any_whitespace,
        disable_additional_properties=message.disable_additional_properties,
        whitespace_pattern=message.whitespace_pattern if message.HasField("whitespace_pattern") else None,
        **{_CONSTRAINTS.get(kind, kind): value},
    )
    params._backend = message.backend or None
    params._backend_was_auto = params._backend is not None
    return params


def _assign(message: common_pb2.SamplingParams, name: str, value: Any) -> None:
    """Set a scalar; a value that the field's type cannot hold is refused, naming field and value."""
    try:
        setattr(message, name, value)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequestError(f"{name}={value!r} is out of range: {error}", field=name) from error


def _extend(message: common_pb2.SamplingParams, name: str, values: Any) -> None:
    try:
        getattr(message, name).extend(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequestError(f"{name} has a value out of range: {error}", field=name) from error
