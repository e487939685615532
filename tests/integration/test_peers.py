"""Connections to workers that are gone do not pile up."""

from __future__ import annotations

from kvrelay.kv_transfer.peer import Peers


async def test_a_peer_that_nobody_uses_is_closed() -> None:
    now = 0.0
    peers = Peers(clock=lambda: now)
    old = peers.get("127.0.0.1:1")
    now = 200.0
    young = peers.get("127.0.0.1:2")
    now = 301.0

    await peers.expire()

    assert peers.get("127.0.0.1:2") is young
    assert peers.get("127.0.0.1:1") is not old
    await peers.close()
