"""Targets and headers as they are written on the command line."""

from __future__ import annotations

import pytest
import typer

from kvrelay.cli.load_options import parse_header, parse_targets
from kvrelay.workload.targets import Targets


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("ttft=2,tpot=0.1", Targets(ttft_s=2.0, tpot_s=0.1)),
        (" itl = .5 , e2e=1e1", Targets(itl_s=0.5, e2e_s=10.0)),
    ],
)
def test_targets(text: str, targets: Targets) -> None:
    assert parse_targets(text) == targets
    assert parse_targets(targets) is targets


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=", "ttft=x", "ttft=0", "ttft=-1", "ttft=inf", "ttft=nan", "ttft=1,ttft=2", "latency=1"]
)
def test_targets_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="not a target; write for example"):
        parse_targets(text)


@pytest.mark.parametrize(
    ("text", "header"),
    [("x-kvrelay-tenant: a", ("x-kvrelay-tenant", "a")), ("X:  b c ", ("X", "b c")), ("x-empty:", ("x-empty", ""))],
)
def test_headers(text: str, header: tuple[str, str]) -> None:
    assert parse_header(text) == header


@pytest.mark.parametrize("text", ["secret", ": secret", "a b: secret", "x: secret\r\ny: z", "x: secr\u00e9t"])
def test_headers_that_are_none_are_refused_without_their_value(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="'name: value'") as refused:
        parse_header(text)
    assert "secr" not in str(refused.value)


@pytest.mark.parametrize("name", ["Authorization", "Host", "content-length"])
def test_headers_of_the_client_itself_are_refused(name: str) -> None:
    with pytest.raises(typer.BadParameter, match=f"{name} is set by kvrelay itself"):
        parse_header(f"{name}: x")
