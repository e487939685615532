"""While a cluster starts, which end of a child is the end of it all?"""

from __future__ import annotations

import pytest

from kvrelay.launch.start import Start


@pytest.mark.parametrize("status", [0, 1, 2, 3, 127])
def test_a_child_that_ends_by_itself_will_do_so_again(status: int) -> None:
    assert Start().is_hopeless(status)


@pytest.mark.parametrize("status", [4, 137, 143])
def test_without_etcd_or_when_killed_it_is_tried_again_three_times(status: int) -> None:
    start = Start()
    assert [start.is_hopeless(status) for _ in range(4)] == [False, False, False, True]


def test_once_everything_was_ready_children_are_started_again_whatever_they_end_with() -> None:
    start = Start()
    start.is_over = True
    assert not any(start.is_hopeless(status) for status in [1] * 10)
