"""Two workers find each other in the receiver's store, and nobody waits there for somebody who cannot come."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvrelay.kv_transfer.collective_group import GroupError
from kvrelay.kv_transfer.rendezvous import Rendezvous, meet, own_host_towards
from kvrelay.v1.kv_transfer_pb2 import COLLECTIVE_BACKEND_GLOO


@pytest.fixture
def rendezvous() -> Iterator[Rendezvous]:
    rendezvous = Rendezvous("127.0.0.1", "localhost", 5)
    yield rendezvous
    rendezvous.close()


def test_both_get_the_groups_part_of_the_store(rendezvous: Rendezvous) -> None:
    invitation = rendezvous.invitation(COLLECTIVE_BACKEND_GLOO)
    assert invitation.store_address.startswith("localhost:")
    with ThreadPoolExecutor() as threads:
        sender = threads.submit(meet, invitation.store_address, invitation.world, 7, 0, threading.Event(), 5)
        receiver = threads.submit(meet, rendezvous.own_address, rendezvous.world, 7, 1, threading.Event(), 5)
        sender.result().set("key", "value")
        assert receiver.result().get("key") == b"value"


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="the machine has no IPv6")
@pytest.mark.parametrize("listen_host", ["[::1]", "[::]"])
def test_two_meet_by_ipv6(listen_host: str) -> None:
    rendezvous = Rendezvous(listen_host, "[::1]", 5)
    address = rendezvous.invitation(COLLECTIVE_BACKEND_GLOO).store_address
    assert own_host_towards(address) == "::1"
    with ThreadPoolExecutor() as threads:
        sender = threads.submit(meet, address, rendezvous.world, 7, 0, threading.Event(), 5)
        receiver = threads.submit(meet, rendezvous.own_address, rendezvous.world, 7, 1, threading.Event(), 5)
        sender.result().set("key", "value")
        assert receiver.result().get("key") == b"value"
    rendezvous.close()


def test_groups_do_not_see_each_other(rendezvous: Rendezvous) -> None:
    with ThreadPoolExecutor() as threads:
        ends = [
            threads.submit(meet, rendezvous.own_address, rendezvous.world, group, rank, threading.Event(), 5)
            for group in (1, 2)
            for rank in (0, 1)
        ]
        ends[0].result().set("key", "value")
        assert ends[1].result().check(["key"])
        assert not ends[2].result().check(["key"])


@pytest.mark.parametrize(
    ("world", "timeout_s", "reason"), [(1, 5, "is another one"), (0, 0.1, "did not come")], ids=["world", "alone"]
)
def test_nobody_to_meet(rendezvous: Rendezvous, world: int, timeout_s: float, reason: str) -> None:
    began = time.monotonic()
    with pytest.raises(GroupError, match=reason):
        meet(rendezvous.own_address, world or rendezvous.world, 7, 0, threading.Event(), timeout_s)
    assert time.monotonic() - began < 2


def test_whoever_is_told_to_stop_does_not_wait(rendezvous: Rendezvous) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(meet, rendezvous.own_address, rendezvous.world, 7, 0, stop, 60)
        stop.set()
        with pytest.raises(GroupError):
            waiting.result(5)


def test_a_store_that_closes_ends_the_wait() -> None:
    rendezvous = Rendezvous("127.0.0.1", "127.0.0.1", 5)
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(meet, rendezvous.own_address, rendezvous.world, 7, 0, threading.Event(), 60)
        rendezvous.close()
        rendezvous.close()
        with pytest.raises(GroupError):
            waiting.result(10)


def test_a_store_that_closes_while_somebody_connects_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rendezvous = Rendezvous("127.0.0.1", "127.0.0.1", 5)
    connect = socket.create_connection

    def connect_last(address: tuple[str, int], timeout: float) -> socket.socket:
        connection = connect(address, timeout)
        rendezvous.close()
        return connection

    monkeypatch.setattr(socket, "create_connection", connect_last)
    began = time.monotonic()
    with pytest.raises(GroupError, match="no rendezvous"):
        meet(rendezvous.own_address, rendezvous.world, 7, 0, threading.Event(), 60)
    assert time.monotonic() - began < 10


def test_a_port_that_refuses_is_not_tried_again() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(GroupError, match="no rendezvous"):
            meet(f"127.0.0.1:{port}", 1, 7, 0, threading.Event(), 60)
        assert time.monotonic() - began < 2


def test_every_interface_may_be_listened_at() -> None:
    rendezvous = Rendezvous("0.0.0.0", "127.0.0.1", 5)
    with pytest.raises(GroupError, match="did not come"):
        meet(rendezvous.own_address, rendezvous.world, 7, 0, threading.Event(), 0.1)
    rendezvous.close()


def test_a_host_that_is_not_this_machines_cannot_be_listened_at() -> None:
    with pytest.raises(OSError, match="assign requested address"):
        Rendezvous("192.0.2.1", "192.0.2.1", 5)


def test_the_own_host_is_an_address_whatever_the_machine_is_called() -> None:
    assert own_host_towards("127.0.0.1:9") == "127.0.0.1"
    with pytest.raises(GroupError, match="no way"):
        own_host_towards("no-such-host.invalid:9")
