"""Events come in the order of their time, and of their asking at one time."""

from __future__ import annotations

from kvrelay.simulator.events import EventLoop


def test_events_come_by_time_and_then_as_asked_for() -> None:
    loop, seen = EventLoop(), list[tuple[str, float]]()

    def note(name: str) -> None:
        seen.append((name, loop.now_s))

    loop.at(2.0, note, "c")
    loop.at(1.0, note, "a")
    loop.at(1.0, note, "b")
    loop.run()
    assert seen == [("a", 1.0), ("b", 1.0), ("c", 2.0)]
    assert loop.num_events == 3


def test_what_is_late_is_due_now() -> None:
    loop, seen = EventLoop(), list[float]()
    loop.at(5.0, lambda: loop.at(1.0, lambda: seen.append(loop.now_s)))
    loop.run()
    assert seen == [5.0]


def test_delays_count_from_now() -> None:
    loop, seen = EventLoop(), list[float]()
    loop.at(5.0, lambda: loop.after(1.5, lambda: seen.append(loop.now_s)))
    loop.run()
    assert seen == [6.5]
