"""Do sampling parameters cross the network unchanged, and is what cannot cross refused?"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

from kvrelay.errors import InvalidRequestError
from kvrelay.sampling import CARRIED, FRONT_END_ONLY, REFUSED, structured_to_vllm, to_proto, to_vllm
from kvrelay.v1 import common_pb2

TOKEN = st.integers(0, 2**31 - 1)
CONSTRAINTS = st.one_of(
    st.fixed_dictionaries({"json": st.one_of(st.text(min_size=1), st.dictionaries(st.text(), st.integers()))}),
    st.fixed_dictionaries({"regex": st.text()}),
    st.fixed_dictionaries({"choice": st.lists(st.text(), min_size=1)}),
    st.fixed_dictionaries({"grammar": st.text()}),
    st.fixed_dictionaries({"json_object": st.just(True)}),
    st.fixed_dictionaries({"structural_tag": st.text()}),
)


@st.composite
def structured(draw: st.DrawFn) -> StructuredOutputsParams:
    params = StructuredOutputsParams(
        disable_any_whitespace=draw(st.booleans()),
        disable_additional_properties=draw(st.booleans()),
        whitespace_pattern=draw(st.none() | st.text()),
        **draw(CONSTRAINTS),
    )
    params._backend = draw(st.none() | st.sampled_from(["xgrammar", "guidance", "outlines"]))
    return params


@st.composite
def sampling(draw: st.DrawFn) -> SamplingParams:
    """Parameters as vLLM's InputProcessor leaves them."""
    max_tokens = draw(st.integers(1, 2**31))
    params = SamplingParams(
        temperature=draw(st.floats(0, 2)),
        top_p=draw(st.floats(0, 1, exclude_min=True)),
        top_k=draw(st.integers(-1, 2**31 - 1)),
        min_p=draw(st.floats(0, 1)),
        seed=draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
        presence_penalty=draw(st.floats(-2, 2)),
        frequency_penalty=draw(st.floats(-2, 2)),
        repetition_penalty=draw(st.floats(0, 100, exclude_min=True)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        ignore_eos=draw(st.booleans()),
        stop=draw(st.none() | st.lists(st.text(min_size=1), max_size=3)),
        stop_token_ids=draw(st.none() | st.lists(TOKEN, max_size=4)),
        bad_words=draw(st.none() | st.lists(st.text(min_size=1), max_size=2)),
        logprobs=draw(st.none() | st.integers(-1, 100)),
        prompt_logprobs=draw(st.none() | st.integers(-1, 100)),
        logit_bias=draw(st.none() | st.dictionaries(TOKEN, st.floats(-100, 100), min_size=1)),
        allowed_token_ids=draw(st.none() | st.lists(TOKEN, min_size=1)),
        structured_outputs=draw(st.none() | structured()),
    )
    params._eos_token_id = draw(st.none() | TOKEN)
    params._all_stop_token_ids = draw(st.sets(TOKEN))
    params._bad_words_token_ids = draw(st.none() | st.lists(st.lists(TOKEN, min_size=1), min_size=1))
    return params


@settings(max_examples=60, deadline=None)
@given(sampling())
def test_what_is_carried_arrives_exactly(params: SamplingParams) -> None:
    arrived = to_vllm(common_pb2.SamplingParams.FromString(to_proto(params).SerializeToString()))
    for name in CARRIED - {"structured_outputs"}:
        assert getattr(arrived, name) == getattr(params, name), name
    assert to_proto(arrived) == to_proto(params)
    sent, got = params.structured_outputs, arrived.structured_outputs
    assert (sent is None) == (got is None)
    if sent is not None and got is not None and not isinstance(sent.json, dict):
        ignored = {"_backend_was_auto"}
        assert {k: v for k, v in vars(got).items() if k not in ignored} == {
            k: v for k, v in vars(sent).items() if k not in ignored
        }


def test_every_field_of_vllms_class_is_accounted_for() -> None:
    known = CARRIED | FRONT_END_ONLY | set(REFUSED)
    assert known == set(SamplingParams.__struct_fields__)
    assert len(known) == len(CARRIED) + len(FRONT_END_ONLY) + len(REFUSED)


@pytest.mark.parametrize(
    "values",
    [
        {"n": 2},
        {"watermarking": True},
        {"extra_args": {"a": 1}},
        {"logprob_token_ids": [1]},
        {"prompt_logprob_token_ids": [[1]]},
        {"prompt_logprob_start": 1},
        {"thinking_token_budget": 5},
        {"repetition_detection": RepetitionDetectionParams(max_pattern_size=2, min_count=2)},
        {"trace_decode_token_ids": [1]},
        {"routed_experts_prompt_start": 1},
        {"skip_reading_prefix_cache": True},
        {"seed": 2**63},
        {"top_k": 2**31},
        {"max_tokens": 2**32},
    ],
    ids=lambda values: next(iter(values)),
)
def test_what_cannot_cross_is_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        to_proto(SamplingParams(**values))
    assert raised.value.field == next(iter(values))


def test_worker_gets_token_steps_and_no_text() -> None:
    arrived = to_vllm(to_proto(SamplingParams(stop=["x"], bad_words=["y"], max_tokens=3)))
    assert arrived.detokenize is False
    assert arrived.output_kind is RequestOutputKind.DELTA
    assert arrived.stop == []
    assert arrived.bad_words == []


def test_values_out_of_vllms_range_are_refused_in_the_worker() -> None:
    with pytest.raises(InvalidRequestError, match="top_p"):
        to_vllm(common_pb2.SamplingParams(top_p=1.5, max_tokens=1))


def test_structured_output_without_a_constraint_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="constraint"):
        structured_to_vllm(common_pb2.StructuredOutput())


def test_schema_objects_become_the_text_that_vllm_makes_of_them() -> None:
    from vllm.v1.structured_output.request import get_structured_output_key

    schema = {"type": "object", "properties": {"é": {"type": "string"}}}
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json=schema))
    arrived = to_vllm(to_proto(params))
    assert params.structured_outputs is not None
    assert arrived.structured_outputs is not None
    assert get_structured_output_key(arrived.structured_outputs) == get_structured_output_key(params.structured_outputs)
