"""The load of a worker: what was given to it here, and what it reports of everybody's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvrelay.coordinator.scheduler.view import WorkerView
from kvrelay.coordinator.worker_load import WorkerLoad
from kvrelay.v1 import worker_pb2
from tests.support.scheduling import view

Load = tuple[int, int, int, int]
DECODE = 2


def load_of(load: WorkerLoad) -> Load:
    """Prompts, their tokens, sequences, their tokens."""
    worker: WorkerView = view("d1", DECODE)
    load.fill(worker)
    return (
        worker.num_queued_prompts,
        worker.num_queued_prompt_tokens,
        worker.num_running_requests,
        worker.num_context_tokens,
    )


def status(
    prompts: int = 0, tokens: int = 0, sequences: int = 0, context: int = 0, computed: int = 0
) -> worker_pb2.WorkerStatus:
    return worker_pb2.WorkerStatus(
        num_queued_prompts=prompts,
        num_queued_prompt_tokens=tokens,
        num_computed_prompt_tokens=computed,
        num_decode_jobs=sequences,
        num_context_tokens=context,
    )


def test_what_was_given_counts_at_once_and_until_it_is_over() -> None:
    load = WorkerLoad()
    load.add_prompt("r", 100)
    load.add_sequences("r", 2, 200)
    assert load_of(load) == (1, 100, 2, 200)
    assert load.remove_prompt("r")
    assert not load.remove_prompt("r")
    assert load.has_sequences
    assert load.remove_sequences("r")
    assert not load.has_sequences
    assert load_of(load) == (0, 0, 0, 0)


def test_what_others_gave_counts_as_it_is_reported() -> None:
    load = WorkerLoad()
    load.add_prompt("r", 100)
    load.add_sequences("r", 1, 100)
    load.sent_sequences("r")
    load.report(status(3, 300, 4, 400))
    assert load_of(load) == (3, 300, 4, 400)


def test_what_was_given_since_the_report_comes_on_top_of_it() -> None:
    load = WorkerLoad()
    load.report(status(3, 300, 4, 400))
    load.add_prompt("r", 100)
    load.add_sequences("r", 1, 100)
    assert load_of(load) == (4, 400, 5, 500)
    load.remove_prompt("r")
    load.remove_sequences("r")
    assert load_of(load) == (3, 300, 4, 400)


def test_a_report_from_before_a_request_does_not_hide_it() -> None:
    load = WorkerLoad()
    load.add_prompt("r", 100)
    load.report(status())
    load.report(status())
    assert load_of(load) == (1, 100, 0, 0)


def test_sequences_that_are_prefilled_elsewhere_hide_nobody() -> None:
    load = WorkerLoad()
    load.add_sequences("r", 2, 200)
    load.report(status(sequences=3, context=500))
    assert load_of(load)[2:] == (5, 700)
    load.sent_sequences("r")
    load.report(status(sequences=5, context=700))
    assert load_of(load)[2:] == (5, 700)
    load.remove_sequences("r")
    load.sent_sequences("r")
    assert load_of(load)[2:] == (3, 500)


def test_what_ended_does_not_wait_for_a_report() -> None:
    load = WorkerLoad()
    load.add_prompt("r", 100)
    load.add_sequences("r", 1, 100)
    load.sent_sequences("r")
    load.report(status(2, 130, 3, 300))
    assert load_of(load) == (2, 130, 3, 300)
    load.remove_prompt("r")
    load.remove_sequences("r")
    assert load_of(load) == (1, 30, 2, 200)


def test_what_is_computed_of_a_prompt_is_not_queued_and_ends_with_it() -> None:
    load = WorkerLoad()
    load.add_prompt("r", 100)
    load.add_prompt("s", 50)
    load.report(status(2, 150, computed=70))
    assert load_of(load)[:2] == (2, 80)
    load.remove_prompt("r")
    assert load_of(load)[:2] == (1, 50)
    load.report(status(1, 50, computed=60))
    assert load_of(load)[:2] == (1, 0)


def test_sequences_that_are_in_prefill_only_do_not_count_as_generated() -> None:
    load = WorkerLoad()
    load.report(worker_pb2.WorkerStatus(num_running_requests=5, num_waiting_requests=2, num_prefill_jobs=6))
    assert load_of(load)[2] == 1
    load.report(worker_pb2.WorkerStatus(num_running_requests=5, num_waiting_requests=2, num_prefill_jobs=9))
    assert load_of(load)[2] == 0


steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["add", "remove"]), st.sampled_from("abcd"), st.integers(0, 100)),
        st.tuples(st.just("report"), st.just(""), st.integers(0, 100)),
    )
)


@given(steps)
def test_the_load_is_what_is_open_here_and_what_others_gave(moves: list[tuple[str, str, int]]) -> None:
    load = WorkerLoad()
    own: dict[str, int] = {}
    others = 0
    for kind, name, number in moves:
        if kind == "add":
            load.add_prompt(name, number)
            own[name] = number
        elif kind == "remove":
            assert load.remove_prompt(name) is (own.pop(name, None) is not None)
        else:
            load.report(status(tokens=number))
            others = max(0, number - sum(own.values()))
        assert load_of(load)[1] == sum(own.values()) + others
