"""How do prompts, options and results become protobuf messages and back?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from kvrelay.client.options import GenerateOptions, Message, Messages, Prompt
from kvrelay.client.results import Chunk, FinishReason, Timeline, TokenLogprob, TokenLogprobs, Usage
from kvrelay.errors import InvalidRequestError
from kvrelay.v1 import common_pb2, inference_pb2

_REQUEST_FIELDS = ("model", "request_id", "cache_salt", "priority", "include_timeline", "request_class", "tenant")
_TARGETS = ("ttft_s", "itl_s")
_CONSTRAINTS = ("json_schema", "json_object", "regex", "choice", "grammar")
_FINISH_REASONS: dict[int, FinishReason] = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_ABORT: "abort",
    common_pb2.FINISH_REASON_ERROR: "error",
    common_pb2.FINISH_REASON_REPETITION: "repetition",
}


def generate_request(prompt: Prompt, options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """The request's message. `timeout_s` is not part of it.

    Raises `InvalidRequestError` naming the option that has a value of the wrong type or range, `TypeError` for
    an option that does not exist.
    """
    request = inference_pb2.GenerateRequest()
    _set_prompt(request, prompt)
    for name, value in options.items():
        if name == "timeout_s" or value is None:
            continue
        if name in _REQUEST_FIELDS:
            _set(request, name, value)
        elif name in _TARGETS:
            _set(request.targets, name, value)
        elif name in _CONSTRAINTS:
            _constrain(request.sampling, name, value)
        elif name in common_pb2.SamplingParams.DESCRIPTOR.fields_by_name:
            _set(request.sampling, name, [value] if name == "stop" and isinstance(value, str) else value)
        else:
            raise TypeError(f"{name!r} is not an option of a generation")
    return request


def chat(messages: Messages) -> inference_pb2.Chat:
    """A conversation's message. Raises `InvalidRequestError` where a turn lacks its role or content."""
    result = inference_pb2.Chat()
    for i, message in enumerate(messages):
        if isinstance(message, Message):
            role, content = message.role, message.content
        else:
            role, content = (_entry(message, i, name) for name in ("role", "content"))
        result.messages.add(role=role, content=content)
    return result


def tokenize_request(
    text: str | Messages, model: str, add_special_tokens: bool | None
) -> inference_pb2.TokenizeRequest:
    """The message for text or a conversation."""
    request = inference_pb2.TokenizeRequest(model=model, add_special_tokens=add_special_tokens)
    if isinstance(text, str):
        request.text = text
    else:
        request.chat.CopyFrom(chat(text))
    return request


def is_chat(prompt: Prompt) -> bool:
    """Whether the prompt is a conversation, and not text or token ids."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Message | Mapping)


def to_chunk(response: inference_pb2.GenerateResponse) -> Chunk:
    """One response as plain values."""
    usage = timeline = None
    if response.HasField("usage"):
        usage = Usage(prompt_tokens=response.usage.prompt_tokens, completion_tokens=response.usage.completion_tokens)
    if response.HasField("timeline"):
        timeline = Timeline(
            events=tuple((event.name, event.unix_ns) for event in response.timeline.events),
            counters=dict(response.timeline.counters),
        )
    return Chunk(
        request_id=response.request_id,
        index=response.index,
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=tuple(map(_row, response.logprobs)),
        prompt_logprobs=tuple(map(_row, response.prompt_logprobs)),
        finish_reason=_FINISH_REASONS.get(response.finish_reason),
        stop_reason=response.stop_reason or None,
        usage=usage,
        timeline=timeline,
    )


def _set_prompt(request: inference_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif is_chat(prompt):
        request.chat.CopyFrom(chat(cast("Messages", prompt)))
    else:
        request.token_ids.SetInParent()
        _set(request.token_ids, "ids", prompt, shown_as="prompt")


def _set(message: Any, name: str, value: object, *, shown_as: str | None = None) -> None:
    try:
        if isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError, AttributeError) as error:
        field = shown_as or name
        raise InvalidRequestError(f"{field}: {value!r} is not possible here: {error}", field=field) from error


def _constrain(sampling: common_pb2.SamplingParams, name: str, value: object) -> None:
    constraint = sampling.structured_output
    if constraint.WhichOneof("constraint"):
        raise InvalidRequestError(f"{name}: only one of {', '.join(_CONSTRAINTS)} is possible", field=name)
    if name == "choice":
        _set(constraint.choice, "values", value, shown_as="choice")
    else:
        _set(constraint, name, value if not isinstance(value, Mapping) else json.dumps(value))


def _entry(message: object, index: int, name: str) -> str:
    value = message.get(name) if isinstance(message, Mapping) else None
    if not isinstance(value, str):
        raise InvalidRequestError(f"messages[{index}].{name} must be a string", field=f"messages[{index}].{name}")
    return value


def _row(row: inference_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(sampled=_logprob(row.sampled), top=tuple(map(_logprob, row.top)))


def _logprob(entry: inference_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token_id=entry.token_id, token=entry.token, logprob=entry.logprob, rank=entry.rank)
