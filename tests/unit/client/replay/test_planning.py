"""Which requests of a trace are sent, and how long they are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvrelay.client.replay.planning import Fit, plan
from kvrelay.workload.request_form import TooLong
from kvrelay.workload.trace import TraceRequest


def request(index: int, num_prompt_tokens: int, num_output_tokens: int, *block_ids: int) -> TraceRequest:
    return TraceRequest(
        index=index,
        arrived_s=float(index),
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        block_ids=block_ids,
        block_tokens=10,
    )


def test_requests_that_fit_go_as_they_were_recorded() -> None:
    planned = plan([request(0, 20, 5, 1, 2), request(1, 15, 4, 1, 3)], Fit(max_model_len_tokens=25))
    assert [(each.index, each.due_s, each.max_tokens) for each in planned.requests] == [(0, 0.0, 5), (1, 1.0, 4)]
    first, second = (each.token_ids() for each in planned.requests)
    assert (len(first), len(second)) == (20, 15)
    assert first[:10] == second[:10]
    assert first[10:15] != second[10:]
    assert (planned.num_clipped, planned.num_skipped) == (0, 0)


def test_requests_that_are_too_long_lose_the_end_of_their_prompt() -> None:
    planned = plan([request(0, 40, 5, 1, 2, 3, 4), request(1, 40, 5, 1, 2, 3, 5)], Fit(max_model_len_tokens=30))
    clipped, other = planned.requests
    whole = plan([request(0, 40, 5, 1, 2, 3, 4)], Fit()).requests[0]
    assert (clipped.num_prompt_tokens, clipped.max_tokens) == (25, 5)
    assert clipped.token_ids() == other.token_ids() == whole.token_ids()[:25]
    assert planned.num_clipped == 2


def test_an_answer_that_is_longer_than_the_context_leaves_one_token_of_prompt() -> None:
    (clipped,) = plan([request(0, 40, 500)], Fit(max_model_len_tokens=30)).requests
    assert (clipped.num_prompt_tokens, clipped.max_tokens, len(clipped.token_ids())) == (1, 29, 1)


def test_requests_that_are_too_long_can_be_skipped() -> None:
    planned = plan([request(0, 40, 5), request(1, 20, 5)], Fit(max_model_len_tokens=30, too_long=TooLong.SKIP))
    assert [each.index for each in planned.requests] == [1]
    assert (planned.num_clipped, planned.num_skipped) == (0, 1)


def test_another_seed_gives_other_prompts_that_share_the_same_prefixes() -> None:
    trace = [request(0, 20, 5, 1, 2), request(1, 20, 5, 1, 3)]
    first, second = ([each.token_ids() for each in plan(trace, Fit(seed=seed)).requests] for seed in (1, 2))
    assert first[0][:10] != second[0][:10]
    assert second[0][:10] == second[1][:10]


@given(st.integers(1, 300), st.integers(1, 300), st.integers(2, 300), st.integers(2, 3000))
def test_whatever_is_planned_fits_context_and_vocabulary(
    num_prompt_tokens: int, num_output_tokens: int, max_model_len_tokens: int, vocab_size: int
) -> None:
    blocks = range(-(-num_prompt_tokens // 10))
    fit = Fit(max_model_len_tokens=max_model_len_tokens, vocab_size=vocab_size)
    (planned,) = plan([request(0, num_prompt_tokens, num_output_tokens, *blocks)], fit).requests
    token_ids = planned.token_ids()
    assert len(token_ids) == planned.num_prompt_tokens >= 1
    assert planned.max_tokens >= 1
    assert planned.num_prompt_tokens + planned.max_tokens <= max_model_len_tokens
    assert all(0 <= token_id < vocab_size for token_id in token_ids)
