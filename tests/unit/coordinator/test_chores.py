"""Which of etcd's history may be forgotten?"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvrelay.coordinator.chores import History


def test_what_is_younger_stays() -> None:
    history = History(10.0)
    assert history.note(0.0, 5) is None
    assert history.note(9.9, 8) is None
    assert history.note(10.0, 9) == 5
    assert history.note(20.0, 12) == 9
    assert history.note(20.1, 12) is None


def test_nothing_is_forgotten_twice_while_nobody_writes() -> None:
    history = History(10.0)
    history.note(0.0, 5)
    history.note(1.0, 5)
    assert history.note(10.0, 5) == 5
    assert history.note(30.0, 5) is None


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 5)), max_size=50))
def test_a_revision_is_forgotten_once_and_not_before_its_time(steps: list[tuple[float, int]]) -> None:
    history = History(10.0)
    now_s, revision, forgotten = 0.0, 1, 0
    current: list[tuple[float, int]] = []
    for later_s, num_writes in steps:
        now_s, revision = now_s + later_s, revision + num_writes
        current.append((now_s, revision))
        old = history.note(now_s, revision)
        known_to_be_old = [seen for at_s, seen in current if now_s - at_s >= 10.0]
        if old is None:
            assert not known_to_be_old or known_to_be_old[-1] == forgotten
        else:
            assert old > forgotten
            assert old == known_to_be_old[-1]
            forgotten = old
