"""What is the same for all requests that differ in their prompts only? Made once for them, by vLLM's own classes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.inputs import tokens_input
from vllm.renderers.params import ChatParams, TokenizeParams
from vllm.sampling_params import SamplingParams

from kvrelay.coordinator.http_serving import Serving
from kvrelay.coordinator.request_intake import RequestIntake
from kvrelay.errors import InvalidRequestError, ModelNotFoundError
from kvrelay.sampling import to_proto
from kvrelay.v1 import common_pb2

_MAX_RECIPES = 4096
_OF_THE_PROMPT = ("messages", "prompt", "cache_salt", "user")
_encode = msgspec.json.Encoder(order="deterministic").encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Shared by requests: nothing of it may be changed."""

    params: SamplingParams
    sampling: common_pb2.SamplingParams
    asked_tokens: int | None
    """Most that the request wants; None when it does not say."""
    default_sampling: Mapping[str, Any]
    override_max_tokens: int | None
    tokenizing: TokenizeParams
    chat: ChatParams | None
    """How messages are rendered; None for text."""
    priority: int
    tells_usage: bool

    def sampling_for(self, num_prompt_tokens: int, max_model_len_tokens: int) -> common_pb2.SamplingParams:
        """With as many tokens as the context has room for. Raises `InvalidRequestError` for none."""
        sampling = common_pb2.SamplingParams()
        sampling.CopyFrom(self.sampling)
        sampling.max_tokens = get_max_tokens(
            max_model_len_tokens,
            self.asked_tokens,
            num_prompt_tokens,
            dict(self.default_sampling),
            self.override_max_tokens,
        )
        if sampling.max_tokens < 1:
            raise InvalidRequestError("at least one token is generated", field="max_tokens")
        return sampling


class Recipes:
    """The latest few thousand."""

    def __init__(self, serving: Serving, intake: RequestIntake) -> None:
        self._serving = serving
        self._intake = intake
        self._model_config = serving.chat.model_config
        self._recipes: OrderedDict[bytes, Recipe] = OrderedDict()

    def of(self, fields: Mapping[str, Any]) -> Recipe:
        """For fields that were checked. Raises what vLLM raises for their values, and `ModelNotFoundError`."""
        rest = {name: value for name, value in fields.items() if name not in _OF_THE_PROMPT}
        is_chat = "messages" in fields
        key = _encode((is_chat, self._model_config.max_model_len, rest))
        recipe = self._recipes.get(key)
        if recipe is None:
            recipe = self._recipes[key] = self._chat(rest) if is_chat else self._completion(rest)
            if len(self._recipes) > _MAX_RECIPES:
                self._recipes.popitem(last=False)
        return recipe

    def _chat(self, fields: Mapping[str, Any]) -> Recipe:
        request = ChatCompletionRequest.model_validate({**fields, "messages": []})
        online = self._serving.chat.online_renderer
        chat = request.build_chat_params(online.chat_template, online.chat_template_content_format)
        chat = chat.with_defaults({**online.default_chat_template_kwargs, "tools": None, "tokenize": False})
        return self._recipe(
            request, self._serving.chat, fields.get("max_completion_tokens") or fields.get("max_tokens"), chat
        )

    def _completion(self, fields: Mapping[str, Any]) -> Recipe:
        request = CompletionRequest.model_validate({**fields, "prompt": [0]})
        return self._recipe(request, self._serving.completion, request.max_tokens, None)

    def _recipe(self, request: Any, serving: Any, asked_tokens: int | None, chat: ChatParams | None) -> Recipe:
        if request.model and not self._serving.models.is_base_model(request.model):
            raise ModelNotFoundError(f"the model {request.model[:200]!r} does not exist", field="model")
        defaults = serving.default_sampling_params
        params = request.to_sampling_params(1, defaults)
        # What a prompt would change, its length and its tokens, is nothing of what is kept here.
        processed = self._intake.process_rendered(tokens_input([0]), params, "recipe", priority=request.priority)
        assert processed.sampling_params is not None
        return Recipe(
            params=processed.sampling_params,
            sampling=to_proto(processed.sampling_params),
            asked_tokens=asked_tokens,
            default_sampling=defaults,
            override_max_tokens=serving.override_max_tokens,
            tokenizing=request.build_tok_params(self._model_config),
            chat=chat,
            priority=request.priority,
            tells_usage=bool(request.stream_options and request.stream_options.include_usage),
        )
