"""The segment is shared by path, sealed, cut into slots, and gone with its processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvrelay.kv_transfer.segment import HEADER_BYTES, PROOF_BYTES, Segment, size_for


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.create(size_for(10, 100))
    segment.configure(100)
    yield segment
    segment.close()


def test_another_process_sees_the_same_bytes(segment: Segment) -> None:
    segment.slot_view(3)[:5] = b"hello"
    script = (
        "import sys; from kvrelay.kv_transfer.segment import Segment\n"
        "segment = Segment.open(sys.argv[1]); segment.configure(100)\n"
        "assert bytes(segment.slot_view(3, 0, 5)) == b'hello'\n"
        "segment.slot_view(9, 95)[:] = b'world'; segment.header[:2] = b'ok'; segment.close()\n"
    )
    subprocess.run([sys.executable, "-c", script, segment.path], check=True, timeout=60)
    assert bytes(segment.slot_view(9, 95)) == b"world"
    assert bytes(segment.header[:2]) == b"ok"


def test_nobody_can_change_its_size(segment: Segment) -> None:
    fd = os.open(segment.path, os.O_RDWR)
    try:
        for size in (0, segment.size_bytes + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
    finally:
        os.close(fd)


def test_only_its_owner_may_open_it(segment: Segment) -> None:
    assert os.stat(segment.path).st_mode & 0o777 == 0o600


def test_slots_do_not_overlap(segment: Segment) -> None:
    assert segment.num_slots == 10
    for slot in range(10):
        segment.slot_view(slot)[:] = bytes([slot]) * 100
    assert bytes(segment.slots) == b"".join(bytes([slot]) * 100 for slot in range(10))
    assert bytes(segment.header) == bytes(HEADER_BYTES - PROOF_BYTES)


@pytest.mark.parametrize(("slot", "offset", "size"), [(-1, 0, 1), (10, 0, 1), (0, -1, 1), (0, 0, 101), (0, 100, 1)])
def test_nothing_outside_of_a_slot_is_handed_out(segment: Segment, slot: int, offset: int, size: int) -> None:
    with pytest.raises(IndexError):
        segment.slot_view(slot, offset, size)


def test_a_segment_without_room_for_a_slot_says_so() -> None:
    with pytest.raises(ValueError, match="no room"):
        Segment.create(HEADER_BYTES)
    segment = Segment.create(HEADER_BYTES + 99)
    try:
        with pytest.raises(ValueError, match="--kv-host-bytes"):
            segment.configure(100)
    finally:
        segment.close()


def test_close_leaves_no_descriptor_and_may_be_repeated() -> None:
    segment = Segment.create(HEADER_BYTES + 1)
    path = segment.path
    assert os.path.exists(path)
    segment.close()
    segment.close()
    assert not os.path.exists(path)


def test_a_generation_is_seen_by_others(segment: Segment) -> None:
    other = Segment.open_foreign(segment.path, segment.proof)
    other.configure(100)
    assert other.generation(9) == 0
    segment.begin_generation(9)
    assert (other.generation(9), other.generation(8)) == (1, 0)
    assert all(bytes(segment.slot_view(slot)) == bytes(100) for slot in range(10)), "the table lies behind the slots"


def test_a_foreign_segment_cannot_be_written(segment: Segment) -> None:
    other = Segment.open_foreign(segment.path, segment.proof)
    other.configure(100)
    with pytest.raises(TypeError, match="read-only"):
        other.slot_view(0)[:] = bytes(100)


def test_a_foreign_segment_must_prove_itself(segment: Segment, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another segment"):
        Segment.open_foreign(segment.path, bytes(PROOF_BYTES))
    with pytest.raises(ValueError, match="another segment"):
        Segment.open_foreign(segment.path, b"")
    for path in ("/etc/passwd", "/proc/1/environ", f"{segment.path}/../1", "/proc/self/fd/0", ""):
        with pytest.raises(ValueError, match="not the path"):
            Segment.open_foreign(path, segment.proof)
    with (tmp_path / "file").open("w+") as file, pytest.raises(ValueError, match="not a segment"):
        Segment.open_foreign(f"/proc/{os.getpid()}/fd/{file.fileno()}", segment.proof)
    with pytest.raises(OSError, match="No such file"):
        Segment.open_foreign(f"/proc/{os.getpid()}/fd/99999", segment.proof)
