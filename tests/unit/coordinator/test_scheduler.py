"""Which workers are chosen?"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView
from kvrelay.coordinator.scheduler_old import plan
from kvrelay.errors import InvalidRequestError, NoWorkersError
from kvrelay.v1 import cluster_pb2

PREFILL, DECODE = cluster_pb2.ROLE_PREFILL, cluster_pb2.ROLE_DECODE


def view(worker_id: str, role: cluster_pb2.Role, **values: Any) -> WorkerView:
    defaults: dict[str, Any] = {
        "model": "m",
        "address": f"{worker_id}:1",
        "fingerprint": b"f",
        "block_size_tokens": 32,
        "max_model_len_tokens": 1024,
    }
    return WorkerView(worker_id=worker_id, role=role, **(defaults | values))


def shape(num_prompt_tokens: int = 100, model: str = "m") -> RequestShape:
    return RequestShape(model=model, num_prompt_tokens=num_prompt_tokens)


def test_takes_the_least_loaded_of_each_role() -> None:
    workers = [
        view("p1", PREFILL, num_queued_prompt_tokens=500),
        view("p2", PREFILL, num_queued_prompt_tokens=20, num_running_requests=9),
        view("d1", DECODE, num_running_requests=3),
        view("d2", DECODE, num_running_requests=2, num_queued_prompt_tokens=900),
    ]
    chosen = plan(shape(), workers)
    assert chosen.prefill is workers[1]
    assert chosen.decode is workers[3]


def test_equal_workers_take_turns() -> None:
    workers = [view("d1", DECODE), view("d2", DECODE), view("d3", DECODE)]
    order = []
    for _ in range(6):
        chosen = plan(shape(5), workers).decode
        chosen.num_assigned += 1
        order.append(chosen.worker_id)
    assert order == ["d1", "d2", "d3"] * 2


def test_prompt_without_a_full_block_skips_prefill() -> None:
    workers = [view("p1", PREFILL), view("d1", DECODE)]
    assert plan(shape(31), workers).prefill is None
    assert plan(shape(32), workers).prefill is workers[0]


def test_decode_computes_all_when_no_prefill_worker_lives() -> None:
    assert plan(shape(), [view("d1", DECODE)]).prefill is None


@pytest.mark.parametrize(
    "values",
    [{"draining": True}, {"model": "other"}, {"fingerprint": b"g"}, {"max_model_len_tokens": 100}],
    ids=lambda values: next(iter(values)),
)
def test_unfit_prefill_workers_are_passed_over(values: dict[str, Any]) -> None:
    assert plan(shape(), [view("p1", PREFILL, **values), view("d1", DECODE)]).prefill is None


@pytest.mark.parametrize("values", [{"draining": True}, {"model": "other"}], ids=lambda values: next(iter(values)))
def test_without_a_fit_decode_worker_there_is_no_plan(values: dict[str, Any]) -> None:
    with pytest.raises(NoWorkersError, match="'m'"):
        plan(shape(), [view("p1", PREFILL), view("d1", DECODE, **values)])


def test_prompt_too_long_for_every_decode_worker_is_a_bad_request() -> None:
    workers = [view("d1", DECODE, max_model_len_tokens=64), view("d2", DECODE, max_model_len_tokens=100)]
    with pytest.raises(InvalidRequestError, match="fit into 100") as raised:
        plan(shape(100), workers)
    assert raised.value.field == "prompt"
    assert plan(shape(99), workers).decode is workers[1]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([PREFILL, DECODE]),
            st.sampled_from(["m", "n"]),
            st.sampled_from([b"f", b"g"]),
            st.booleans(),
            st.integers(0, 50),
            st.integers(0, 50),
        ),
        max_size=8,
    ),
    st.integers(1, 200),
)
def test_plans_pair_only_what_fits(rows: list[tuple[Any, ...]], num_prompt_tokens: int) -> None:
    workers = [
        view(
            f"w{i}",
            role,
            model=model,
            fingerprint=fingerprint,
            draining=draining,
            num_queued_prompt_tokens=queued,
            num_running_requests=running,
        )
        for i, (role, model, fingerprint, draining, queued, running) in enumerate(rows)
    ]
    decoders = [w for w in workers if w.role == DECODE and w.model == "m" and not w.draining]
    try:
        chosen = plan(shape(num_prompt_tokens), workers)
    except NoWorkersError:
        assert not decoders
        return
    assert chosen.decode in decoders
    assert chosen.decode.num_running_requests == min(w.num_running_requests for w in decoders)
    if chosen.prefill is not None:
        assert chosen.prefill.role == PREFILL
        assert chosen.prefill.model == "m"
        assert not chosen.prefill.draining
        assert chosen.prefill.fingerprint == chosen.decode.fingerprint
