"""What a request asks for comes from headers or fields, and nonsense is told by name."""

from __future__ import annotations

import pytest

from kvrelay.coordinator.admission.request_class import BATCH, INTERACTIVE, STANDARD
from kvrelay.coordinator.request_terms import STANDARD_TERMS, RequestTerms, terms_of_headers, terms_of_request
from kvrelay.errors import InvalidRequestError
from kvrelay.v1 import inference_pb2


def of_headers(**headers: str) -> RequestTerms:
    raw = [(f"x-kvrelay-{name.replace('_', '-')}".encode(), value.encode()) for name, value in headers.items()]
    return terms_of_headers([(b"host", b"a"), *raw])


def of_fields(*, ttft_s: float | None = None, itl_s: float | None = None, **fields: str) -> RequestTerms:
    targets = inference_pb2.Targets(ttft_s=ttft_s, itl_s=itl_s)
    return terms_of_request(inference_pb2.GenerateRequest(targets=targets, **fields))  # type: ignore[arg-type]


def test_who_says_nothing_gets_standard_terms() -> None:
    assert of_headers() is STANDARD_TERMS
    assert of_fields() == STANDARD_TERMS
    assert STANDARD_TERMS.request_class is STANDARD


def test_both_apis_say_the_same() -> None:
    terms = RequestTerms(request_class=BATCH, tenant="org/team-7", ttft_s=2.5, itl_s=0.05)
    assert of_headers(**{"class": "batch"}, tenant="org/team-7", ttft_s="2.5", itl_s="0.05") == terms
    assert of_fields(request_class="batch", tenant="org/team-7", ttft_s=2.5, itl_s=0.05) == terms


def test_a_class_brings_its_targets_unless_they_are_given() -> None:
    terms = of_headers(**{"class": "interactive"}, ttft_s="3")
    assert (terms.ttft_s, terms.itl_s) == (3.0, INTERACTIVE.itl_s)
    assert of_fields(request_class="interactive").ttft_s == INTERACTIVE.ttft_s


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("class", "urgent", "x-kvrelay-class is 'urgent'; it must be one of interactive, standard, batch"),
        ("tenant", "two words", "x-kvrelay-tenant is 'two words'"),
        ("tenant", "t" * 129, "x-kvrelay-tenant is 'ttt"),
        ("ttft-s", "soon", "x-kvrelay-ttft-s is 'soon'; it must be a number from 0.001 to 86400"),
        ("ttft-s", "", "x-kvrelay-ttft-s is ''"),
        ("ttft-s", "nan", "x-kvrelay-ttft-s is 'nan'"),
        ("ttft-s", "inf", "x-kvrelay-ttft-s is 'inf'"),
        ("ttft-s", "1_0", "x-kvrelay-ttft-s is '1_0'"),
        ("itl-s", "-1", "x-kvrelay-itl-s is '-1'"),
        ("itl-s", "0", "x-kvrelay-itl-s is '0'"),
        ("itl-s", "99999999", "x-kvrelay-itl-s is '99999999'"),
    ],
)
def test_nonsense_in_headers_is_told(name: str, value: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        of_headers(**{name: value})
    assert raised.value.message.startswith(message)
    assert raised.value.field == f"x-kvrelay-{name}"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"request_class": "urgent"}, "request_class"),
        ({"tenant": "two words"}, "tenant"),
        ({"ttft_s": 0.0}, "targets.ttft_s"),
        ({"ttft_s": float("nan")}, "targets.ttft_s"),
        ({"itl_s": 1e9}, "targets.itl_s"),
    ],
)
def test_nonsense_in_fields_is_told(fields: dict[str, float], field: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        of_fields(**fields)  # type: ignore[arg-type]
    assert raised.value.field == field
