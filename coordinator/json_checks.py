"""Checks of one value of a JSON request: its type, its range and its size, with the field's name in the message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from kvrelay.coordinator.request_limits import RequestBounds
from kvrelay.errors import InvalidRequestError

Check = Callable[[str, Any, RequestBounds], None]
"""Called with the field's name, its value, which is not None, and the bounds; raises `InvalidRequestError`."""

_SHOWN_CHARS = 80


def refuse(name: str, value: Any, requirement: str, *, field: str | None = None) -> InvalidRequestError:
    """The error for a value, shown cut short, that does not meet its requirement.

    `name` may be more precise than the parameter's own name, which then is `field`.
    """
    return InvalidRequestError(f"{name} is {_shown(value)}; it must be {requirement}", field=field or name)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"an array of {len(value)} elements"
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, float) or is_integer(value)


def boolean(name: str, value: Any, _: RequestBounds) -> None:
    if not isinstance(value, bool):
        raise refuse(name, value, "true or false")


def structure(max_bytes: Callable[[RequestBounds], int], *keys: str) -> Check:
    """An object of at most so many bytes as JSON; with `keys`, these are all it may have."""

    def check(name: str, value: Any, bounds: RequestBounds) -> None:
        if not isinstance(value, dict):
            raise refuse(name, value, "an object")
        for key in value:
            if keys and key not in keys:
                raise InvalidRequestError(f"{name} has the unknown field {key[:_SHOWN_CHARS]!r}", field=name)
        _check_size(name, value, max_bytes(bounds))

    return check


def _check_size(name: str, value: Any, max_bytes: int) -> None:
    num_bytes = len(msgspec.json.encode(value))
    if num_bytes > max_bytes:
        raise InvalidRequestError(f"{name} has {num_bytes} bytes; at most {max_bytes} are taken", field=name)


def number(low: float, high: float) -> Check:
    """A number from `low` to `high`."""

    def check(name: str, value: Any, _: RequestBounds) -> None:
        if not is_number(value) or not low <= value <= high:
            raise refuse(name, value, f"a number from {low:g} to {high:g}")

    return check


def integer(low: int, high: int | Callable[[RequestBounds], int]) -> Check:
    """An integer from `low` to `high`, which may depend on the model."""

    def check(name: str, value: Any, bounds: RequestBounds) -> None:
        most = high if isinstance(high, int) else high(bounds)
        if not is_integer(value) or not low <= value <= most:
            raise refuse(name, value, f"an integer from {low} to {most}")

    return check


def string(max_chars: int | Callable[[RequestBounds], int]) -> Check:
    def check(name: str, value: Any, bounds: RequestBounds) -> None:
        most = max_chars if isinstance(max_chars, int) else max_chars(bounds)
        if not isinstance(value, str) or len(value) > most:
            raise refuse(name, value, f"a string of at most {most} characters")

    return check


def array(max_items: Callable[[RequestBounds], int], max_bytes: Callable[[RequestBounds], int] | None = None) -> Check:
    def check(name: str, value: Any, bounds: RequestBounds) -> None:
        most = max_items(bounds)
        if not isinstance(value, list) or len(value) > most:
            raise refuse(name, value, f"an array of at most {most} elements")
        if max_bytes is not None:
            _check_size(name, value, max_bytes(bounds))

    return check


def strings(
    max_items: Callable[[RequestBounds], int], max_chars: Callable[[RequestBounds], int], *, or_one: bool = False
) -> Check:
    """An array of strings that are not empty; `or_one` takes a single string, too."""

    def check(name: str, value: Any, bounds: RequestBounds) -> None:
        items, chars = max_items(bounds), max_chars(bounds)
        given = [value] if or_one and isinstance(value, str) else value
        fits = isinstance(given, list) and len(given) <= items
        if not fits or not all(isinstance(item, str) and 0 < len(item) <= chars for item in given):
            raise refuse(name, value, f"at most {items} strings of 1 to {chars} characters")

    return check


def token_ids(max_items: Callable[[RequestBounds], int]) -> Check:
    """An array of ids of the model's vocabulary."""

    def check(name: str, value: Any, bounds: RequestBounds) -> None:
        items = max_items(bounds)
        if not isinstance(value, list) or len(value) > items:
            raise refuse(name, value, f"an array of at most {items} token ids")
        for token_id in value:
            if not is_integer(token_id) or not 0 <= token_id < bounds.vocab_size:
                raise refuse(f"{name}[]", token_id, f"a token id from 0 to {bounds.vocab_size - 1}", field=name)

    return check


def logit_bias(name: str, value: Any, bounds: RequestBounds) -> None:
    most = bounds.limits.max_logit_biases
    if not isinstance(value, dict) or len(value) > most:
        raise refuse(name, value, f"an object of at most {most} fields")
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < bounds.vocab_size):
            raise refuse(f"a key of {name}", key, f"a token id from 0 to {bounds.vocab_size - 1}", field=name)
        if not is_number(bias) or not -100 <= bias <= 100:
            raise refuse(f"{name}[{key}]", bias, "a number from -100 to 100", field=name)


def check_depth(value: Any, max_depth: int) -> None:
    """Raises `InvalidRequestError` when arrays and objects are nested more than `max_depth` deep."""
    level = [value]
    for _ in range(max_depth + 1):
        children = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for group in children for child in group if isinstance(child, dict | list)]
        if not level:
            return
    raise InvalidRequestError(f"the JSON is nested too deeply; at most {max_depth} levels are taken")
