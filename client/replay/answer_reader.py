"""When did the tokens of a streamed completion come, and how did it end?"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable

import msgspec

from kvrelay.client.sse import EventParser

_DONE = b"[DONE]"


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """What the server counted."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None

    @property
    def num_cached_tokens(self) -> int | None:
        """None when the server does not tell."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None


class ApiError(msgspec.Struct):
    """OpenAI's error object."""

    message: str = ""
    code: int | str | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None

    @property
    def num_tokens(self) -> int:
        """As far as the event tells: ids where they were asked for, else one for whatever was generated.

        A token may have no text yet, when it ends inside of a character. A chat's first event, which has a role only,
        and its last one have none.
        """
        if self.token_ids is not None:
            return len(self.token_ids)
        if self.delta is not None:
            return int(bool(self.delta.content or self.delta.reasoning or self.delta.reasoning_content))
        return int(bool(self.text) or self.finish_reason is None)


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: ApiError | None = None


class _ErrorBody(msgspec.Struct):
    error: ApiError | str | None = None
    message: str | None = None
    detail: msgspec.Raw = msgspec.Raw(b"")


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_error = msgspec.json.Decoder(_ErrorBody).decode


class AnswerReader:
    """Takes the body of one answer as it comes; times are those of `clock`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._parser = EventParser()
        self._counted: list[tuple[float, int]] = []
        self.usage: Usage | None = None
        self.error: ApiError | None = None
        """What the stream said instead of going on."""
        self.is_done = False
        """Whether the stream told its end."""

    def on_body(self, piece: bytes) -> None:
        """Raises `msgspec.DecodeError` when an event is not OpenAI's, and `EventTooLargeError`."""
        at_s = self._clock()
        for data in self._parser.feed(piece):
            if data == _DONE:
                self.is_done = True
            else:
                self._take(_decode_event(data), at_s)

    @property
    def num_events(self) -> int:
        """With a token."""
        return len(self._counted)

    def tokens_since(self, first: int) -> list[tuple[float, int]]:
        """Time and number of tokens of each event with a token, from number `first` on."""
        return self._counted[first:]

    def token_times_s(self) -> array[float]:
        """When each token came; those of one event came together.

        Where the server counted more tokens than the events told, each event is taken to have had about equally many.
        """
        counts = [count for _, count in self._counted]
        total = max(sum(counts), self.usage.completion_tokens if self.usage else 0)
        missing = total - sum(counts)
        if missing and counts:
            num_events = len(counts)
            shares = [missing * number // num_events for number in range(num_events + 1)]
            counts = [count + shares[number + 1] - shares[number] for number, count in enumerate(counts)]
        return array("d", (at_s for (at_s, _), count in zip(self._counted, counts, strict=True) for _ in range(count)))

    def _take(self, event: _Event, at_s: float) -> None:
        if event.error is not None:
            self.error = event.error
        if event.usage is not None:
            self.usage = event.usage
        num_tokens = sum(choice.num_tokens for choice in event.choices)
        if num_tokens:
            self._counted.append((at_s, num_tokens))


def error_text(body: bytes) -> str:
    """What an answer that is no success says, in one line: the message of its error object, or its beginning."""
    try:
        said = _decode_error(body)
    except msgspec.DecodeError:
        text = ""
    else:
        error = said.error
        text = (error.message if isinstance(error, ApiError) else error) or said.message or bytes(said.detail).decode()
    return " ".join((text or body[:500].decode(errors="replace")).split())[:500]
