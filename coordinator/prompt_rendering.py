"""Prompts of the gRPC service as token ids: text, chats through the model's template, ids as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.inputs import EngineInput, tokens_input
from vllm.renderers import BaseRenderer
from vllm.renderers.params import ChatParams

from kvrelay.errors import InvalidRequestError
from kvrelay.v1 import inference_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    text: str | None = None
    """A Jinja template; the model's own when None."""
    arguments: Mapping[str, Any] = field(default_factory=dict)


_ROLES = ("system", "user", "assistant")


async def render_text(
    renderer: BaseRenderer, text: str, *, cache_salt: str = "", add_special_tokens: bool = True
) -> EngineInput:
    """Tokenize in the renderer's thread; raises vLLM's validation error when the text is too long."""
    params = replace(renderer.default_cmpl_tok_params, add_special_tokens=add_special_tokens)
    (rendered,) = await renderer.render_cmpl_async([{"prompt": text}], params, prompt_extras=_extras(cache_salt))
    return rendered


def render_token_ids(token_ids: Sequence[int], *, cache_salt: str = "") -> EngineInput:
    return tokens_input(list(token_ids), cache_salt=cache_salt or None)


async def render_chat(
    renderer: BaseRenderer, chat: inference_pb2.Chat, template: ChatTemplate, *, cache_salt: str = ""
) -> EngineInput:
    """Apply the chat template with a generation prompt, as the OpenAI API does.

    Raises `InvalidRequestError` for an empty chat or an unknown role, and what the template raises.
    """
    if not chat.messages:
        raise InvalidRequestError("chat.messages is empty; it needs at least one message", field="chat.messages")
    for message in chat.messages:
        if message.role not in _ROLES:
            raise InvalidRequestError(
                f"chat.messages.role is {message.role!r}; it must be one of {', '.join(_ROLES)}",
                field="chat.messages.role",
            )
    messages: list[Any] = [{"role": message.role, "content": message.content} for message in chat.messages]
    params = ChatParams(
        chat_template=template.text,
        chat_template_kwargs={**template.arguments, "add_generation_prompt": True, "tools": None, "tokenize": False},
    )
    _, (rendered,) = await renderer.render_chat_async([messages], params, prompt_extras=_extras(cache_salt))
    return rendered


def _extras(cache_salt: str) -> dict[str, Any]:
    return {"cache_salt": cache_salt} if cache_salt else {}
