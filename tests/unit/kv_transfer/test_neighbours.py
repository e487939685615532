"""Senders on this machine are found by a proof, and forgotten soon after they left."""

from __future__ import annotations

import os

from kvrelay.kv_transfer.neighbours import Neighbours
from kvrelay.kv_transfer.segment import Segment, size_for
from kvrelay.v1.kv_transfer_pb2 import LocalSegment

SLOT_BYTES = 64


def made() -> tuple[Segment, LocalSegment]:
    segment = Segment.create(size_for(4, SLOT_BYTES))
    segment.configure(SLOT_BYTES)
    return segment, LocalSegment(path=segment.path, proof=segment.proof)


def num_maps() -> int:
    with open(f"/proc/{os.getpid()}/maps") as maps:
        return sum("memfd:kvrelay" in line for line in maps)


def test_a_sender_is_met_once_and_read() -> None:
    neighbours = Neighbours()
    segment, local = made()
    segment.slot_view(2)[:] = b"x" * SLOT_BYTES
    assert neighbours.meet(local, SLOT_BYTES)
    found = neighbours.segment(local.proof)
    assert found is not None
    assert bytes(found.slot_view(2)) == b"x" * SLOT_BYTES
    assert neighbours.meet(local, SLOT_BYTES)
    assert neighbours.segment(local.proof) is found
    neighbours.close()
    segment.close()


def test_whoever_does_not_share_memory_is_no_neighbour() -> None:
    neighbours = Neighbours()
    assert not neighbours.meet(LocalSegment(), SLOT_BYTES)
    assert not neighbours.meet(LocalSegment(path="/proc/1/fd/99999", proof=bytes(16)), SLOT_BYTES)
    assert neighbours.segment(bytes(16)) is None


def test_what_belonged_to_a_process_that_is_gone_is_unmapped() -> None:
    before = num_maps()
    neighbours = Neighbours()
    segment, local = made()
    neighbours.meet(local, SLOT_BYTES)
    segment.close()
    assert num_maps() == before + 1
    neighbours.expire()
    assert neighbours.segment(local.proof) is None
    assert num_maps() == before


def test_who_sends_nothing_for_long_is_forgotten_and_can_come_again() -> None:
    now = 0.0
    neighbours = Neighbours(clock=lambda: now)
    segment, local = made()
    neighbours.meet(local, SLOT_BYTES)
    now = 50.0
    neighbours.expire()
    assert neighbours.segment(local.proof) is not None
    now = 111.0
    neighbours.expire()
    assert neighbours.segment(local.proof) is None
    assert neighbours.meet(local, SLOT_BYTES)
    neighbours.close()
    segment.close()
