"""Every layer is given out once a pass, early where that is safe."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.kv_transfer.layer_groups import LayerGroups

NAMES = [f"layers.{i}" for i in range(7)]


def run(groups: LayerGroups, order: Sequence[str]) -> list[range]:
    """What one pass gives out, layer by layer and at its end."""
    groups.begin()
    return [*map(groups.computed, order), groups.rest()]


@pytest.mark.parametrize(
    ("num_groups", "expected"),
    [
        (1, [range(7)]),
        (2, [range(4), range(4, 7)]),
        (3, [range(3), range(3, 6), range(6, 7)]),
        (7, [range(i, i + 1) for i in range(7)]),
        (99, [range(i, i + 1) for i in range(7)]),
    ],
)
def test_layers_come_in_groups_of_one_size(num_groups: int, expected: list[range]) -> None:
    groups = LayerGroups(NAMES, num_groups)
    for _ in range(2):
        assert [layers for layers in run(groups, NAMES) if layers] == expected


def test_a_group_comes_with_its_last_layer() -> None:
    given_out = run(LayerGroups(NAMES, 2), NAMES)
    assert [index for index, layers in enumerate(given_out) if layers] == [3, 6]


def test_one_group_comes_at_the_end() -> None:
    """In a pass over two half batches layers are called twice: the first call says nothing."""
    assert run(LayerGroups(NAMES, 1), NAMES)[-1] == range(7)


def test_a_pass_that_broke_off_does_not_count() -> None:
    groups = LayerGroups(NAMES, 2)
    groups.begin()
    groups.computed(NAMES[0])
    assert run(groups, NAMES)[3] == range(4)


@given(order=st.lists(st.sampled_from([*NAMES, "draft.0"])), num_groups=st.integers(1, 9))
def test_whatever_the_order_every_layer_comes_once_and_after_it_was_computed(order: list[str], num_groups: int) -> None:
    given_out = run(LayerGroups(NAMES, num_groups), order)
    assert [layer for layers in given_out for layer in layers] == list(range(7))
    for index, layers in enumerate(given_out[:-1]):
        assert {NAMES[layer] for layer in layers} <= set(order[: index + 1])
