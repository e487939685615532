"""Small loads end when the head says they must, every load ends whole, and the same one twice ends the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView
from kvrelay.errors import OverloadedError
from kvrelay.simulator.simulation import Simulated
from kvrelay.workload.outcome import Status
from kvrelay.workload.trace import TraceRequest
from tests.support.simulation import HARDWARE, LIMITS, Choose, ChosenScheduler, cluster, request, run

M = HARDWARE.message_s
Views = dict[str, WorkerView]
PREFILL_S = 1.5
"""A prompt of 100 tokens."""
STEP_S = 0.11


def split(_: RequestShape, __: Views) -> tuple[str | None, str, str | None]:
    return "prefill-0", "decode-0", None


def local(_: RequestShape, __: Views) -> tuple[str | None, str, str | None]:
    return None, "decode-0", None


def test_one_request_over_two_workers() -> None:
    ran = run([request(0, 10.0, 100, 3, *range(10))], cluster(), ChosenScheduler(split))
    prefilled_s = 10.0 + M + PREFILL_S
    # All ten blocks leave when they are computed, after the single chunk, and travel for a second.
    decoding_s = prefilled_s + 10 * 0.1
    expected = [prefilled_s + M, decoding_s + STEP_S + M, decoding_s + 2 * STEP_S + M]
    (outcome,) = ran.outcomes
    assert outcome.status is Status.COMPLETED
    assert list(outcome.token_times_s) == pytest.approx(expected)
    assert outcome.num_cached_tokens == 0


def test_chunks_travel_while_the_next_ones_are_computed() -> None:
    ran = run([request(0, 0.0, 200, 2, *range(20))], cluster(), ChosenScheduler(split))
    second_chunk_s = M + 2 * PREFILL_S - 0.5  # of which half a second once a prompt
    assert list(ran.outcomes[0].token_times_s) == pytest.approx(
        [second_chunk_s + M, second_chunk_s + 10 * 0.1 + STEP_S + M]
    )


def test_one_request_on_one_worker() -> None:
    ran = run([request(0, 0.0, 100, 3, *range(10))], cluster(num_prefill=0), ChosenScheduler(local))
    first_s = M + PREFILL_S + M
    assert list(ran.outcomes[0].token_times_s) == pytest.approx([first_s, first_s + STEP_S, first_s + 2 * STEP_S])


def test_a_single_token_needs_no_decode() -> None:
    ran = run([request(0, 0.0, 100, 1, *range(10))], cluster(), ChosenScheduler(split))
    assert list(ran.outcomes[0].token_times_s) == pytest.approx([M + PREFILL_S + M])
    assert_clean(ran)


def test_a_stored_prefix_is_not_computed_nor_sent_again() -> None:
    load = [request(0, 0.0, 100, 2, *range(10)), request(1, 20.0, 120, 2, *range(12))]
    scheduler = ChosenScheduler(split)
    ran = run(load, cluster(), scheduler)
    assert ran.outcomes[1].num_cached_tokens == 100
    prefilled_s = 20.0 + M + 0.5 + 20 * 0.01
    expected = [prefilled_s + M, prefilled_s + 2 * 0.1 + STEP_S + M]
    # Ten blocks are loaded from the store, in 1e-10 s.
    assert list(ran.outcomes[1].token_times_s) == pytest.approx(expected)
    assert scheduler.shapes[1].num_stored_blocks == {"prefill-0": 10, "decode-0": 10}


def test_a_prefix_is_fetched_from_who_has_it() -> None:
    def choose(shape: RequestShape, _: Views) -> tuple[str | None, str, str | None]:
        return ("prefill-1", "decode-1", "prefill-0") if shape.num_stored_blocks else ("prefill-0", "decode-0", None)

    load = [request(0, 0.0, 100, 1, *range(10)), request(1, 20.0, 120, 1, *range(12))]
    ran = run(load, cluster(2, 2), ChosenScheduler(choose))
    fetched_s = 20.0 + M + 10 * 0.1 + M
    assert list(ran.outcomes[1].token_times_s) == pytest.approx([fetched_s + 0.5 + 20 * 0.01 + M])
    assert ran.outcomes[1].num_cached_tokens == 100
    assert ran.coordinators[0].counts.num_fetched == 1
    assert_clean(ran)


def test_the_index_speculates_and_forgets_what_was_evicted() -> None:
    load = [
        request(0, 0.0, 100, 1, *range(10)),
        request(1, 0.1, 100, 1, *range(10)),
        request(2, 20.0, 120, 1, *range(100, 112)),
        request(3, 40.0, 100, 1, *range(10)),
    ]
    scheduler = ChosenScheduler(split)
    small = replace(HARDWARE, store_bytes=12 * HARDWARE.block_tokens)
    run(load, cluster(hardware=small), scheduler)
    stored = [shape.num_stored_blocks.get("prefill-0", 0) for shape in scheduler.shapes]
    assert stored == [0, 10, 0, 0]


def test_a_store_of_any_size_takes_no_more_memory_than_the_load() -> None:
    huge = replace(HARDWARE, store_bytes=1 << 60)
    load = [request(number, number * 1.0, 100, 5, *range(10)) for number in range(3)]
    workers = run(load, cluster(hardware=huge), ChosenScheduler(split)).workers
    assert all(worker.store.usage().num_slots == 33 for worker in workers)


def test_coordinators_see_the_load_of_each_other() -> None:
    seen: list[list[int]] = []

    def choose(_: RequestShape, views: Views) -> tuple[str | None, str, str | None]:
        seen.append([views["prefill-0"].num_queued_prompt_tokens, views["decode-0"].num_running_requests])
        return "prefill-0", "decode-0", None

    load = [request(number, number * 0.5, 100, 50, *range(10 * number, 10 * number + 10)) for number in range(3)]
    run(load, cluster(), ChosenScheduler(choose), ChosenScheduler(choose))
    # The second coordinator has sent nothing yet: all it knows at 0.5 s was reported.
    assert seen == [[0, 0], [99, 0], [198, 1]]


def test_what_cannot_be_served_is_told() -> None:
    def refuse(shape: RequestShape, views: Views) -> tuple[str | None, str, str | None]:
        if shape.num_prompt_tokens == 50:
            raise OverloadedError("too much", retry_after_s=1.0)
        return split(shape, views)

    load = [request(0, 0.0, 50, 5), request(1, 0.0, 998, 5), request(2, 0.0, 100, 2)]
    ran = run(load, cluster(), ChosenScheduler(refuse))
    assert [outcome.status for outcome in ran.outcomes] == [Status.REJECTED, Status.FAILED, Status.COMPLETED]
    assert "longer than the 1000 tokens" in ran.outcomes[1].error


def test_idle_while_another_queues_is_counted() -> None:
    load = [request(number, 0.0, 100, 1, *range(10 * number, 10 * number + 10)) for number in range(3)]
    ran = run(load, cluster(2), ChosenScheduler(split))
    # Two wait for 1.5 s and then one for as long, while the other worker is idle all the time.
    assert ran.idle_while_waiting["prefill"] * ran.duration_s * 2 == pytest.approx(3.0)
    assert ran.idle_while_waiting["decode"] == 0.0


loads = st.lists(
    st.tuples(st.floats(0, 20), st.integers(1, 300), st.integers(1, 30), st.integers(0, 3), st.integers(0, 10_000)),
    min_size=1,
    max_size=20,
)


def made(load: list[tuple[float, int, int, int, int]]) -> list[TraceRequest]:
    """Requests whose prompts begin as those of some others do."""
    requests = []
    for index, (at, num_prompt, num_output, family, _) in enumerate(sorted(load)):
        shared = min(family * 4, num_prompt // 10)
        own = range(1000 * (index + 1), 1000 * (index + 1) + -(-num_prompt // 10) - shared)
        requests.append(request(index, at, num_prompt, num_output, *range(shared), *own))
    return requests


def choices(load: list[tuple[float, int, int, int, int]]) -> Choose:
    """Any worker for anything."""
    numbers = iter([number for *_, number in sorted(load)])

    def choose(shape: RequestShape, _: Views) -> tuple[str | None, str, str | None]:
        number = next(numbers)
        prefill = (None, "prefill-0", "both-0")[number % 3]
        decode = ("decode-0", "decode-1", "both-1")[number // 3 % 3]
        holder = max(shape.num_stored_blocks, key=shape.num_stored_blocks.__getitem__, default=None)
        computing = prefill or decode
        return prefill, decode, holder if holder != computing and number // 9 % 2 else None

    return choose


def assert_clean(ran: Simulated) -> None:
    """Nobody holds anything any more."""
    for worker in ran.workers:
        usage = worker.store.usage()
        assert (usage.num_pinned, usage.num_reserved, usage.num_granted) == (0, 0, 0)
        assert usage.num_free + usage.num_evictable == usage.num_slots
        assert (worker.num_jobs, worker.report().num_queued_prompt_tokens, worker.engine.num_context_tokens) == (
            0,
            0,
            0,
        )
    for coordinator in ran.coordinators:
        assert coordinator.is_idle


@settings(deadline=None, max_examples=60)
@given(loads, st.integers(3, 100), st.integers(1, 3))
def test_every_request_ends_once_and_nothing_is_left(
    load: list[tuple[float, int, int, int, int]], num_slots: int, num_coordinators: int
) -> None:
    requests = made(load)
    config = cluster(
        1,
        2,
        num_both=2,
        hardware=replace(HARDWARE, store_bytes=num_slots * HARDWARE.block_tokens),
        engine=replace(LIMITS, capacity_tokens=400, max_running_requests=3),
    )
    choose = choices(load)
    ran = run(requests, config, *(ChosenScheduler(choose) for _ in range(num_coordinators)))
    assert [outcome.index for outcome in ran.outcomes] == [each.index for each in requests]
    for outcome, each in zip(ran.outcomes, requests, strict=True):
        assert outcome.status is Status.COMPLETED
        assert outcome.num_output_tokens == len(outcome.token_times_s) == each.num_output_tokens
        assert list(outcome.token_times_s) == sorted(outcome.token_times_s)
        assert outcome.token_times_s[0] > each.arrived_s
        assert 0 <= outcome.num_cached_tokens < each.num_prompt_tokens
    assert_clean(ran)


@settings(deadline=None, max_examples=10)
@given(loads)
def test_the_same_load_ends_the_same(load: list[tuple[float, int, int, int, int]]) -> None:
    config = cluster(1, 2, num_both=2)
    first, second = (run(made(load), config, ChosenScheduler(choices(load))) for _ in range(2))
    assert first.num_events == second.num_events
    assert [list(each.token_times_s) for each in first.outcomes] == [
        list(each.token_times_s) for each in second.outcomes
    ]
