"""How do the events of a stream look? As vLLM's response models have them, at the cost of joining bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from pydantic import BaseModel
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.completion.protocol import CompletionResponseStreamChoice, CompletionStreamResponse
from vllm.entrypoints.serve.engine.protocol import PromptTokenUsageInfo, UsageInfo

DONE = b"data: [DONE]\n\n"
_ID, _TEXT, _FINISH, _STOP, _CREATED = "%id%", "%text%", "%finish%", "%stop%", 4999999999
_Event = TypeVar("_Event", ChatCompletionStreamResponse, CompletionStreamResponse)
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a whole answer counts."""

    num_prompt_tokens: int
    num_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The events of one API and model, with places for what differs; what a text is put between is made per stream."""

    first: bytes
    """Before any token; empty where the API has none."""
    next: bytes
    last: bytes
    last_before_usage: bytes
    """The same where an event with the counts follows."""
    usage: Callable[[str, int, Usage], BaseModel]
    """Of id, time and counts."""
    keeps_unset_usage: bool
    """Whether vLLM sends fields of its usage event that were not set."""


class Events:
    """Those of one stream."""

    __slots__ = ("_after", "_before", "_created", "_form", "_id")

    def __init__(self, form: Form, response_id: str) -> None:
        self._form = form
        self._id = response_id
        self._created = int(time.time())
        self._before, self._after = self._with_id(form.next).split(_encode(_TEXT))

    def first(self) -> bytes:
        return self._with_id(self._form.first)

    def next(self, text: str) -> bytes:
        """More of the answer."""
        return b"%b%b%b" % (self._before, _encode(text), self._after)

    def last(self, text: str, finish_reason: str, stop_reason: int | str | None, usage: Usage | None) -> bytes:
        """The rest of the answer and how it ended, with everything that follows."""
        event = self._with_id(self._form.last_before_usage if usage else self._form.last)
        # The text last: it may contain anything.
        for place, value in ((_FINISH, finish_reason), (_STOP, stop_reason), (_TEXT, text)):
            event = event.replace(_encode(place), _encode(value), 1)
        return event + (self._usage(usage) if usage else b"") + DONE

    def _usage(self, usage: Usage) -> bytes:
        event = self._form.usage(self._id, self._created, usage)
        return _event(event.model_dump_json(exclude_unset=not self._form.keeps_unset_usage, exclude_none=True))

    def _with_id(self, event: bytes) -> bytes:
        # The id last: clients may choose it.
        return event.replace(b"%d" % _CREATED, b"%d" % self._created, 1).replace(_encode(_ID), _encode(self._id), 1)


def chat_form(model: str, system_fingerprint: str | None) -> Form:
    """`chat.completion.chunk`."""

    def chunk(delta: DeltaMessage, **choice: object) -> ChatCompletionStreamResponse:
        filled = ChatCompletionResponseStreamChoice(index=0, delta=delta, logprobs=None, **choice)
        return ChatCompletionStreamResponse(
            id=_ID, object="chat.completion.chunk", created=_CREATED, choices=[filled], model=model
        )

    def usage(response_id: str, created: int, counts: Usage) -> BaseModel:
        return ChatCompletionStreamResponse(
            id=response_id,
            object="chat.completion.chunk",
            created=created,
            choices=[],
            model=model,
            usage=_usage_info(counts, created_cache_tokens=0),
            system_fingerprint=system_fingerprint,
        )

    first = chunk(DeltaMessage(role="assistant", content=""), finish_reason=None)
    first.prompt_token_ids = first.prompt_text = None
    last = chunk(DeltaMessage(content=_TEXT), finish_reason=_FINISH, stop_reason=_STOP, token_ids=None)
    return Form(
        first=_set(first),
        next=_set(chunk(DeltaMessage(content=_TEXT), finish_reason=None, token_ids=None)),
        last=_set(_stamped(last, system_fingerprint)),
        last_before_usage=_set(last),
        usage=usage,
        keeps_unset_usage=False,
    )


def completion_form(model: str, system_fingerprint: str | None) -> Form:
    """`text_completion`."""

    def chunk(**choice: object) -> CompletionStreamResponse:
        filled = CompletionResponseStreamChoice(
            index=0, text=_TEXT, logprobs=None, prompt_token_ids=None, token_ids=None, **choice
        )
        return CompletionStreamResponse(
            id=_ID, object="text_completion", created=_CREATED, model=model, choices=[filled]
        )

    def usage(response_id: str, created: int, counts: Usage) -> BaseModel:
        return CompletionStreamResponse(
            id=response_id,
            created=created,
            model=model,
            choices=[],
            usage=_usage_info(counts),
            system_fingerprint=system_fingerprint,
        )

    last = chunk(finish_reason=_FINISH, stop_reason=_STOP)
    return Form(
        first=b"",
        next=_set(chunk(finish_reason=None, stop_reason=None)),
        last=_set(_stamped(last, system_fingerprint)),
        last_before_usage=_set(last),
        usage=usage,
        keeps_unset_usage=True,
    )


def _stamped(event: _Event, system_fingerprint: str | None) -> _Event:
    if system_fingerprint is None:
        return event
    stamped = event.model_copy()
    stamped.system_fingerprint = system_fingerprint
    return stamped


def _usage_info(counts: Usage, **details: int) -> UsageInfo:
    return UsageInfo(
        prompt_tokens=counts.num_prompt_tokens,
        completion_tokens=counts.num_tokens,
        total_tokens=counts.num_prompt_tokens + counts.num_tokens,
        prompt_tokens_details=PromptTokenUsageInfo(cached_tokens=counts.num_cached_tokens, **details),
    )


def _set(event: BaseModel) -> bytes:
    return _event(event.model_dump_json(exclude_unset=True))


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
