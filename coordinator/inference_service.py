"""The gRPC Inference service over a ClusterEngine."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import uuid
from collections.abc import AsyncGenerator
from typing import Any, NoReturn

import grpc
import structlog
from vllm.inputs import EngineInput

from kvrelay.coordinator.client_sampling import client_sampling
from kvrelay.coordinator.cluster_engine import ClusterEngine
from kvrelay.coordinator.connection_limits import ConnectionLimits
from kvrelay.coordinator.generate_responses import ResponseBuilder
from kvrelay.coordinator.grpc_checks import check_detokenize, check_generate, check_tokenize
from kvrelay.coordinator.prompt_rendering import ChatTemplate, render_chat, render_text, render_token_ids
from kvrelay.coordinator.request_limits import RequestBounds, RequestLimits, bounds_now
from kvrelay.coordinator.request_terms import RequestTerms, current_terms, terms_of_request
from kvrelay.coordinator.vllm_errors import from_vllm_error
from kvrelay.errors import (
    RETRY_AFTER_METADATA,
    DeadlineError,
    GenerationFailedError,
    InvalidRequestError,
    ModelNotFoundError,
    status_of,
)
from kvrelay.tracing import current_context
from kvrelay.v1 import inference_pb2, inference_pb2_grpc

_log = structlog.get_logger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Translates, calls the engine, maps errors. Cancelling a call ends its generation."""

    def __init__(
        self,
        engine: ClusterEngine,
        *,
        template: ChatTemplate | None = None,
        limits: RequestLimits | None = None,
        stall_timeout_s: float = ConnectionLimits().stall_timeout_s,
    ) -> None:
        self._engine = engine
        self._stall_timeout_s = stall_timeout_s
        self._limits = limits or RequestLimits()
        self._template = template or ChatTemplate()
        self._default_sampling = engine.model_config.get_diff_sampling_param()

    async def Generate(  # type: ignore[override]
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> None:
        request_id = request.request_id or f"generate-{uuid.uuid4().hex}"
        try:
            async with contextlib.aclosing(self._responses(request, request_id, context)) as responses:
                is_first = True
                async for response in responses:
                    await self._write(response, context, is_first=is_first)
                    is_first = False
        except Exception as error:
            await _abort(context, error, request_id)

    async def _responses(
        self, request: inference_pb2.GenerateRequest, request_id: str, context: _Context
    ) -> AsyncGenerator[inference_pb2.GenerateResponse]:
        self._check_model(request.model)
        if not _REQUEST_ID.fullmatch(request_id):
            raise InvalidRequestError("request_id must be at most 128 characters of [A-Za-z0-9._-]", field="request_id")
        check_generate(request, self._bounds())
        current_terms.set(_with_deadline(terms_of_request(request), context))
        prompt = await self._render(request)
        params = client_sampling(request.sampling, self._default_sampling)
        builder = ResponseBuilder(request_id, params.logprobs, params.prompt_logprobs, request.resume)
        outputs = self._engine.generate(
            prompt,
            params,
            request_id,
            prompt_text=request.text or None,
            priority=request.priority,
            trace_headers=_trace_headers(context),
            resume=request.resume,
        )
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                for response in builder.responses(output):
                    if request.include_timeline and response.HasField("usage"):
                        response.timeline.CopyFrom(self._engine.timeline(request_id) or response.timeline)
                    yield response

    async def _write(self, response: inference_pb2.GenerateResponse, context: _Context, *, is_first: bool) -> None:
        """gRPC waits without end for a client that takes nothing. The status reaches it if it reads again."""
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await context.write(response)
        except TimeoutError:
            error = f"nothing of the answer was taken for {self._stall_timeout_s:g} s, so the request is over"
            _log.warning("a client does not read", request_id=response.request_id)
            if is_first:  # gRPC cannot send a status while its headers are under way.
                raise asyncio.CancelledError(error) from None
            raise DeadlineError(error) from None

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: _Context
    ) -> inference_pb2.ListModelsResponse:
        model = inference_pb2.Model(
            name=self._engine.served_model_name, max_model_len_tokens=self._engine.model_config.max_model_len
        )
        return inference_pb2.ListModelsResponse(models=[model])

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: _Context
    ) -> inference_pb2.TokenizeResponse:
        try:
            self._check_model(request.model)
            check_tokenize(request, self._bounds())
            renderer = self._engine.renderer
            match request.WhichOneof("input"):
                case "text":
                    special = request.add_special_tokens if request.HasField("add_special_tokens") else True
                    rendered = await render_text(renderer, request.text, add_special_tokens=special)
                case "chat":
                    rendered = await render_chat(renderer, request.chat, self._template)
                case _:
                    raise InvalidRequestError("one of text and chat is needed", field="input")
        except Exception as error:
            await _abort(context, error, "tokenize")
        return inference_pb2.TokenizeResponse(
            token_ids=rendered["prompt_token_ids"], max_model_len_tokens=self._engine.model_config.max_model_len
        )

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: _Context
    ) -> inference_pb2.DetokenizeResponse:
        try:
            self._check_model(request.model)
            check_detokenize(request, self._bounds())
            text = self._engine.renderer.get_tokenizer().decode(list(request.token_ids))
        except Exception as error:
            await _abort(context, error, "detokenize")
        return inference_pb2.DetokenizeResponse(text=text)

    async def Explain(self, request: inference_pb2.ExplainRequest, context: _Context) -> inference_pb2.Decision:
        if decision := self._engine.decision(request.request_id):
            return decision
        shown = request.request_id[:128]
        await context.abort(
            grpc.StatusCode.NOT_FOUND,
            f"this coordinator has planned no request {shown!r} of late; ids are those of answers or of X-Request-Id",
        )
        raise AssertionError("abort raises")

    async def _render(self, request: inference_pb2.GenerateRequest) -> EngineInput:
        renderer, salt = self._engine.renderer, request.cache_salt
        match request.WhichOneof("prompt"):
            case "text":
                return await render_text(renderer, request.text, cache_salt=salt)
            case "token_ids":
                return render_token_ids(request.token_ids.ids, cache_salt=salt)
            case "chat":
                return await render_chat(renderer, request.chat, self._template, cache_salt=salt)
            case _:
                raise InvalidRequestError("one of text, token_ids and chat is needed", field="prompt")

    def _bounds(self) -> RequestBounds:
        return bounds_now(self._limits, self._engine.model_config)

    def _check_model(self, model: str) -> None:
        served = self._engine.served_model_name
        if model and model != served:
            raise ModelNotFoundError(f"model {model!r} does not exist; this cluster serves {served!r}", field="model")


def _with_deadline(terms: RequestTerms, context: _Context) -> RequestTerms:
    """The client's: gRPC ends the call by itself then."""
    left_s = context.time_remaining()
    return terms if left_s is None else terms.within(left_s)


async def _abort(context: _Context, error: Exception, request_id: str) -> NoReturn:
    """End the call with the status of the error; what nobody foresaw is logged with the request's id."""
    known = from_vllm_error(error)
    if isinstance(known, GenerationFailedError):
        _log.error("request failed", request_id=request_id, exc_info=error)
    after_s = known.retry_after_s
    hint = () if after_s is None else ((RETRY_AFTER_METADATA, str(math.ceil(after_s * 1e3))),)
    await context.abort(status_of(known).grpc, known.message, hint)
    raise AssertionError("abort raises") from error


def _trace_headers(context: _Context) -> dict[str, str] | None:
    """The caller's trace context, unless a server span has taken it over already."""
    if current_context() is not None:
        return None
    metadata = context.invocation_metadata() or ()
    return {str(key): str(value) for key, value in metadata if key in ("traceparent", "tracestate")} or None
