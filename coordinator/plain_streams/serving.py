"""How is a plain request answered? By vLLM's own steps, one after the other in the event loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.inputs import EngineInput
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from kvrelay.coordinator.http_connection import Connection
from kvrelay.coordinator.http_parameters import CHAT, COMPLETION, check_parameters
from kvrelay.coordinator.http_routes import Call
from kvrelay.coordinator.http_serving import TRACE_HEADERS, Serving
from kvrelay.coordinator.output_sink import TokenReceiver
from kvrelay.coordinator.plain_streams.events import Events, chat_form, completion_form
from kvrelay.coordinator.plain_streams.requests import MAX_TEXT_CHARS, is_plain, num_text_chars
from kvrelay.coordinator.plain_streams.stream import PlainStream
from kvrelay.coordinator.request_limits import RequestLimits, bounds_now

_Request: TypeAlias = ChatCompletionRequest | CompletionRequest


class StreamEngine(Protocol):
    """What generates; see `ClusterEngine.open_stream`."""

    async def open_stream(
        self,
        prompt: EngineInput,
        sampling_params: SamplingParams,
        request_id: str,
        make_receiver: Callable[[EngineCoreRequest], TokenReceiver],
        *,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
    ) -> Callable[[], None]: ...


class PlainStreams:
    """The short way for the requests that are most of the load.

    What it sends is what vLLM's serving classes would; what they would refuse, or answer otherwise, is left to them.
    """

    def __init__(self, engine: StreamEngine, serving: Serving, limits: RequestLimits) -> None:
        self._engine = engine
        self._serving = serving
        self._limits = limits
        self._renderer = serving.chat.renderer
        self._model_config = serving.chat.model_config
        name, fingerprint = serving.models.model_name(), serving.chat.system_fingerprint
        self._chat_form, self._completion_form = chat_form(name, fingerprint), completion_form(name, fingerprint)
        self._paths = {"/v1/completions"}
        if serving.chat.parser_cls is None:
            self._paths.add("/v1/chat/completions")

    def takes(self, call: Call) -> bool:
        """Whether `answer` may be asked."""
        return call.path in self._paths and is_plain(call.body)

    async def answer(self, call: Call, connection: Connection) -> bool:
        """Returns whether the call is answered: if not, nothing has happened, and vLLM's classes say what is wrong.

        Raises `ClientGoneError`, `KvrelayError` for what went wrong on workers, and what vLLM raises.
        """
        prepared = await self._prepare(call)
        if prepared is None:
            return False
        request, prompt, params = prepared
        is_chat = isinstance(request, ChatCompletionRequest)
        response_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{call.request_id}"
        events = Events(self._chat_form if is_chat else self._completion_form, response_id)
        options = request.stream_options
        stream = PlainStream(connection, events, tells_usage=bool(options and options.include_usage))

        def receiver(engine_request: EngineCoreRequest) -> TokenReceiver:
            tokenizer = self._renderer.tokenizer
            stream.bind(engine_request, IncrementalDetokenizer.from_new_request(tokenizer, engine_request))
            return stream

        close = await self._engine.open_stream(
            prompt,
            params,
            response_id if is_chat else f"{response_id}-0",
            receiver,
            trace_headers={name: call.headers[name] for name in TRACE_HEADERS if name in call.headers},
            priority=request.priority,
        )
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

    async def _prepare(self, call: Call) -> tuple[_Request, EngineInput, SamplingParams] | None:
        """None for a request that cannot be served: the ordinary way will find out why."""
        is_chat = call.path == "/v1/chat/completions"
        try:
            table = CHAT if is_chat else COMPLETION
            fields = check_parameters(call.body, table, bounds_now(self._limits, self._model_config))
            request: _Request = (ChatCompletionRequest if is_chat else CompletionRequest).model_validate(fields)
            if request.model and not self._serving.models.is_base_model(request.model):
                return None
            is_long = num_text_chars(fields) > MAX_TEXT_CHARS
            prompt = await self._render(request, is_long=is_long)
            return request, prompt, self._sampling(request, len(prompt["prompt_token_ids"]))
        except Exception:  # Whatever it is, it happens again where it is answered.
            return None

    def _sampling(self, request: _Request, num_prompt_tokens: int) -> SamplingParams:
        serving: Any = self._serving.completion
        asked = request.max_tokens
        if isinstance(request, ChatCompletionRequest):
            serving = self._serving.chat
            asked = request.max_completion_tokens or asked
        defaults = serving.default_sampling_params
        max_tokens = get_max_tokens(
            self._model_config.max_model_len, asked, num_prompt_tokens, defaults, serving.override_max_tokens
        )
        return request.to_sampling_params(max_tokens, defaults)

    async def _render(self, request: _Request, *, is_long: bool) -> Any:
        extras = {"cache_salt": request.cache_salt} if request.cache_salt is not None else None
        tokenizing = request.build_tok_params(self._model_config)
        if isinstance(request, ChatCompletionRequest):
            online = self._serving.chat.online_renderer
            chat = request.build_chat_params(online.chat_template, online.chat_template_content_format)
            chat = chat.with_defaults({**online.default_chat_template_kwargs, "tools": None, "tokenize": False})
            arguments = [request.messages], chat, tokenizing
            if is_long:
                _, (prompt,) = await self._renderer.render_chat_async(*arguments, prompt_extras=extras)
            else:
                _, (prompt,) = self._renderer.render_chat(*arguments, prompt_extras=extras)
            return prompt
        prompts = [parse_model_prompt(self._model_config, request.prompt)]
        if is_long:
            (prompt,) = await self._renderer.render_cmpl_async(prompts, tokenizing, prompt_extras=extras)
        else:
            (prompt,) = self._renderer.render_cmpl(prompts, tokenizing, prompt_extras=extras)
        return prompt
