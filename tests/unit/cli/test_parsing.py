"""Addresses, sizes and engine options: what is understood, and what is said about the rest."""

import pytest
import typer

from kvrelay.cli.parsing import (
    check_engine_options,
    parse_address,
    parse_addresses,
    parse_engine_args,
    parse_size,
    parse_store_size,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("host:80", "host:80"), ("127.0.0.1:0", "127.0.0.1:0"), ("[::1]:80", "[::1]:80"), (":80", "0.0.0.0:80")],
)
def test_addresses(text: str, expected: str) -> None:
    assert str(parse_address(text)) == expected


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x", "host:99999", "::1:80", "http://host:80", "host:-1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not an address; write HOST:PORT"):
        parse_address(text)


def test_several_addresses() -> None:
    assert str(parse_addresses("a:1, b:2")) == "a:1,b:2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("100", 100), ("2GiB", 2 << 30), ("512M", 512 << 20), ("1.5 gib", 3 << 29), ("2GB", 2 * 10**9), ("7B", 7)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2 apples", "2GiBs"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a size; write for example 2GiB"):
        parse_size(text)


def test_engine_options_follow_two_dashes() -> None:
    assert check_engine_options(["--dtype", "float32"]) == ("--dtype", "float32")
    with pytest.raises(typer.BadParameter, match="'float32' is one word too many"):
        check_engine_options(["float32"])


def test_engine_options_in_one_string() -> None:
    assert parse_engine_args("-tp 2 --hf-overrides '{\"a\": 1}'") == ("-tp", "2", "--hf-overrides", '{"a": 1}')
    assert parse_engine_args("") == ()
    with pytest.raises(typer.BadParameter, match="is not a command line: No closing quotation"):
        parse_engine_args("--dtype 'float32")
    with pytest.raises(typer.BadParameter, match="has to begin with an option"):
        parse_engine_args("float32")


def test_a_store_that_could_hold_nothing_is_refused() -> None:
    assert parse_store_size("16MiB") == 16 << 20
    with pytest.raises(typer.BadParameter, match="1KiB is too little"):
        parse_store_size("1KiB")
