"""A group is made when a peer invites to one, and not soon after a failure; another receiver at the address ends it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kvrelay.kv_transfer import collecting
from kvrelay.kv_transfer.collect_stream import Sent
from kvrelay.kv_transfer.collecting import Collecting
from kvrelay.kv_transfer.collective_group import CollectiveConfig
from kvrelay.kv_transfer.collectives import Collectives
from kvrelay.v1.kv_transfer_pb2 import COLLECTIVE_BACKEND_GLOO, CollectiveInvitation, Want

GLOO = COLLECTIVE_BACKEND_GLOO
BACKOFF_S = 60.0


class Stream:
    """Stands in for a `CollectStream`: says what it was told."""

    def __init__(
        self,
        push_address: str,
        invitation: CollectiveInvitation,
        _collectives: Any,
        _on_ack: Any,
        on_end: Callable[..., None],
    ) -> None:
        self.push_address, self.invitation = push_address, invitation
        self.on_end = on_end
        self.is_ready = self.is_closed = False
        self.orders: list[Any] = []

    def put(self, want: Want, order: Any) -> None:
        self.orders.append((want.transfer_id, order))

    async def close(self) -> None:
        self.is_closed = True


class Rig:
    """One peer under a fake clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.streams: list[Stream] = []
        self.otherwise: list[Any] = []
        self.counters: Counter[str] = Counter()
        monkeypatch.setattr(collecting, "CollectStream", self._make)
        self.collecting = Collecting(
            Collectives([GLOO], CollectiveConfig(backoff_s=BACKOFF_S)),
            self.counters,
            lambda _ack: None,
            lambda want, order: self.otherwise.append((want.transfer_id, order)),
            clock=lambda: self.now,
        )

    def _make(self, *args: Any) -> Stream:
        self.streams.append(Stream(*args))
        return self.streams[-1]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def want(push_address: str = "a:1", *, world: int = 7, invited: bool = True) -> Want:
    invitation = CollectiveInvitation(backend=GLOO, store_address="a:2", world=world)
    return Want(transfer_id=5, push_address=push_address, collective=invitation if invited else None)


async def test_nothing_is_made_without_an_invitation(rig: Rig) -> None:
    await rig.collecting.follow(want(invited=False))
    assert (rig.streams, rig.collecting.is_ready, rig.collecting.name) == ([], False, "unspecified")


async def test_orders_are_taken_once_the_group_is_ready_and_only_for_transfers_that_are_invited(rig: Rig) -> None:
    await rig.collecting.follow(want())
    assert not rig.collecting.takes(want())
    [stream] = rig.streams
    stream.is_ready = True
    assert rig.collecting.takes(want())
    assert not rig.collecting.takes(want(invited=False))
    rig.collecting.put(want(), "order")
    assert (stream.orders, rig.collecting.name) == ([(5, "order")], "gloo")


async def test_one_group_serves_every_transfer_to_one_receiver(rig: Rig) -> None:
    await rig.collecting.follow(want())
    await rig.collecting.follow(want())
    assert len(rig.streams) == 1


@pytest.mark.parametrize("now", [want("b:1"), want(world=8), want(invited=False)], ids=["address", "store", "none"])
async def test_another_receiver_at_the_address_ends_the_group(rig: Rig, now: Want) -> None:
    await rig.collecting.follow(want())
    await rig.collecting.follow(now)
    assert rig.streams[0].is_closed
    assert len(rig.streams) == (2 if now.HasField("collective") else 1)


async def test_after_a_failure_what_is_left_goes_otherwise_and_no_other_group_is_tried_for_a_while(rig: Rig) -> None:
    await rig.collecting.follow(want())
    [stream] = rig.streams
    stream.is_ready = True
    stream.on_end(stream, [Sent(want(), "one"), Sent(want(), "two")], "broken")
    assert rig.otherwise == [(5, "one"), (5, "two")]
    assert rig.counters == {"collective_fallbacks": 1}
    for later_s, is_tried in ((0.0, False), (BACKOFF_S - 0.1, False), (BACKOFF_S, True)):
        rig.now = 1000.0 + later_s
        assert list(rig.collecting.offered()) == ([GLOO] if is_tried else [])
        await rig.collecting.follow(want())
        assert len(rig.streams) == 1 + is_tried


async def test_a_group_that_had_nothing_to_do_is_made_again_at_once(rig: Rig) -> None:
    await rig.collecting.follow(want())
    rig.streams[0].on_end(rig.streams[0], [], "")
    assert (list(rig.collecting.offered()), rig.counters) == ([GLOO], {})
    await rig.collecting.follow(want())
    assert len(rig.streams) == 2


async def test_the_end_of_an_earlier_group_leaves_the_later_one(rig: Rig) -> None:
    await rig.collecting.follow(want())
    await rig.collecting.follow(want(world=8))
    rig.streams[1].is_ready = True
    rig.streams[0].on_end(rig.streams[0], [], "")
    assert rig.collecting.is_ready


async def test_close_ends_the_group_and_may_be_repeated(rig: Rig) -> None:
    await rig.collecting.follow(want())
    await rig.collecting.close()
    await rig.collecting.close()
    assert rig.streams[0].is_closed
    assert not rig.collecting.is_ready
