"""What does a client get back? Plain values, without protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error", "repetition"]
"""`stop`: a stop token or string. `length`: max_tokens, or the model's context is full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    token_id: int
    token: str
    """The token decoded on its own."""
    logprob: float
    rank: int
    """1 is the most likely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """One generated token and the most likely ones in its place."""

    sampled: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    """Of all `n` completions together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What happened to the request, and when; asked for with `include_timeline=True`."""

    events: tuple[tuple[str, int], ...]
    """Name and nanoseconds since the Unix epoch, by the clock of the process that saw it."""
    counters: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What came since the last chunk of the same `index`."""

    request_id: str
    index: int = 0
    """Which of the `n` completions."""
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    """Set in the last chunk of this index."""
    stop_reason: str | None = None
    """The stop string or the stop token's id, when one of those ended it."""
    usage: Usage | None = None
    """Set in the last chunk of the call."""
    timeline: Timeline | None = None
    """Set in the last chunk of the call, when asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """In the first chunk of each index, when asked for: one entry per prompt token but the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished completion."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    stop_reason: str | None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Everything that one call generated."""

    request_id: str
    completions: tuple[Completion, ...]
    usage: Usage | None
    timeline: Timeline | None = None

    @property
    def text(self) -> str:
        """The text of the first completion."""
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens of the first completion."""
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first completion ended."""
        return self.completions[0].finish_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    name: str
    max_model_len_tokens: int
    """Longest prompt plus completion."""


@dataclass(slots=True)
class _Parts:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    last: Chunk | None = None


class Collector:
    """Puts the chunks of one call together."""

    def __init__(self) -> None:
        self._request_id = ""
        self._usage: Usage | None = None
        self._timeline: Timeline | None = None
        self._by_index: dict[int, _Parts] = {}

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk of the call."""
        self._request_id = chunk.request_id
        self._usage = chunk.usage or self._usage
        self._timeline = chunk.timeline or self._timeline
        parts = self._by_index.setdefault(chunk.index, _Parts())
        parts.texts.append(chunk.text)
        parts.token_ids.extend(chunk.token_ids)
        parts.logprobs.extend(chunk.logprobs)
        parts.prompt_logprobs = parts.prompt_logprobs or chunk.prompt_logprobs
        if parts.last is None or chunk.finish_reason:
            parts.last = chunk

    @property
    def token_ids(self) -> dict[int, list[int]]:
        """What has come so far, by the index of the completion."""
        return {index: parts.token_ids for index, parts in self._by_index.items()}

    def result(self) -> Generation:
        """The whole; call it after the last chunk."""
        completions = tuple(_completion(parts) for _, parts in sorted(self._by_index.items()))
        return Generation(
            request_id=self._request_id,
            completions=completions or (_NOTHING,),
            usage=self._usage,
            timeline=self._timeline,
        )


_NOTHING = Completion(text="", token_ids=(), logprobs=(), finish_reason=None, stop_reason=None)


def _completion(parts: _Parts) -> Completion:
    last = parts.last
    return Completion(
        text="".join(parts.texts),
        token_ids=tuple(parts.token_ids),
        logprobs=tuple(parts.logprobs),
        finish_reason=last.finish_reason if last else None,
        stop_reason=last.stop_reason if last else None,
        prompt_logprobs=parts.prompt_logprobs,
    )
