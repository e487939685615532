"""Does rating the best few pairs find what rating all would find?"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.coordinator.scheduler.cost import CostScheduler
from kvrelay.coordinator.scheduler.cost_config import CostConfig
from kvrelay.coordinator.scheduler.eligible import Group
from kvrelay.coordinator.scheduler.option import Option
from kvrelay.coordinator.scheduler.pairing import Pairing
from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView
from kvrelay.errors import OverloadedError
from kvrelay.step_times.model import StepTimes
from tests.support.scheduling import DECODE, PREFILL, TIMES, shape, view

CONFIG = CostConfig()
EVERYTHING = replace(CONFIG, num_kept=99)
SLOWEST_BYTES_PER_S = 1e7
TOKEN_BYTES = 1000

PREFILLERS = st.builds(
    view,
    st.just(""),
    st.just(PREFILL),
    token_bytes=st.just(TOKEN_BYTES),
    num_queued_prompt_tokens=st.integers(0, 20_000),
    num_queued_prompts=st.integers(1, 5),
    times=st.sampled_from([TIMES, StepTimes(prefill_token_s=3e-4)]),
    link_bytes_per_s=st.dictionaries(
        st.sampled_from([f"d{number}:1" for number in range(8)]), st.floats(SLOWEST_BYTES_PER_S, 1e10), max_size=8
    ),
)
DECODERS = st.builds(
    view,
    st.just(""),
    st.just(DECODE),
    token_bytes=st.just(TOKEN_BYTES),
    num_queued_prompt_tokens=st.sampled_from([0, 0, 3000]),
    num_running_requests=st.integers(0, 40),
    max_running_requests=st.sampled_from([0, 20]),
    num_context_tokens=st.integers(0, 50_000),
)
GROUPS = st.builds(
    lambda prefillers, decoders: Group(_named("d", decoders), _named("p", prefillers)),
    st.lists(PREFILLERS, min_size=1, max_size=8),
    st.lists(DECODERS, min_size=1, max_size=8),
)
SHAPES = st.builds(
    shape,
    st.integers(32, 8000),
    max_tokens=st.sampled_from([1, 2, 10, 0]),
    num_stored_blocks=st.dictionaries(st.sampled_from(["p0", "p1", "d0", "d1", "d2"]), st.integers(0, 200)),
)


def _named(prefix: str, workers: list[WorkerView]) -> list[WorkerView]:
    for number, worker in enumerate(workers):
        worker.worker_id, worker.address = f"{prefix}{number}", f"{prefix}{number}:1"
    return workers


def pairing(request: RequestShape, group: Group, config: CostConfig = CONFIG) -> Pairing:
    return Pairing(request, group, config, lambda: 0.0)


def least_cost(options: list[Option]) -> float:
    return min(option.cost for option in options)


def lost_by_pruning(request: RequestShape, options: list[Option]) -> float:
    """At most: what depends on the pair, for the two workers that are best by themselves.

    It is the transfer, on the slowest link, and the wait for the decode worker, which the prefill may or may not hide.
    """
    travel_s = request.num_prompt_tokens * TOKEN_BYTES / SLOWEST_BYTES_PER_S
    decodes = [option.decode for option in options]
    late_s = max(decode.blocked_s for decode in decodes)
    spread_s = max(decode.load_s for decode in decodes)
    return (1 + decodes[0].gap_weight) * (travel_s + late_s + spread_s)


@given(group=GROUPS, request=SHAPES, seed=st.integers(0, 5))
def test_the_chosen_is_near_the_best_of_all_pairs(group: Group, request: RequestShape, seed: int) -> None:
    """Near: within the share of its TTFT that counts as equal, and what pruning may lose."""
    everything = pairing(request, group, EVERYTHING).best()
    chosen = CostScheduler(seed).plan(request, [*group.prefillers, *group.decoders]).chosen
    best = least_cost(everything)
    slowest_s = max(option.ttft_s for option in everything)
    nearness_s = max(CONFIG.near_s, CONFIG.near_share * slowest_s)
    assert chosen.cost <= best + nearness_s + lost_by_pruning(request, everything) + 1e-9


@given(group=GROUPS, request=SHAPES)
def test_pruning_loses_nothing_where_no_pair_is_better_than_its_workers(group: Group, request: RequestShape) -> None:
    """Of split plans; decode workers that compute a prompt are rated where they are good at generating or fullest."""
    for worker in chain(group.prefillers, group.decoders):
        worker.token_bytes = worker.max_running_requests = 0
    for worker in group.decoders:
        worker.num_queued_prompt_tokens = 0
    pruned, everything = (
        pairing(request, group, replace(config, local_prefill="never")).best() for config in (CONFIG, EVERYTHING)
    )
    assert least_cost(pruned) == pytest.approx(least_cost(everything))


@given(group=GROUPS, request=SHAPES, ttft_s=st.floats(0.005, 1.0))
def test_nobody_is_refused_whom_any_pair_would_serve_in_time(
    group: Group, request: RequestShape, ttft_s: float
) -> None:
    request = replace(request, ttft_s=ttft_s)
    fastest_s = min(option.ttft_s for option in pairing(request, group, EVERYTHING).best())
    workers = [*group.prefillers, *group.decoders]
    if fastest_s <= ttft_s:
        assert CostScheduler().plan(request, workers).chosen.ttft_s <= ttft_s
    else:
        with pytest.raises(OverloadedError):
            CostScheduler().plan(request, workers)


def test_a_pair_in_time_is_found_behind_the_best_few() -> None:
    """The three best prefill workers are slow to send; a busier one is not."""
    slow, fast = ({"d0:1": bytes_per_s} for bytes_per_s in (1e6, 1e10))
    prefillers = [view(f"p{number}", PREFILL, token_bytes=1000, link_bytes_per_s=slow) for number in range(3)]
    busier = view("p3", PREFILL, token_bytes=1000, link_bytes_per_s=fast, num_queued_prompt_tokens=500)
    workers = [*prefillers, busier, view("d0", DECODE, token_bytes=1000, num_queued_prompt_tokens=90_000)]
    assert CostScheduler().plan(shape(1000, ttft_s=0.3), workers).plan.prefill is busier


def test_the_best_few_are_paired_and_those_best_at_one_thing() -> None:
    prefillers = [view(f"p{number}", PREFILL, num_queued_prompt_tokens=1000 * number) for number in range(6)]
    decoders = [view(f"d{number}", DECODE, num_running_requests=number) for number in range(6)]
    request = shape(num_stored_blocks={"d5": 2})
    options = pairing(request, Group(decoders, prefillers)).best()
    split = [option for option in options if not option.is_local]
    assert {option.prompt.worker.worker_id for option in split} == {"p0", "p1", "p2"}
    assert {option.decode.worker.worker_id for option in split} == {"d0", "d1", "d2", "d5"}
    assert len(options) == 3 * 4 + 4


def test_prompts_that_are_late_by_themselves_are_not_paired_with_everybody() -> None:
    prefillers = [view(f"p{number}", PREFILL, num_queued_prompt_tokens=90_000) for number in range(20)]
    decoders = [view(f"d{number}", DECODE, num_queued_prompt_tokens=90_000) for number in range(20)]
    options = pairing(shape(ttft_s=0.1), Group(decoders, prefillers)).all_in_time()
    assert len(options) == 20 * CONFIG.num_kept + 20
