"""How is a plain request answered?"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from kvrelay.coordinator.flow_request import Completion, FlowRequest
from kvrelay.coordinator.http_connection import Connection
from kvrelay.coordinator.http_parameters import CHAT, COMPLETION, check_parameters
from kvrelay.coordinator.http_routes import Call
from kvrelay.coordinator.http_serving import TRACE_HEADERS, Serving
from kvrelay.coordinator.output_sink import TokenReceiver
from kvrelay.coordinator.plain_streams.events import Events, chat_form, completion_form
from kvrelay.coordinator.plain_streams.prompts import PlainPrompts
from kvrelay.coordinator.plain_streams.recipes import Recipe, Recipes
from kvrelay.coordinator.plain_streams.requests import is_plain
from kvrelay.coordinator.plain_streams.stream import PlainStream
from kvrelay.coordinator.request_intake import RequestIntake
from kvrelay.coordinator.request_limits import RequestLimits, bounds_now
from kvrelay.coordinator.request_terms import current_terms
from kvrelay.coordinator.vllm_errors import from_vllm_error
from kvrelay.errors import InvalidRequestError, ModelNotFoundError

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class StreamEngine(Protocol):
    """What generates; see `ClusterEngine`."""

    @property
    def intake(self) -> RequestIntake: ...

    async def open_stream(
        self, request: FlowRequest, receiver: TokenReceiver, trace_headers: Mapping[str, str]
    ) -> Callable[[], None]: ...


class PlainStreams:
    """The short way for the requests that are most of the load.

    What it sends is what vLLM's serving classes would; what they would refuse, or answer otherwise, is left to them.
    """

    def __init__(self, engine: StreamEngine, serving: Serving, limits: RequestLimits) -> None:
        self._engine = engine
        self._limits = limits
        self._renderer = serving.chat.renderer
        self._model_config = serving.chat.model_config
        self._prompts = PlainPrompts(self._renderer)
        self._recipes = Recipes(serving, engine.intake)
        name, fingerprint = serving.models.model_name(), serving.chat.system_fingerprint
        self._forms = {_COMPLETIONS: completion_form(name, fingerprint)}
        if serving.chat.parser_cls is None:
            self._forms[_CHAT] = chat_form(name, fingerprint)

    def takes(self, call: Call) -> bool:
        """Whether `answer` may be asked."""
        return call.path in self._forms and is_plain(call.body)

    async def answer(self, call: Call, connection: Connection) -> bool:
        """Returns whether the call is answered: if not, nothing has happened, and vLLM's classes say what is wrong.

        Raises `ClientGoneError`, `KvrelayError` for what went wrong on workers, and what nobody foresaw.
        """
        try:
            recipe, request = await self._prepare(call)
        except Exception as error:
            if isinstance(from_vllm_error(error), InvalidRequestError | ModelNotFoundError):
                return False
            raise
        events = Events(self._forms[call.path], _response_id(call))
        stream = PlainStream(
            connection,
            events,
            self._detokenizer(recipe, request),
            num_prompt_tokens=len(request.prompt_token_ids),
            tells_usage=recipe.tells_usage,
        )
        trace_headers = {name: call.headers[name] for name in TRACE_HEADERS if name in call.headers}
        close = await self._engine.open_stream(request, stream, trace_headers)
        try:
            connection.attach(stream)
            await stream.began
            await call.reply.begin_events()
            stream.open()
            await stream.ended
            await call.reply.end_events()
        finally:
            connection.attach(None)
            close()
        return True

    async def _prepare(self, call: Call) -> tuple[Recipe, FlowRequest]:
        """Raises whatever is wrong with the request."""
        is_chat = call.path == _CHAT
        bounds = bounds_now(self._limits, self._model_config)
        fields = check_parameters(call.body, CHAT if is_chat else COMPLETION, bounds)
        recipe = self._recipes.of(fields)
        token_ids = await self._prompts.token_ids(fields, recipe.chat, recipe.tokenizing)
        self._engine.intake.check_prompt(token_ids)
        max_model_len = self._model_config.max_model_len
        external_id = _response_id(call) + ("" if is_chat else "-0")
        request_id = f"{external_id}-{secrets.token_hex(4)}"
        sampling = recipe.sampling_for(len(token_ids), max_model_len)
        return recipe, FlowRequest(
            request_id=request_id,
            external_id=external_id,
            prompt_token_ids=token_ids,
            completions=[Completion(request_id=request_id, sampling=sampling)],
            max_model_len_tokens=max_model_len,
            cache_salt=fields.get("cache_salt", ""),
            priority=recipe.priority,
            terms=current_terms.get(),
        )

    def _detokenizer(self, recipe: Recipe, request: FlowRequest) -> IncrementalDetokenizer:
        engine_request = EngineCoreRequest(
            request_id=request.request_id,
            prompt_token_ids=list(request.prompt_token_ids),
            mm_features=None,
            sampling_params=recipe.params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        return IncrementalDetokenizer.from_new_request(self._renderer.tokenizer, engine_request)


def _response_id(call: Call) -> str:
    return f"{'chatcmpl' if call.path == _CHAT else 'cmpl'}-{call.request_id}"
