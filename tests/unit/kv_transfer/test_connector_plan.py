"""What is copied in which step, for the lives that a request can have in vLLM's scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import pytest

from kvrelay.engine.base import KvPlan
from kvrelay.kv_transfer.connector_plan import ConnectorPlan, Copies

BLOCK = 4
SLOTS = list(range(100, 110))
BLOCKS = list(range(7, 17))
"""Engine blocks of the request under test."""


def plan_of(
    *, load: Sequence[int] = (), save: Sequence[int] = (), generated: bool = True, **values: int
) -> ConnectorPlan:
    """One request: full blocks are loaded, those after them saved, unless `values` say something else."""
    defaults = {"ticket": 1, "load_tokens": len(load) * BLOCK, "first_save": len(load), "partial_tokens": 0}
    plan = ConnectorPlan(BLOCK, save_generated=generated)
    plan.add("r", {**defaults, **values, "load": list(load), "save": list(save)})
    return plan


def saves(copies: Copies) -> list[tuple[int, int]]:
    """Blocks of the prompt, then generated ones."""
    return [(slot, block) for slot, block, _, _ in [*copies.streamed, *copies.saves]]


def scheduled(plan: ConnectorPlan, num_tokens: int, blocks: Sequence[int] = BLOCKS) -> Copies:
    plan.scheduled("r", num_tokens, lambda: blocks)
    return plan.take()


def test_stored_blocks_are_loaded_once_and_reported_in_that_step() -> None:
    plan = plan_of(load=SLOTS[:3])
    assert plan.matched_tokens("r", 0) == 3 * BLOCK
    assert plan.matched_tokens("r", 0) == 3 * BLOCK, "asking has no effect"
    plan.allocated("r", BLOCKS, 3 * BLOCK)
    copies = scheduled(plan, 3 * BLOCK + 2)
    assert copies.loads == [(100, 7), (101, 8), (102, 9)]
    assert copies.loaded == [(1, 3)]
    assert saves(copies) == []
    assert plan.take() == Copies()


def test_what_the_engine_has_itself_is_not_loaded() -> None:
    plan = plan_of(load=SLOTS[:3])
    assert plan.matched_tokens("r", 2 * BLOCK) == BLOCK
    plan.allocated("r", BLOCKS, BLOCK)
    copies = plan.take()
    assert (copies.loads, copies.loaded) == ([(102, 9)], [(1, 1)])


def test_slots_are_let_go_of_when_the_engine_has_every_block_itself() -> None:
    plan = plan_of(load=SLOTS[:2], save=SLOTS[2:4])
    assert plan.matched_tokens("r", 3 * BLOCK) == 0
    plan.allocated("r", BLOCKS, 0)
    copies = scheduled(plan, 4 * BLOCK)
    assert copies.loads == []
    assert copies.loaded == [(1, 0)]
    assert saves(copies) == [(102, 9), (103, 10)], "the store lacks the third block, though the engine had it"


def test_blocks_are_saved_chunk_by_chunk_as_they_are_completed() -> None:
    plan = plan_of(load=SLOTS[:1], save=SLOTS[1:4])
    assert saves(scheduled(plan, BLOCK + 3)) == []
    copies = scheduled(plan, 3 * BLOCK + 1)
    assert copies.streamed == [(101, 8, 1, 1), (102, 9, 1, 2)]
    assert saves(scheduled(plan, 4 * BLOCK)) == [(103, 10)]
    assert saves(scheduled(plan, 5 * BLOCK)) == [], "no slot is left"


def test_generated_blocks_go_to_granted_slots_while_there_are_any() -> None:
    plan = plan_of(save=SLOTS[:1])
    plan.grant([50, 51])
    assert plan.take() == Copies()
    assert saves(scheduled(plan, BLOCK)) == [(100, 7)]
    copies = scheduled(plan, 3 * BLOCK)
    assert (copies.streamed, copies.saves) == ([], [(50, 8, 1, 1), (51, 9, 1, 2)]), "saved whole"
    assert saves(scheduled(plan, 5 * BLOCK)) == []
    plan.grant([52])
    assert saves(scheduled(plan, 5 * BLOCK + 1)) == [(52, 10)], "saved late, but in order and without a gap"


def test_a_prompt_that_has_too_few_slots_takes_granted_ones() -> None:
    plan = plan_of(save=SLOTS[:1])
    plan.grant([50])
    copies = scheduled(plan, 2 * BLOCK)
    assert (copies.streamed, copies.saves) == ([(100, 7, 1, 0)], [(50, 8, 1, 1)])


def test_drafted_tokens_are_not_saved() -> None:
    plan = plan_of(save=SLOTS[:1], generated=False)
    plan.grant([50])
    assert saves(scheduled(plan, 2 * BLOCK)) == [(100, 7)]


def test_a_preempted_request_saves_nothing_twice_and_uses_its_new_blocks() -> None:
    plan = plan_of(load=SLOTS[:1], save=SLOTS[1:3])
    plan.allocated("r", BLOCKS, BLOCK)
    assert saves(scheduled(plan, 2 * BLOCK)) == [(101, 8)]
    # Preempted: its engine blocks are gone, and so may be the slots that it had loaded.
    assert plan.matched_tokens("r", 0) == 0
    other_blocks = [30, 31, 32]
    plan.allocated("r", other_blocks, 0)
    assert scheduled(plan, BLOCK, other_blocks) == Copies()
    copies = scheduled(plan, 3 * BLOCK, other_blocks)
    assert copies.loads == []
    assert saves(copies) == [(102, 32)]


def test_a_request_that_ends_before_it_ran_is_closed_once() -> None:
    plan = plan_of(ticket=9, load=SLOTS[:1], save=SLOTS[1:3])
    plan.finished("r")
    plan.finished("r")
    assert plan.take() == Copies(closed=[9])
    assert plan.matched_tokens("r", 0) == 0
    plan.allocated("r", BLOCKS, BLOCK)
    assert scheduled(plan, 3 * BLOCK) == Copies()


def test_an_end_is_told_after_the_copies_of_the_last_step() -> None:
    plan = plan_of(save=SLOTS[:2])
    copies = scheduled(plan, BLOCK)
    assert (saves(copies), copies.closed) == ([(100, 7)], [])
    plan.finished("r")
    assert plan.take() == Copies(closed=[1])


def test_requests_without_a_plan_are_left_alone() -> None:
    plan = ConnectorPlan(BLOCK)
    plan.grant([50])
    assert plan.matched_tokens("r", 0) == 0
    plan.allocated("r", BLOCKS, 0)
    plan.finished("r")
    assert scheduled(plan, 5 * BLOCK) == Copies()


def test_block_ids_are_resolved_only_when_a_block_is_complete() -> None:
    plan = plan_of(save=SLOTS[:2])

    def not_needed() -> Sequence[int]:
        raise AssertionError("resolved")

    plan.scheduled("r", BLOCK - 1, not_needed)
    assert plan.take() == Copies()


def test_a_loaded_block_need_not_be_full() -> None:
    plan = plan_of(load=SLOTS[:3], load_tokens=2 * BLOCK + 1, first_save=2, save=SLOTS[3:4])
    assert plan.matched_tokens("r", 0) == 2 * BLOCK + 1
    assert plan.matched_tokens("r", BLOCK) == BLOCK + 1
    plan.allocated("r", BLOCKS, BLOCK + 1)
    copies = scheduled(plan, 2 * BLOCK + 2)
    assert copies.loads == [(101, 8), (102, 9)]
    assert saves(copies) == []
    assert saves(scheduled(plan, 3 * BLOCK)) == [(103, 9)], "once it is full it is stored under its own name"


def test_slots_of_which_no_token_counts_are_let_go_of() -> None:
    """A prompt of one token: it is computed in any case."""
    plan = plan_of(load=SLOTS[:1], load_tokens=0)
    assert plan.matched_tokens("r", 0) == 0
    plan.allocated("r", BLOCKS, 0)
    copies = scheduled(plan, 1)
    assert (copies.loads, copies.loaded) == ([], [(1, 0)])


def test_the_last_block_of_a_prompt_is_saved_with_the_tokens_that_it_has() -> None:
    plan = plan_of(save=SLOTS[:2], partial_tokens=BLOCK + 3)
    plan.grant([50])
    assert saves(scheduled(plan, BLOCK + 1)) == [(100, 7)]
    assert saves(scheduled(plan, BLOCK + 3)) == [(101, 8)]
    assert saves(scheduled(plan, 2 * BLOCK)) == [], "it is there already"
    assert saves(scheduled(plan, 3 * BLOCK)) == [(50, 9)]


def test_a_partial_block_goes_with_the_blocks_before_it_when_the_prompt_is_one_chunk() -> None:
    plan = plan_of(save=SLOTS[:3], partial_tokens=2 * BLOCK + 1)
    assert saves(scheduled(plan, 2 * BLOCK + 1)) == [(100, 7), (101, 8), (102, 9)]


@pytest.mark.parametrize(
    "wrong", [{"ticket": "1"}, {"load": 3}, {"save": ["a"]}, {"load_tokens": None}, {"first_save": 1.0}]
)
def test_a_malformed_plan_is_refused(wrong: dict[str, object]) -> None:
    params = {"ticket": 1, "load": [], "load_tokens": 0, "first_save": 0, "save": [], "partial_tokens": 0}
    with pytest.raises(TypeError):
        ConnectorPlan(BLOCK).add("r", {**params, **wrong})


def test_a_plan_for_the_engine_is_one_for_the_connector() -> None:
    plan = ConnectorPlan(BLOCK)
    plan.add("r", asdict(KvPlan(ticket=3, load=[1], load_tokens=BLOCK, first_save=1, save=[2])))
    assert plan.matched_tokens("r", 0) == BLOCK
