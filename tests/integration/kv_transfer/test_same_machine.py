"""Two workers on one machine: blocks are copied out of the sender's memory, and never after it was used for others."""

from __future__ import annotations

import pytest

from kvrelay.kv_transfer.block_part import BlockPart
from kvrelay.v1.kv_transfer_pb2 import FrameAck, LocalRun, LocalSegment
from tests.support.kv_pair import LAYERS, SLOT_BYTES, Side, block_name, kv_server, open_peers, push_of, side, whole

MANY = list(range(40))


async def test_blocks_are_copied_without_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    with side() as sender, side() as receiver:
        monkeypatch.setattr(receiver.receiver, "place", lambda *_: pytest.fail("a frame came"))
        async with kv_server(receiver.receiver) as server, open_peers() as peers:
            push = push_of(sender, peers.get(server.address), "r", MANY, local=True)
            for index, slot in enumerate(sender.put(MANY)):
                push.add(whole(index, slot))
            push.finish()
            result = await push.run()
        assert (result.num_blocks, result.num_stored_bytes, result.error) == (40, 40 * SLOT_BYTES, "")
        assert all(receiver.holds(number) for number in MANY)
        receiver.receiver.let_go("r")
        receiver.receiver.neighbours.close()


async def test_layers_come_group_by_group() -> None:
    with side() as sender, side() as receiver:
        async with kv_server(receiver.receiver) as server, open_peers() as peers:
            push = push_of(sender, peers.get(server.address), "r", [7, 8], local=True)
            for first_layer in range(0, LAYERS, 2):
                for index, slot in enumerate(sender.put([7, 8])):
                    push.add(BlockPart(index, slot, first_layer, 2))
            push.finish()
            assert (await push.run()).num_blocks == 2
        assert receiver.holds(7)
        assert receiver.holds(8)
        receiver.receiver.let_go("r")
        receiver.receiver.neighbours.close()


async def test_who_cannot_prove_to_be_here_sends_frames() -> None:
    with side() as sender, side() as receiver:
        async with kv_server(receiver.receiver) as server, open_peers() as peers:
            push = push_of(sender, peers.get(server.address), "r", [1], local=True)
            push._offer.local.proof = bytes(16)
            [slot] = sender.put([1])
            push.add(whole(0, slot))
            push.finish()
            assert (await push.run()).error == ""
        assert receiver.holds(1)
        receiver.receiver.let_go("r")


def met(sender: Side, receiver: Side, number: int) -> int:
    """The id of a transfer of one block, with the sender's memory mapped."""
    local = LocalSegment(path=sender.segment.path, proof=sender.segment.proof)
    assert receiver.receiver.meet(local)
    transfer_id, *_ = receiver.receiver.offer("r", receiver.layout, block_name(number), source=local.proof)
    return transfer_id


async def test_a_slot_that_was_given_to_another_block_does_not_land() -> None:
    with side() as sender, side() as receiver:
        [slot] = sender.put([1])
        transfer_id = met(sender, receiver, 1)
        generation = sender.segment.generation(slot)
        run = LocalRun(transfer_id=transfer_id, num_layers=LAYERS, slots=[slot], generations=[generation])
        sender.segment.begin_generation(slot)
        assert receiver.receiver.copy(run) == FrameAck.STATUS_CORRUPT
        assert not receiver.holds(1)
        run.generations[0] = generation + 1
        assert receiver.receiver.copy(run) == FrameAck.STATUS_STORED
        sender.store.unpin([slot])
        receiver.receiver.let_go("r")
        receiver.receiver.neighbours.close()


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"slots": [10**6]}, FrameAck.STATUS_REFUSED),
        ({"slots": []}, FrameAck.STATUS_REFUSED),
        ({"generations": []}, FrameAck.STATUS_REFUSED),
        ({"first_layer": 1}, FrameAck.STATUS_REFUSED),
        ({"first_block": 1}, FrameAck.STATUS_REFUSED),
        ({"num_layers": 0}, FrameAck.STATUS_REFUSED),
        ({"transfer_id": 5}, FrameAck.STATUS_STALE),
    ],
)
async def test_a_run_that_does_not_fit_is_refused(values: dict[str, object], status: int) -> None:
    with side() as sender, side() as receiver:
        transfer_id = met(sender, receiver, 1)
        good: dict[str, object] = {"transfer_id": transfer_id, "num_layers": LAYERS, "slots": [0], "generations": [0]}
        assert receiver.receiver.copy(LocalRun(**{**good, **values})) == status  # type: ignore[arg-type]
        assert not receiver.holds(1)
        receiver.receiver.let_go("r")
        receiver.receiver.neighbours.close()
