"""The peers of a worker: connections to workers that are gone do not pile up."""

from __future__ import annotations

import pytest

from kvrelay.kv_transfer.peer import PeerError, Peers
from tests.support.kv_pair import make_layout


async def test_a_peer_that_nobody_uses_is_closed() -> None:
    now = 0.0
    peers = Peers(make_layout(), clock=lambda: now)
    old = peers.get("127.0.0.1:1")
    now = 200.0
    young = peers.get("127.0.0.1:2")
    now = 301.0

    await peers.expire()

    assert peers.get("127.0.0.1:2") is young
    assert peers.get("127.0.0.1:1") is not old
    await peers.close()


@pytest.mark.parametrize(
    "address", ["", "host", "unix:/run/docker.sock", "dns://1.2.3.4/host:1", "a b:1", "host:123456"]
)
async def test_what_is_not_host_and_port_is_not_dialled(address: str) -> None:
    with pytest.raises(PeerError, match="is not host:port"):
        Peers(make_layout()).get(address)
