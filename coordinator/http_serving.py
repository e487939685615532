"""vLLM's OpenAI serving classes over a cluster's engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion import serving as chat_serving
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion import serving as completion_serving
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.renderers.online_renderer import OnlineRenderer

TRACE_HEADERS = ("traceparent", "tracestate")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """How chats are rendered and their answers parsed; names of parsers are vLLM's."""

    chat_template: str | None = None
    """A Jinja template instead of the model's own."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Defaults for what requests give in chat_template_kwargs."""
    tool_parser: str | None = None
    """Turns the model's text into tool calls; without it, requests with tools are refused."""
    reasoning_parser: str = ""
    """Separates the model's reasoning from its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    models: OpenAIServingModels
    chat: OpenAIServingChat
    completion: OpenAIServingCompletion
    tokenization: ServingTokenization


def build_serving(engine: EngineClient, served_model_name: str, options: ServingOptions) -> Serving:
    """Raises what vLLM raises for an unknown parser."""
    for module in (chat_serving, completion_serving):
        logging.getLogger(module.__name__).addFilter(_is_news)
    models = OpenAIServingModels(engine, [BaseModelPath(name=served_model_name, model_path=served_model_name)])
    template: dict[str, Any] = {
        "request_logger": None,
        "chat_template": options.chat_template,
        "chat_template_content_format": "auto",
        "default_chat_template_kwargs": dict(options.chat_template_kwargs),
        "trust_request_chat_template": False,
    }
    parsing: dict[str, Any] = {
        "enable_auto_tools": options.tool_parser is not None,
        "tool_parser": options.tool_parser,
        "reasoning_parser": options.reasoning_parser,
    }
    renderer = OnlineRenderer(engine.model_config, engine.renderer, **template, **parsing)
    return Serving(
        models=models,
        chat=OpenAIServingChat(
            engine,
            models,
            "assistant",
            online_renderer=renderer,
            enable_prompt_tokens_details=True,
            **template,
            **parsing,
        ),
        completion=OpenAIServingCompletion(
            engine, models, online_renderer=renderer, request_logger=None, enable_prompt_tokens_details=True
        ),
        tokenization=ServingTokenization(models, renderer, **template),
    )


def _is_news(record: logging.LogRecord) -> bool:
    """vLLM logs a stack trace for every stream that fails, also one that the client is the reason for."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, VLLMClientError | GracefulHTTPError)


def request_for_vllm(headers: Headers, request_id: str) -> Request:
    """What the serving classes read of an HTTP request: its id and trace context.

    Other headers are kept from them: there are some that choose an engine or overrule the body.
    """
    given = [(name.encode(), headers[name].encode("latin-1")) for name in TRACE_HEADERS if name in headers]
    return Request({"type": "http", "headers": [*given, (b"x-request-id", request_id.encode())]})
