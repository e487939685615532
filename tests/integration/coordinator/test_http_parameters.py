"""Does the table of parameters hold against anything that JSON can say?"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from kvrelay.coordinator.http_parameters import (
    CHAT,
    COMPLETION,
    DETOKENIZE,
    TOKENIZE,
    WITHOUT_EFFECT,
    check_parameters,
)
from kvrelay.coordinator.json_checks import check_depth
from kvrelay.coordinator.request_limits import RequestBounds, RequestLimits
from kvrelay.errors import InvalidRequestError

BOUNDS = RequestBounds(limits=RequestLimits(), vocab_size=1000, max_model_len_tokens=512, max_logprobs=20)
TABLES = {"chat": CHAT, "completion": COMPLETION, "tokenize": TOKENIZE, "detokenize": DETOKENIZE}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from([2**63, -(2**63) - 1, 10**400, 1e-320, 1e308]),
    lambda children: st.lists(children, max_size=5) | st.dictionaries(st.text(max_size=5), children, max_size=5),
    max_leaves=10,
)


def refusal(body: Any, table: dict[str, Any]) -> InvalidRequestError | None:
    """The error of a check that must either refuse or give back what is set; anything else it raises is a failure."""
    try:
        fields = check_parameters(body, table, BOUNDS)
    except InvalidRequestError as error:
        return error
    assert fields == {name: value for name, value in body.items() if value is not None and name not in WITHOUT_EFFECT}
    return None


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@given(data=st.data())
def test_any_value_is_taken_or_refused_by_name(table: dict[str, Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(table)))
    value = data.draw(JSON)
    error = refusal({name: value}, table)
    assert error is None or (error.field == name and len(error.message) < 1000)


@given(JSON)
def test_any_body_is_taken_or_refused(body: Any) -> None:
    error = refusal(body, CHAT)
    assert error is None or error.message


@pytest.mark.parametrize(("table", "model"), [(CHAT, ChatCompletionRequest), (COMPLETION, CompletionRequest)])
def test_everything_offered_is_a_field_of_vllms_request(table: dict[str, Any], model: Any) -> None:
    assert set(table) <= set(model.model_fields)
    assert not set(table) & WITHOUT_EFFECT


@pytest.mark.parametrize("levels", [1, 5, 64])
def test_depth_is_counted_from_the_outside(levels: int) -> None:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    check_depth(value, levels)
    with pytest.raises(InvalidRequestError):
        check_depth([{"a": value}], levels)
