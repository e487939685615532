"""How long is a prompt, or its tokens, thought to take at a worker?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.coordinator.scheduler.cost_config import CostConfig
from kvrelay.coordinator.scheduler.estimates import (
    DecodeEstimator,
    PromptEstimator,
    bytes_per_s,
    fullest,
    stored_tokens,
    wait_s,
)
from kvrelay.step_times.model import StepTimes
from tests.support.scheduling import DECODE, PREFILL, shape, view

CONFIG = CostConfig()


def test_waits_for_each_prompt_that_is_queued() -> None:
    times = StepTimes(prefill_fixed_s=0.01, prefill_token_s=1e-3, prefill_pair_s=1e-6)
    idle = view("p1", PREFILL, times=times)
    assert wait_s(idle) == 0
    for num_prompts in (1, 4):
        busy = view("p1", PREFILL, times=times, num_queued_prompt_tokens=1000, num_queued_prompts=num_prompts)
        assert wait_s(busy) == pytest.approx(num_prompts * times.prefill_s(1000 // num_prompts))


def test_a_link_is_as_fast_as_it_was_measured_or_as_its_ends_are_near() -> None:
    source = view("a", PREFILL, address="h1:1", link_bytes_per_s={"h9:1": 5.0})
    assert bytes_per_s(source, view("b", DECODE, address="h9:1"), CONFIG) == 5.0
    assert bytes_per_s(source, view("b", DECODE, address="h1:2"), CONFIG) == CONFIG.local_bytes_per_s
    assert bytes_per_s(source, view("b", DECODE, address="h11:2"), CONFIG) == CONFIG.remote_bytes_per_s


def test_the_last_token_is_computed_though_it_is_stored() -> None:
    worker = view("p1", PREFILL)
    assert stored_tokens(shape(64, num_stored_blocks={"p1": 2}), worker) == 63
    assert stored_tokens(shape(65, num_stored_blocks={"p1": 2}), worker) == 64
    assert stored_tokens(shape(65, num_stored_blocks={"p2": 2}), worker) == 0


def test_the_fullest_is_who_has_most_if_anybody_has_any() -> None:
    workers = [view("a", PREFILL), view("b", DECODE)]
    assert fullest(shape(num_stored_blocks={"a": 1, "b": 2, "gone": 9}), workers) is workers[1]
    assert fullest(shape(num_stored_blocks={"gone": 9}), workers) is None
    assert fullest(shape(), workers) is None


@given(
    num_tokens=st.integers(33, 50_000),
    own=st.integers(0, 2000),
    held=st.integers(0, 2000),
    queued=st.integers(0, 50_000),
    link=st.floats(1e3, 1e12),
)
def test_a_holder_makes_a_prompt_faster_or_is_not_asked(
    num_tokens: int, own: int, held: int, queued: int, link: float
) -> None:
    request = shape(num_tokens, num_stored_blocks={"a": own, "b": held})
    worker = view("a", PREFILL, token_bytes=1000, num_queued_prompt_tokens=queued)
    holder = view("b", PREFILL, link_bytes_per_s={worker.address: link})
    alone = PromptEstimator(request, CONFIG).at(worker)
    helped = PromptEstimator(request, CONFIG, holder=holder).at(worker)
    assert helped.wait_s + helped.prefill_s <= alone.wait_s + alone.prefill_s
    assert (helped.source is None) == (helped == alone)
    assert helped.num_cached_tokens < num_tokens


@given(running=st.integers(0, 300), queued=st.integers(0, 9000), context=st.integers(0, 90_000))
def test_one_more_sequence_never_makes_a_decode_worker_cheaper(running: int, queued: int, context: int) -> None:
    def cost(num_running: int) -> float:
        worker = view(
            "d1",
            DECODE,
            num_running_requests=num_running,
            max_running_requests=256,
            num_queued_prompt_tokens=queued,
            num_context_tokens=context,
            capacity_tokens=60_000,
        )
        return DecodeEstimator(shape(500), CONFIG).at(worker).cost

    assert cost(running + 1) >= cost(running)


def test_a_worker_without_room_is_waited_for() -> None:
    full = view("d1", DECODE, num_running_requests=10, max_running_requests=10)
    estimate = DecodeEstimator(shape(), CONFIG).at(full)
    assert estimate.blocked_s == pytest.approx(0.1 * CONFIG.expected_output_tokens * estimate.itl_s)
    full.num_running_requests = 9
    assert DecodeEstimator(shape(), CONFIG).at(full).blocked_s == 0
