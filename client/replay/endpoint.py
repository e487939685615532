"""How is a request of a trace put to a server that speaks the OpenAI API?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

import msgspec

from kvrelay.client.http_pool import HttpPool, Origin
from kvrelay.client.replay.answer_reader import error_text
from kvrelay.client.replay.words import words
from kvrelay.errors import KvrelayError, ModelNotFoundError, error_from_http
from kvrelay.workload.request_form import Api, PromptKind

_PATHS = {Api.COMPLETIONS: "/v1/completions", Api.CHAT: "/v1/chat/completions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    name: str
    max_model_len_tokens: int | None = None
    """Prompt and answer; None when the server does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A model of a server, and how it is asked."""

    origin: Origin
    model: str
    api: Api = Api.COMPLETIONS
    prompt_kind: PromptKind = PromptKind.TOKENS
    ignore_eos: bool = True
    """Answers are as long as asked for; a parameter of vLLM's that other servers may refuse."""
    headers: Mapping[str, str] = field(default_factory=dict)

    def request(self, token_ids: Sequence[int], max_tokens: int) -> bytes:
        """The HTTP request for a streamed answer."""
        fields: dict[str, object] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        prompt = token_ids if self.prompt_kind is PromptKind.TOKENS else words(token_ids)
        if self.api is Api.CHAT:
            fields["messages"] = [{"role": "user", "content": prompt}]
        else:
            fields["prompt"] = prompt
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return self.origin.request("POST", _PATHS[self.api], self.headers, msgspec.json.encode(fields))


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


async def find_model(pool: HttpPool, headers: Mapping[str, str], wanted: str | None) -> ServedModel:
    """The model of that name, or the first one. Raises `KvrelayError` and `OSError`."""
    answer = await pool.exchange(pool.origin.request("GET", "/v1/models", headers))
    if answer.status != HTTPStatus.OK:
        message = f"{pool.origin.url}/v1/models answered {answer.status}: {error_text(answer.body)}"
        raise error_from_http(answer.status, message)
    try:
        models = msgspec.json.decode(answer.body, type=_Models).data
    except msgspec.DecodeError as error:
        raise KvrelayError(f"{pool.origin.url}/v1/models is not OpenAI's list of models: {error}") from error
    for model in models:
        if wanted in (None, model.id):
            return ServedModel(name=model.id, max_model_len_tokens=model.max_model_len)
    names = ", ".join(model.id for model in models) or "none"
    raise ModelNotFoundError(f"{pool.origin.url} does not serve {wanted or 'a model'}; its models: {names}")
