"""A worker dies at a point only when it is armed, and not before it was passed as often as it may be."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.points import Armory, Trap


def test_a_point_kills_once_after_its_passes(tmp_path: Path) -> None:
    ends: list[int] = []
    armory, trap = Armory(tmp_path), Trap(tmp_path, "decode-0", lambda: ends.append(1))
    trap.reached("all-landed")
    armory.arm("decode-0", "all-landed", 2)
    for _ in range(2):
        trap.reached("all-landed")
        trap.reached("offer-received")
    assert not ends
    trap.reached("all-landed")
    assert ends == [1]
    trap.reached("all-landed")
    assert ends == [1]
    assert not armory.disarm("decode-0")


def test_what_was_disarmed_does_not_kill(tmp_path: Path) -> None:
    ends: list[int] = []
    armory, trap = Armory(tmp_path), Trap(tmp_path, "decode-0", lambda: ends.append(1))
    armory.arm("decode-0", "all-landed", 0)
    assert armory.disarm("decode-0")
    trap.reached("all-landed")
    assert not ends
