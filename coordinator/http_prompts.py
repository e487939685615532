"""Which prompts and messages of the OpenAI routes are taken, before anything is tokenized."""

from __future__ import annotations

from typing import Any

from kvrelay.coordinator.json_checks import is_integer, refuse
from kvrelay.coordinator.request_limits import RequestBounds
from kvrelay.errors import InvalidRequestError

_CONTENT_TYPES = ("text", "refusal")


def check_messages(name: str, value: Any, bounds: RequestBounds) -> None:
    """Only text: vLLM would fetch images from where the client says."""
    most = bounds.limits.max_messages
    if not isinstance(value, list) or not 0 < len(value) <= most:
        raise refuse(name, value, f"an array of 1 to {most} messages")
    for index, message in enumerate(value):
        item = f"{name}[{index}]"
        if not isinstance(message, dict):
            raise refuse(item, message, "an object", field=name)
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind not in _CONTENT_TYPES:
                raise InvalidRequestError(
                    f"{item}.content has a part of type {kind!r}; only text is offered", field=name
                )


def check_prompts(name: str, value: Any, bounds: RequestBounds) -> None:
    """A string, token ids, or an array of either; no prompt is empty, and ids are the model's."""
    if isinstance(value, str):
        _check_one_prompt(name, value, bounds)
    elif not isinstance(value, list):
        raise refuse(name, value, "a string, an array of token ids, or an array of either")
    elif not value or is_integer(value[0]):
        _check_one_prompt(name, value, bounds)
    elif len(value) > bounds.limits.max_completions:
        raise refuse(name, value, f"an array of at most {bounds.limits.max_completions} prompts")
    else:
        for index, prompt in enumerate(value):
            _check_one_prompt(f"{name}[{index}]", prompt, bounds)


def _check_one_prompt(name: str, prompt: Any, bounds: RequestBounds) -> None:
    if not isinstance(prompt, str | list):
        raise refuse(name, prompt, "a string or an array of token ids", field="prompt")
    if not prompt:
        raise InvalidRequestError(f"{name} is empty; it needs at least one token", field="prompt")
    if isinstance(prompt, str):
        return
    if len(prompt) >= bounds.max_model_len_tokens:
        raise InvalidRequestError(
            f"{name} has {len(prompt)} tokens; together with at least one generated token it must fit into "
            f"the model's context of {bounds.max_model_len_tokens} tokens",
            field="prompt",
        )
    for token_id in prompt:
        if not is_integer(token_id) or not 0 <= token_id < bounds.vocab_size:
            raise InvalidRequestError(
                f"{name} has {token_id!r:.40}; each element must be a token id from 0 to {bounds.vocab_size - 1}",
                field="prompt",
            )
