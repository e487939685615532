"""Does every error have one place in the table, and does a status lead back to it?"""

from __future__ import annotations

import grpc
import pytest

from kvrelay.errors import (
    STATUSES,
    GenerationFailedError,
    InvalidRequestError,
    KvrelayError,
    NoWorkersError,
    error_from_grpc,
    error_from_http,
    status_of,
)


def test_every_kind_of_error_has_a_status() -> None:
    assert set(STATUSES) == set(KvrelayError.__subclasses__())


def test_no_two_kinds_share_a_grpc_status() -> None:
    assert len({status.grpc for status in STATUSES.values()}) == len(STATUSES)


@pytest.mark.parametrize("kind", STATUSES)
def test_grpc_status_leads_back(kind: type[KvrelayError]) -> None:
    error = error_from_grpc(status_of(kind("why")).grpc, "why")
    assert type(error) is kind
    assert error.message == "why"


@pytest.mark.parametrize("kind", STATUSES)
def test_http_status_leads_back_to_an_error_of_that_status(kind: type[KvrelayError]) -> None:
    error = error_from_http(status_of(kind("why")).http, "why", field="n")
    assert status_of(error).http == status_of(kind("why")).http
    assert error.field == "n"


def test_foreign_statuses_become_the_nearest_kind() -> None:
    assert isinstance(error_from_grpc(grpc.StatusCode.DATA_LOSS, "?"), GenerationFailedError)
    assert isinstance(error_from_http(422, "?"), InvalidRequestError)
    assert isinstance(error_from_http(502, "?"), GenerationFailedError)
    assert isinstance(error_from_http(503, "?"), NoWorkersError)
