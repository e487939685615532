"""Which requests are plain: a streamed answer of one completion, that nothing is done with but making text of it?"""

from __future__ import annotations

from typing import Any

_SAMPLING = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "ignore_eos",
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "max_tokens",
        "max_completion_tokens",
    }
)
_PLAIN = _SAMPLING | {"model", "stream", "stream_options", "priority", "cache_salt", "user", "messages", "prompt"}
_MESSAGE = {"role", "content"}
_ROLES = ("system", "user", "assistant")


def is_plain(body: Any) -> bool:
    """Whether a decoded body, not checked yet, asks for no more than that."""
    if not isinstance(body, dict) or body.get("stream") is not True or not body.keys() <= _PLAIN:
        return False
    options = body.get("stream_options")
    if isinstance(options, dict) and options.get("continuous_usage_stats"):
        return False
    return _are_plain_messages(body["messages"]) if "messages" in body else _is_one_prompt(body.get("prompt"))


def _are_plain_messages(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(message, dict)
        and message.keys() == _MESSAGE
        and message["role"] in _ROLES
        and isinstance(message["content"], str)
        for message in messages
    )


def _is_one_prompt(prompt: Any) -> bool:
    """Of several prompts each is a completion."""
    return isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int))
