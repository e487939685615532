"""What each route of the HTTP gateway does with a request."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import vllm
from pydantic import BaseModel
from starlette.datastructures import Headers
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest

import kvrelay
from kvrelay.coordinator.http_errors import HttpError, error_of_response
from kvrelay.coordinator.http_parameters import CHAT, COMPLETION, DETOKENIZE, TOKENIZE, check_parameters
from kvrelay.coordinator.http_reply import Reply
from kvrelay.coordinator.http_serving import Serving, request_for_vllm
from kvrelay.coordinator.json_checks import Check
from kvrelay.coordinator.metrics.exposition import Exposition
from kvrelay.coordinator.request_limits import RequestLimits, bounds_now
from kvrelay.errors import InvalidRequestError, ModelNotFoundError
from kvrelay.etcd import EtcdError
from kvrelay.v1 import cluster_pb2, inference_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP request, its body decoded, and the way to answer it."""

    path: str
    headers: Headers
    request_id: str
    body: Any
    reply: Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """What those who watch over the process ask it."""

    ready: Callable[[], bool]
    """Whether it can serve now."""
    metrics: Exposition = field(default_factory=Exposition)
    decision: Callable[[str], inference_pb2.Decision | None] = lambda _: None
    """Why a request went where it went, by its id."""
    coordinators: Callable[[], Awaitable[Sequence[cluster_pb2.CoordinatorInfo]]] | None = None
    """All of the cluster. Raises `EtcdError`. None where there is no cluster."""


class Routes:
    """One method per route; each answers its call or raises."""

    def __init__(self, serving: Serving, limits: RequestLimits, probes: Probes) -> None:
        self._serving = serving
        self._limits = limits
        self._probes = probes

    async def chat(self, call: Call) -> None:
        request = ChatCompletionRequest.model_validate(self._checked(call, CHAT))
        raw = request_for_vllm(call.headers, call.request_id)
        await _answer(call, await self._serving.chat.create_chat_completion(request, raw))

    async def completions(self, call: Call) -> None:
        request = CompletionRequest.model_validate(self._checked(call, COMPLETION))
        raw = request_for_vllm(call.headers, call.request_id)
        await _answer(call, await self._serving.completion.create_completion(request, raw))

    async def tokenize(self, call: Call) -> None:
        fields = self._checked(call, TOKENIZE)
        if ("prompt" in fields) == ("messages" in fields):
            raise InvalidRequestError("give either prompt or messages", field="prompt")
        kind = TokenizeCompletionRequest if "prompt" in fields else TokenizeChatRequest
        raw = request_for_vllm(call.headers, call.request_id)
        await _answer(call, await self._serving.tokenization.create_tokenize(kind.model_validate(fields), raw))

    async def detokenize(self, call: Call) -> None:
        request = DetokenizeRequest.model_validate(self._checked(call, DETOKENIZE))
        raw = request_for_vllm(call.headers, call.request_id)
        await _answer(call, await self._serving.tokenization.create_detokenize(request, raw))

    async def models(self, call: Call) -> None:
        await call.reply.json(await self._model_list())

    async def model(self, call: Call) -> None:
        name = call.path.removeprefix("/v1/models/")
        for card in (await self._model_list())["data"]:
            if card["id"] == name:
                await call.reply.json(card)
                return
        raise ModelNotFoundError(f"the model {name[:200]!r} does not exist", field="model")

    async def health(self, call: Call) -> None:
        """The process lives: that it answers is all there is to say."""
        await call.reply.json({"status": "ok"})

    async def ready(self, call: Call) -> None:
        if not self._probes.ready():
            raise HttpError(
                status=HTTPStatus.SERVICE_UNAVAILABLE,
                message="no decode worker serves the model now, or this coordinator stops; try again later",
            )
        await call.reply.json({"status": "ready"})

    async def metrics(self, call: Call) -> None:
        """Of this process: another replica at the same port has others."""
        await call.reply.text(*self._probes.metrics.page(call.headers.get("accept", "")))

    async def metrics_targets(self, call: Call) -> None:
        """Where each coordinator's own metrics are, as Prometheus' HTTP service discovery has it."""
        listing = self._probes.coordinators
        try:
            coordinators = await listing() if listing else []
        except EtcdError as error:
            status = HTTPStatus.SERVICE_UNAVAILABLE
            raise HttpError(status=status, message=f"the coordinators cannot be listed now: {error}") from error
        targets = [urlsplit(each.own_http_url or each.http_url).netloc for each in coordinators]
        await call.reply.json([{"targets": targets}])

    async def version(self, call: Call) -> None:
        await call.reply.json({"version": kvrelay.__version__, "vllm": vllm.__version__})

    async def _model_list(self) -> dict[str, Any]:
        models = await self._serving.models.show_available_models()
        content: dict[str, Any] = models.model_dump()
        for card in content["data"]:
            card["owned_by"] = "kvrelay"
        return content

    def _checked(self, call: Call, table: Mapping[str, Check]) -> dict[str, Any]:
        return check_parameters(call.body, table, bounds_now(self._limits, self._serving.chat.model_config))


async def _answer(call: Call, result: AsyncGenerator[str, None] | BaseModel) -> None:
    """Send what a serving class returned: events, a response, or its error object."""
    if isinstance(result, ErrorResponse):
        raise error_of_response(result, call.request_id)
    if isinstance(result, BaseModel):
        await call.reply.json(result.model_dump_json().encode())
    else:
        await call.reply.events(result)
