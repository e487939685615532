"""Which workers are left for a request?"""

from __future__ import annotations

import pytest

from kvrelay.coordinator.scheduler.eligible import eligible_groups
from kvrelay.errors import InvalidRequestError, NoWorkersError
from tests.support.scheduling import BLOCK_SIZE_TOKENS, BOTH, DECODE, PREFILL, shape, view


def test_workers_of_one_layout_are_a_group() -> None:
    workers = [
        view("p1", PREFILL),
        view("d1", DECODE),
        view("p2", PREFILL, fingerprint=b"g"),
        view("d2", DECODE, fingerprint=b"g"),
        view("b1", BOTH),
    ]
    first, second = eligible_groups(shape(), workers)
    assert [worker.worker_id for worker in first.prefillers] == ["p1", "b1"]
    assert [worker.worker_id for worker in first.decoders] == ["d1", "b1"]
    assert [worker.worker_id for worker in (*second.prefillers, *second.decoders)] == ["p2", "d2"]


def test_a_layout_without_a_decode_worker_is_no_group() -> None:
    (group,) = eligible_groups(shape(), [view("p1", PREFILL, fingerprint=b"g"), view("d1", DECODE)])
    assert (group.prefillers, [worker.worker_id for worker in group.decoders]) == ([], ["d1"])


@pytest.mark.parametrize(
    "unfit",
    [{"draining": True}, {"model": "other"}, {"max_model_len_tokens": 100}],
    ids=lambda unfit: next(iter(unfit)),
)
def test_who_drains_or_serves_another_model_or_has_no_room_is_left_out(unfit: dict[str, object]) -> None:
    workers = [view("p1", PREFILL), view("p2", PREFILL, **unfit), view("d1", DECODE), view("d2", DECODE, **unfit)]
    (group,) = eligible_groups(shape(100), workers)
    assert [worker.worker_id for worker in (*group.prefillers, *group.decoders)] == ["p1", "d1"]


def test_a_prompt_of_less_than_a_block_is_for_decode_workers() -> None:
    workers = [view("p1", PREFILL), view("d1", DECODE)]
    assert not eligible_groups(shape(BLOCK_SIZE_TOKENS - 1), workers)[0].prefillers
    assert eligible_groups(shape(BLOCK_SIZE_TOKENS), workers)[0].prefillers


def test_too_long_a_prompt_is_told_what_decode_workers_have_room_for() -> None:
    workers = [view("p1", PREFILL), view("d1", DECODE, max_model_len_tokens=64)]
    with pytest.raises(InvalidRequestError, match="64 tokens; with one generated token it must fit into 64"):
        eligible_groups(shape(64), workers)


def test_nobody_to_decode_is_told_apart_from_too_long_a_prompt() -> None:
    with pytest.raises(NoWorkersError, match="no decode worker serves model 'm'"):
        eligible_groups(shape(), [view("p1", PREFILL, max_model_len_tokens=10)])


def test_who_is_avoided_is_left_out_unless_nobody_else_decodes() -> None:
    p1, p2 = view("p1", PREFILL), view("p2", PREFILL, avoided=True)
    d1, d2 = view("d1", DECODE, avoided=True), view("d2", DECODE)
    (group,) = eligible_groups(shape(), [p1, p2, d1, d2])
    assert (group.prefillers, group.decoders) == ([p1], [d2])
    (group,) = eligible_groups(shape(), [p1, p2, d1])
    assert (group.prefillers, group.decoders) == ([p1, p2], [d1])


def test_prompts_are_computed_by_decode_workers_while_all_prefill_workers_are_avoided() -> None:
    (group,) = eligible_groups(shape(), [view("p1", PREFILL, avoided=True), view("d1", DECODE)])
    assert not group.prefillers
