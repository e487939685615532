"""Key ranges, etcd's log, and which binary is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.etcd import prefix_end
from kvrelay.etcd.server import EtcdServerError, address_in_log, advice, find_etcd, server_arguments


@given(prefix=st.binary(min_size=1, max_size=4), key=st.binary(max_size=6))
def test_a_range_holds_exactly_the_keys_with_the_prefix(prefix: bytes, key: bytes) -> None:
    end = prefix_end(prefix)
    in_range = prefix <= key and (end == b"\0" or key < end)
    assert in_range == key.startswith(prefix)


def test_reads_the_address_that_etcd_logs() -> None:
    message = "serving client traffic insecurely; this is strongly discouraged!"
    assert address_in_log(json.dumps({"msg": message, "address": "127.0.0.1:41611"})) == "127.0.0.1:41611"


@pytest.mark.parametrize("line", ["", "panic: x", "[1]", '{"msg": "ready to serve client requests"}'])
def test_other_lines_have_no_address(line: str) -> None:
    assert address_in_log(line) is None


def test_listens_on_loopback_unless_told_otherwise() -> None:
    arguments = server_arguments(Path("/bin/etcd"), Path("/data"))
    assert "--listen-client-urls=http://127.0.0.1:0" in arguments
    assert "--listen-peer-urls=http://127.0.0.1:0" in arguments


def test_every_server_has_a_token_of_its_own() -> None:
    first, second = (server_arguments(Path("/bin/etcd"), Path("/data")) for _ in range(2))
    assert first != second


def test_an_explicit_binary_that_is_missing_is_named() -> None:
    with pytest.raises(EtcdServerError, match="/nowhere/etcd"):
        find_etcd(Path("/nowhere/etcd"))


def test_takes_path_before_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "etcd"
    binary.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_etcd() == binary


def test_falls_back_to_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_etcd().name == "etcd"


@pytest.mark.parametrize("version", ["3.5.1", "3.4.30", "3.5.5"])
def test_advises_against_old_servers(version: str) -> None:
    text = advice(version)
    assert text is not None
    assert version in text


@pytest.mark.parametrize("version", ["3.5.6", "3.5.33", "3.6.0", "4.0.0-rc.1", ""])
def test_has_nothing_to_say_about_others(version: str) -> None:
    assert advice(version) is None
