"""A sender, or the coordinator of a request, leaves: the receiver holds nothing for them, and keeps what came."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.receiver_rig import Rig, content, open_rig, waiting


@pytest.fixture
def rig() -> Iterator[Rig]:
    with open_rig() as rig:
        yield rig


def test_a_sender_that_leaves_without_a_word_leaves_nothing(rig: Rig) -> None:
    transfer_id, _ = rig.offer("r", [0, 1, 2])
    rig.place(transfer_id, 0, content(0))
    rig.place(transfer_id, 1, content(1, 0), layers=(0, 1))
    rig.receiver.abandon(transfer_id)
    rig.assert_idle()
    rig.assert_stored(0)
    assert rig.offer("r", [1])[1] == [], "a frame, or an offer, that was under way comes too late"


async def test_who_waits_for_a_sender_that_leaves_has_what_came(rig: Rig) -> None:
    transfer_id, _ = rig.offer("r", [0, 1])
    task = await waiting(rig, "r")
    rig.place(transfer_id, 0, content(0))
    rig.receiver.abandon(transfer_id)
    transfer = await task
    assert transfer is not None
    assert transfer.received_blocks == 1
    usage = rig.store.usage()
    assert (usage.num_reserved, usage.num_pinned) == (0, 1)
    rig.receiver.let_go("r")
    rig.assert_idle()


def test_what_was_committed_is_held_when_its_sender_leaves(rig: Rig) -> None:
    transfer_id, _ = rig.offer("r", [0])
    rig.place(transfer_id, 0, content(0))
    assert rig.receiver.commit(transfer_id) == 0
    rig.receiver.abandon(transfer_id)
    assert rig.store.usage().num_pinned == 1
    rig.receiver.let_go("r")
    rig.assert_idle()


def test_what_was_committed_is_let_go_of_when_its_coordinator_has_no_session_any_more(rig: Rig) -> None:
    with rig.receiver.owners.session("other"):
        with rig.receiver.owners.session("c"):
            with rig.receiver.owners.session("c"):
                committed, _ = rig.offer("r", [0], owner="c")
                rig.place(committed, 0, content(0))
                rig.receiver.commit(committed)
                others, _ = rig.offer("o", [1], owner="other")
                nobodys, _ = rig.offer("n", [2])
            assert rig.receiver.open_transfers() == {committed, others, nobodys}, "it has another session"
        assert rig.receiver.open_transfers() == {others, nobodys}
    assert rig.receiver.open_transfers() == {nobodys}
    rig.receiver.let_go("n")
    rig.assert_idle()


def test_a_commit_for_a_coordinator_that_is_gone_holds_nothing(rig: Rig) -> None:
    """Its session with the receiver ended before that with the sender."""
    with rig.receiver.owners.session("c"):
        pass
    transfer_id, _ = rig.offer("r", [0, 1], owner="c")
    rig.place(transfer_id, 0, content(0))
    assert rig.receiver.commit(transfer_id) == 1
    rig.assert_idle()
    rig.assert_stored(0)
