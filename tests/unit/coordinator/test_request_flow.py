"""Does the state machine of a request send the right halves, and never a token twice or too many?"""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvrelay.coordinator.flow_request import Completion, FlowRequest
from kvrelay.coordinator.request_flow import Phase, RequestFlow
from kvrelay.coordinator.request_trace import RequestTrace
from kvrelay.coordinator.scheduler.decision import Plan
from kvrelay.coordinator.scheduler.view import WorkerView
from kvrelay.coordinator.timeline import RequestTimeline
from kvrelay.tracing import Tracing
from kvrelay.v1 import cluster_pb2, common_pb2, worker_pb2

LENGTH, STOP = common_pb2.FINISH_REASON_LENGTH, common_pb2.FINISH_REASON_STOP
OPEN = common_pb2.FINISH_REASON_UNSPECIFIED


def worker(worker_id: str, role: cluster_pb2.Role) -> WorkerView:
    return WorkerView(
        worker_id=worker_id, role=role, model="m", address=f"{worker_id}:1", fingerprint=b"f",
        block_size_tokens=4, max_model_len_tokens=64,
    )  # fmt: skip


def flow_of(
    *,
    num_completions: int = 1,
    with_prefill: bool = True,
    prompt: tuple[int, ...] = (1, 2, 3, 4),
    source: WorkerView | None = None,
    **sampling: Any,
) -> RequestFlow:
    params = common_pb2.SamplingParams(**({"temperature": 1.0, "repetition_penalty": 1.0, "max_tokens": 10} | sampling))
    names = ["r"] if num_completions == 1 else [f"{i}_r" for i in range(num_completions)]
    request = FlowRequest(
        request_id="r", external_id="r", prompt_token_ids=prompt, max_model_len_tokens=64,
        completions=[Completion(request_id=name, sampling=params) for name in names],
    )  # fmt: skip
    prefill = worker("p", cluster_pb2.ROLE_PREFILL) if with_prefill else None
    chosen = Plan(prefill=prefill, decode=worker("d", cluster_pb2.ROLE_DECODE), source=source)
    return RequestFlow(request, chosen, RequestTimeline(), RequestTrace(Tracing(), None), kv_wait_ms=500)


def delta(tokens: list[int], finish: common_pb2.FinishReason = OPEN, request_id: str = "r") -> worker_pb2.TokenDelta:
    return worker_pb2.TokenDelta(request_id=request_id, token_ids=tokens, finish_reason=finish, num_cached_tokens=3)


def test_exact_first_token_is_emitted_unfinished_and_continues_the_prompt() -> None:
    flow = flow_of()
    assert flow.start() is not None
    first = flow.on_prefill_delta(delta([7], LENGTH))
    assert first is not None
    assert first.finish_reason == OPEN
    assert flow.phase is Phase.DECODE_DUE
    (decode,) = flow.decodes()
    assert list(decode.prompt_token_ids) == [1, 2, 3, 4, 7]
    assert decode.sampling.max_tokens == 9
    assert decode.kv_wait_ms == 500


def test_inexact_first_token_is_dropped_and_its_cached_tokens_are_not() -> None:
    flow = flow_of(min_tokens=1)
    flow.start()
    assert flow.on_prefill_delta(delta([7], LENGTH)) is None
    (decode,) = flow.decodes()
    assert list(decode.prompt_token_ids) == [1, 2, 3, 4]
    assert decode.sampling.max_tokens == 10
    own = worker_pb2.TokenDelta(request_id="r", token_ids=[8], num_cached_tokens=4)
    emitted = flow.on_decode_delta(own)
    assert emitted is not None
    assert emitted.num_cached_tokens == 3


def test_the_worker_that_computes_the_prompt_is_told_whom_to_fetch_from() -> None:
    source = worker("s", cluster_pb2.ROLE_PREFILL)
    split = flow_of(source=source)
    prefill = split.start()
    assert prefill is not None
    assert prefill.prefix_address == "s:1"
    split.on_prefill_delta(delta([7], LENGTH))
    assert [decode.prefix_address for decode in split.decodes()] == [""]
    assert [decode.prefix_address for decode in flow_of(with_prefill=False, source=source).decodes()] == ["s:1"]
    assert [decode.prefix_address for decode in flow_of(with_prefill=False).decodes()] == [""]


def test_greedy_with_a_seed_is_exact() -> None:
    flow = flow_of(seed=5, temperature=0.0)
    flow.start()
    assert flow.on_prefill_delta(delta([7], LENGTH)) is not None


def test_prefill_that_ends_in_an_error_counts_as_lost() -> None:
    flow = flow_of()
    flow.start()
    assert flow.on_prefill_delta(delta([], common_pb2.FINISH_REASON_ERROR)) is None
    (decode,) = flow.decodes()
    assert list(decode.prompt_token_ids) == [1, 2, 3, 4]
    assert decode.kv_wait_ms == 0


def test_late_prefill_news_are_ignored() -> None:
    flow = flow_of()
    flow.start()
    flow.on_prefill_lost()
    flow.decodes()
    assert flow.on_prefill_delta(delta([7], LENGTH)) is None
    flow.on_prefill_lost()
    assert flow.phase is Phase.DECODE


def test_tokens_after_the_end_are_dropped() -> None:
    flow = flow_of(with_prefill=False)
    flow.decodes()
    assert flow.on_decode_delta(delta([1], LENGTH)) is not None
    assert flow.done
    assert flow.on_decode_delta(delta([2])) is None


def test_flow_of_two_completions_ends_with_the_later_one() -> None:
    flow = flow_of(num_completions=2)
    assert flow.start() is not None
    assert flow.on_prefill_delta(delta([7], LENGTH)) is None
    assert [decode.request_id for decode in flow.decodes()] == ["0_r", "1_r"]
    flow.on_decode_delta(delta([1], STOP, "1_r"))
    assert not flow.done
    flow.stop("0_r")
    assert flow.done


def test_completions_stopped_before_decode_are_not_sent() -> None:
    flow = flow_of(num_completions=2)
    flow.start()
    flow.stop("0_r")
    flow.on_prefill_delta(delta([7], LENGTH))
    assert [decode.request_id for decode in flow.decodes()] == ["1_r"]


def test_prompt_logprobs_are_given_to_every_completion() -> None:
    flow = flow_of(num_completions=2, prompt_logprobs=0)
    prefill = flow.start()
    assert prefill is not None
    assert prefill.sampling.HasField("prompt_logprobs")
    known = delta([7], LENGTH)
    known.prompt_logprobs.width = 1
    flow.on_prefill_delta(known)
    assert not any(decode.sampling.HasField("prompt_logprobs") for decode in flow.decodes())
    for name in ("0_r", "1_r"):
        emitted = flow.on_decode_delta(delta([9], request_id=name))
        assert emitted is not None
        assert emitted.prompt_logprobs.width == 1
        again = flow.on_decode_delta(delta([9], request_id=name))
        assert again is not None
        assert not again.HasField("prompt_logprobs")


@given(max_tokens=st.integers(1, 6), script=st.lists(st.integers(1, 9), min_size=6, max_size=6), exact=st.booleans())
def test_client_gets_what_one_engine_would_give(max_tokens: int, script: list[int], exact: bool) -> None:
    """Token 9 is the stop token; both workers sample from one script."""
    flow = flow_of(max_tokens=max_tokens, **({} if exact else {"presence_penalty": 1.0}))
    expected = script[:max_tokens]
    if 9 in expected:
        expected = expected[: expected.index(9) + 1]
    flow.start()
    got: list[int] = []
    first = flow.on_prefill_delta(delta(script[:1], STOP if script[0] == 9 else LENGTH))
    finished = 0
    if first is not None:
        got += first.token_ids
        finished += first.finish_reason != OPEN
    if not flow.done:
        (decode,) = flow.decodes()
        start = len(decode.prompt_token_ids) - 4
        rest = script[start : start + decode.sampling.max_tokens]
        for position, token in enumerate(rest):
            is_last = token == 9 or position == len(rest) - 1
            emitted = flow.on_decode_delta(delta([token], LENGTH if is_last else OPEN))
            assert emitted is not None
            got += emitted.token_ids
            finished += emitted.finish_reason != OPEN
            if is_last:
                break
    assert got == expected
    assert finished == 1
    assert flow.done
