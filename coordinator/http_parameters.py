"""Which fields the OpenAI routes take, and the check of each: what is not in these tables is refused.

vLLM's request models take unknown fields silently, convert strings to numbers, and have fields that would reach
into an engine or fetch from the network. So the tables come first, vLLM's validation second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvrelay.coordinator.http_prompts import check_messages, check_prompts
from kvrelay.coordinator.json_checks import (
    Check,
    array,
    boolean,
    check_depth,
    integer,
    is_integer,
    string,
    structure,
    token_ids,
)
from kvrelay.coordinator.prompt_limits import MAX_CACHE_SALT_CHARS
from kvrelay.coordinator.request_limits import RequestBounds
from kvrelay.coordinator.sampling_checks import SAMPLING
from kvrelay.errors import InvalidRequestError

_INT31 = 2**31 - 1
_INT64 = 2**63 - 1
_CONSTRAINTS = (
    "json",
    "regex",
    "choice",
    "grammar",
    "json_object",
    "structural_tag",
    "disable_any_whitespace",
    "disable_additional_properties",
    "whitespace_pattern",
)


def _small(_: RequestBounds) -> int:
    return 1024


def check_tokenized_messages(name: str, value: Any, bounds: RequestBounds) -> None:
    check_messages(name, value, bounds)
    array(lambda bounds: bounds.limits.max_messages, lambda bounds: bounds.limits.max_tokenize_chars)(
        name, value, bounds
    )


def check_tool_choice(name: str, value: Any, bounds: RequestBounds) -> None:
    """A word or one function's name; which words there are, vLLM knows."""
    if not isinstance(value, str):
        structure(_small)(name, value, bounds)


_COMMON: dict[str, Check] = {
    **SAMPLING,
    "response_format": structure(lambda bounds: bounds.limits.max_constraint_bytes),
    "structured_outputs": structure(lambda bounds: bounds.limits.max_constraint_bytes, *_CONSTRAINTS),
    "model": string(1024),
    "stream": boolean,
    "stream_options": structure(_small, "include_usage", "continuous_usage_stats"),
    "echo": boolean,
    "add_special_tokens": boolean,
    "priority": integer(-(2**31), _INT31),
    "cache_salt": string(MAX_CACHE_SALT_CHARS),
    "return_token_ids": boolean,
    "return_tokens_as_token_ids": boolean,
    "user": string(1024),
}

_TEMPLATE: dict[str, Check] = {
    "messages": check_messages,
    "tools": array(lambda bounds: bounds.limits.max_tools, lambda bounds: bounds.limits.max_tools_bytes),
    "add_generation_prompt": boolean,
    "continue_final_message": boolean,
    "chat_template_kwargs": structure(lambda bounds: bounds.limits.max_constraint_bytes),
}

CHAT: dict[str, Check] = {
    **_COMMON,
    **_TEMPLATE,
    "logprobs": boolean,
    "top_logprobs": integer(0, lambda bounds: bounds.max_logprobs),
    "max_tokens": integer(1, _INT64),
    "max_completion_tokens": integer(1, _INT64),
    "tool_choice": check_tool_choice,
    "parallel_tool_calls": boolean,
    "documents": array(lambda bounds: bounds.limits.max_messages),
    "reasoning_effort": string(16),
    "include_reasoning": boolean,
}
"""/v1/chat/completions"""

COMPLETION: dict[str, Check] = {
    **_COMMON,
    "prompt": check_prompts,
    "logprobs": integer(0, lambda bounds: bounds.max_logprobs),
    "max_tokens": integer(0, _INT64),
}
"""/v1/completions"""

TOKENIZE: dict[str, Check] = {
    **_TEMPLATE,
    "messages": check_tokenized_messages,
    "model": string(1024),
    "prompt": string(lambda bounds: bounds.limits.max_tokenize_chars),
    "add_special_tokens": boolean,
    "return_token_strs": boolean,
}

DETOKENIZE: dict[str, Check] = {
    "model": string(1024),
    "tokens": token_ids(lambda bounds: bounds.limits.max_detokenize_tokens),
}

WITHOUT_EFFECT = frozenset(
    {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
"""Fields of OpenAI's API about accounts and billing: taken on both generating routes, and ignored."""


def check_parameters(body: Any, table: Mapping[str, Check], bounds: RequestBounds) -> dict[str, Any]:
    """The fields to give to vLLM's request model: those that are set, each checked on its own.

    Raises `InvalidRequestError` for what is no object, too deep, unknown, of a wrong type or out of range.
    """
    if not isinstance(body, dict):
        raise InvalidRequestError(f"the body is of type {type(body).__name__}; it must be a JSON object")
    fields = {name: value for name, value in body.items() if value is not None and name not in WITHOUT_EFFECT}
    check_depth({name: value for name, value in fields.items() if name != "prompt"}, bounds.limits.max_json_depth)
    for name, value in fields.items():
        check = table.get(name)
        if check is None:
            raise InvalidRequestError(f"{name[:80]!r} is not a parameter of this route", field=name[:80])
        check(name, value, bounds)
    _check_num_completions(fields, bounds)
    return fields


def _check_num_completions(fields: Mapping[str, Any], bounds: RequestBounds) -> None:
    prompt = fields.get("prompt")
    num_prompts = len(prompt) if isinstance(prompt, list) and prompt and not is_integer(prompt[0]) else 1
    num_completions = num_prompts * fields.get("n", 1)
    if num_completions > bounds.limits.max_completions:
        raise InvalidRequestError(
            f"{num_prompts} prompts with n={fields.get('n', 1)} are {num_completions} completions; "
            f"at most {bounds.limits.max_completions} are taken in one request",
            field="n" if num_prompts == 1 else "prompt",
        )
