"""What does a pair of workers cost, put together from what each of them costs?"""

from __future__ import annotations

import pytest

from kvrelay.coordinator.scheduler.cost_config import CostConfig
from kvrelay.coordinator.scheduler.estimates import DecodeEstimate, PromptEstimate
from kvrelay.coordinator.scheduler.option import Candidates, local_option, split_option
from tests.support.scheduling import DECODE, PREFILL, view

CONFIG = CostConfig(remote_bytes_per_s=1e6, overlap_share=0.5)
P1, D1 = view("p1", PREFILL), view("d1", DECODE)


def prompt(**values: float) -> PromptEstimate:
    return PromptEstimate(1.0, P1, 0.25, 0.5, 32, None, 0.0)._replace(**values)


def decode(**values: float) -> DecodeEstimate:
    return DecodeEstimate(2.0, D1, 0.02, 0.0, 64, 0, 0.0, 0.0)._replace(**values)


def test_a_pair_costs_what_its_workers_cost() -> None:
    option = split_option(prompt(), decode(), CONFIG)
    assert (option.cost, option.ttft_s, option.transfer_s) == (3.0, 0.75, 0.0)


def test_a_transfer_costs_what_the_prefill_does_not_hide() -> None:
    assert split_option(prompt(), decode(missing_bytes=200_000), CONFIG).transfer_s == 0
    option = split_option(prompt(), decode(missing_bytes=1_000_000), CONFIG)
    assert (option.transfer_s, option.ttft_s, option.cost) == pytest.approx((0.75, 1.5, 3.75))


def test_a_wait_for_the_decode_worker_counts_as_far_as_it_is_longer_than_the_prefill() -> None:
    assert split_option(prompt(), decode(cost=2.5, blocked_s=0.5), CONFIG).cost == pytest.approx(3.0)
    assert split_option(prompt(), decode(cost=4.0, blocked_s=2.0), CONFIG).cost == pytest.approx(3.0 + 1.25)


def test_the_gap_behind_the_first_token_is_weighted() -> None:
    """It is the transfer, the wait for the decode worker, and the loading of what came."""
    gap = split_option(prompt(), decode(load_s=0.2, gap_weight=3.0), CONFIG)
    assert gap.cost == pytest.approx(3.0 + 3.0 * 0.2)
    assert gap.ttft_s == 0.75
    late = split_option(prompt(), decode(missing_bytes=1_000_000, load_s=0.2, gap_weight=3.0), CONFIG)
    assert late.cost == pytest.approx(3.75 + 3.0 * (0.75 + 0.2))


def test_who_computes_a_prompt_itself_waits_for_room_and_has_no_gap() -> None:
    free = local_option(prompt(worker=D1), decode(load_s=0.2, gap_weight=3.0))
    assert (free.cost, free.ttft_s) == (3.0, 0.75)
    full = local_option(prompt(worker=D1), decode(cost=3.0, blocked_s=1.0))
    assert (full.cost, full.ttft_s) == (3.75, 1.5)


def test_an_idle_worker_still_has_to_fetch_to_compute_and_to_send() -> None:
    option = split_option(prompt(wait_s=9.0, fetch_s=0.1), decode(missing_bytes=1_000_000), CONFIG)
    assert option.idle_ttft_s == pytest.approx(0.1 + 0.5 + 0.75)


def test_plans_name_no_prefill_worker_where_none_is_needed() -> None:
    split, local = split_option(prompt(), decode(), CONFIG), local_option(prompt(worker=D1), decode())
    assert (split.plan().prefill, split.plan().decode) == (P1, D1)
    assert (local.plan().prefill, local.plan().decode) == (None, D1)
    assert (split.candidate().prefill_worker_id, local.candidate().prefill_worker_id) == ("p1", "")


def test_candidates_are_the_options_in_words() -> None:
    options = [split_option(prompt(), decode(missing_bytes=1_000_000), CONFIG), local_option(prompt(), decode())]
    candidates = Candidates(options)
    first = candidates[0]
    assert (len(candidates), first.cost, first.num_cached_tokens, first.num_stored_tokens) == (2, 3.75, 32, 64)
    assert first.ttft_s == pytest.approx(options[0].ttft_s)
    assert (first.wait_s, first.prefill_s, first.transfer_s) == pytest.approx((0.25, 0.5, 0.75))
    assert candidates[:1] == [first]
