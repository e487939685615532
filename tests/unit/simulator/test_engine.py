"""An engine batches as vLLM does, in steps that add up, however many it takes at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.simulator.config import EngineLimits
from kvrelay.simulator.engine import SimulatedEngine
from kvrelay.simulator.events import EventLoop
from kvrelay.simulator.sequence import EngineSequence
from kvrelay.simulator.timing import FormulaTimes
from tests.support.simulation import LIMITS, STEP_TIMES


@dataclass(slots=True)
class Log:
    """What an engine told."""

    loop: EventLoop
    started: list[float] = field(default_factory=list)
    computed: list[tuple[float, int]] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)
    num_stored_tokens: int = 0

    def on_started(self, sequence: EngineSequence) -> None:
        self.started.append(self.loop.now_s)
        sequence.num_computed_tokens = max(sequence.num_computed_tokens, self.num_stored_tokens)

    def on_computed(self, sequence: EngineSequence) -> None:
        self.computed.append((self.loop.now_s, sequence.num_computed_tokens))

    def on_first_token(self, sequence: EngineSequence) -> None:
        self.first.append(self.loop.now_s)

    def on_finished(self, sequence: EngineSequence) -> None:
        self.finished.append(self.loop.now_s)


class Rig:
    def __init__(self, limits: EngineLimits = LIMITS, *, leaps: bool = True) -> None:
        self.loop = EventLoop()
        self.engine = SimulatedEngine(self.loop, FormulaTimes(STEP_TIMES), limits, leaps=leaps)

    def submit(self, at_s: float, num_prompt: int, num_output: int, num_computed: int = 0) -> EngineSequence:
        sequence = EngineSequence(
            listener=Log(self.loop),
            num_prompt_tokens=num_prompt,
            num_computed_tokens=num_computed,
            num_output_tokens=num_output,
        )
        self.loop.at(at_s, self.engine.submit, sequence)
        return sequence


def times_of(sequence: EngineSequence) -> list[float]:
    return [float(time_s) for time_s in np.concatenate(sequence.token_times_s)]


def log_of(sequence: EngineSequence) -> Log:
    assert isinstance(sequence.listener, Log)
    return sequence.listener


def test_a_prompt_and_its_answer() -> None:
    rig = Rig()
    sequence = rig.submit(1.0, 100, 3)
    rig.loop.run()
    assert times_of(sequence) == pytest.approx([2.5, 2.61, 2.72])
    assert log_of(sequence).first == pytest.approx([2.5])
    assert log_of(sequence).finished == pytest.approx([2.72])
    assert rig.engine.is_idle
    assert rig.engine.busy_s == pytest.approx(1.72)


def test_a_long_prompt_is_computed_in_chunks() -> None:
    rig = Rig()
    sequence = rig.submit(0.0, 250, 1)
    rig.loop.run()
    times, computed = zip(*log_of(sequence).computed, strict=True)
    assert computed == (100, 200, 250)
    assert times == pytest.approx((1.0, 2.0, 3.0))


def test_prompts_share_a_step_and_decoding_sequences_go_on_in_it() -> None:
    rig = Rig()
    first = rig.submit(0.0, 50, 10)
    second, third = rig.submit(1.05, 40, 1), rig.submit(1.05, 30, 1)
    rig.loop.run()
    # 1 s for the first; the step that is under way at 1.05 s ends at 1.11 s; then 70 tokens and one sequence.
    both_s = 1.11 + 0.5 + 70 * 0.01 + 0.11 - 0.1
    assert times_of(first)[:3] == pytest.approx([1.0, 1.11, both_s])
    assert times_of(second) == times_of(third) == pytest.approx([both_s])


def test_a_sequence_that_lacks_one_token_joins_like_one_that_decodes() -> None:
    rig = Rig()
    sequence = rig.submit(0.0, 101, 2, num_computed=100)
    rig.loop.run()
    assert times_of(sequence) == pytest.approx([0.11, 0.22])


def test_what_was_stored_while_it_waited_is_not_computed() -> None:
    rig = Rig()
    rig.submit(0.0, 100, 1)
    late = rig.submit(0.1, 100, 1)
    log_of(late).num_stored_tokens = 90
    rig.loop.run()
    assert log_of(late).finished == pytest.approx([1.5 + 0.6])


def test_without_room_the_last_sequence_begins_again() -> None:
    rig = Rig(EngineLimits(max_batched_tokens=100, max_running_requests=4, capacity_tokens=60))
    first, second = rig.submit(0.0, 20, 30), rig.submit(0.0, 20, 30)
    rig.loop.run()
    assert rig.engine.num_preemptions == 1
    assert len(times_of(first)) == len(times_of(second)) == 30
    assert len(log_of(second).started) == 1
    assert times_of(second)[-1] > times_of(first)[-1]


requests = st.lists(
    st.tuples(st.floats(0, 5), st.integers(1, 150), st.integers(1, 40), st.integers(0, 200)), min_size=1, max_size=12
)


@given(requests, st.integers(200, 400), st.integers(1, 6))
def test_steps_taken_at_once_end_when_single_ones_do(
    load: list[tuple[float, int, int, int]], capacity: int, max_running: int
) -> None:
    limits = EngineLimits(max_batched_tokens=64, max_running_requests=max_running, capacity_tokens=capacity)
    seen = []
    for leaps in (True, False):
        rig = Rig(limits, leaps=leaps)
        sequences = [rig.submit(at, prompt, output, min(stored, prompt - 1)) for at, prompt, output, stored in load]
        rig.loop.run()
        assert rig.engine.is_idle
        assert (rig.engine.num_waiting, rig.engine.num_running, rig.engine.num_context_tokens) == (0, 0, 0)
        assert [len(times_of(sequence)) for sequence in sequences] == [output for _, _, output, _ in load]
        seen.append(([times_of(sequence) for sequence in sequences], rig.engine.num_preemptions))
    assert seen[0] == seen[1]


@given(requests, st.integers(200, 400))
def test_memory_is_never_overdrawn(load: list[tuple[float, int, int, int]], capacity: int) -> None:
    limits = EngineLimits(max_batched_tokens=64, max_running_requests=5, capacity_tokens=capacity)
    rig, used = Rig(limits, leaps=False), list[int]()
    rig.engine.on_change = lambda: used.append(rig.engine.num_context_tokens)
    for at, prompt, output, stored in load:
        rig.submit(at, prompt, output, min(stored, prompt - 1))
    rig.loop.run()
    assert min(used) >= 0
    assert max(used) <= capacity


def test_what_is_stored_is_loaded_in_the_step_that_begins_with_it() -> None:
    rig = Rig()
    loaded, other = rig.submit(0.0, 100, 2, num_computed=50), rig.submit(0.0, 50, 2)
    loaded.load_s = 3.0
    decoding = rig.submit(0.0, 101, 2, num_computed=100)
    decoding.load_s = 2.0
    rig.loop.run()
    # The first one begins at once, and the others with the step after it, in which two sequences decode.
    first_s = 3.0 + 0.5 + 50 * 0.01
    assert times_of(loaded)[0] == pytest.approx(first_s)
    second_s = first_s + 2.0 + 0.5 + 50 * 0.01 + 0.12 - 0.1
    assert times_of(other)[0] == times_of(decoding)[0] == times_of(loaded)[1] == pytest.approx(second_s)


def test_what_is_computed_of_a_prompt_is_told_until_its_first_token() -> None:
    rig = Rig()
    step = LIMITS.max_batched_tokens
    sequence = rig.submit(0.0, 3 * step, 2, num_computed=1)
    sequence.num_queued_tokens = sequence.num_uncomputed_tokens - 1
    told: list[int] = []
    for number in range(2000):
        rig.loop.at(number * 0.01, lambda: told.append(rig.engine.num_computed_prompt_tokens))
    rig.loop.run()
    assert list(dict.fromkeys(told)) == [0, step, 2 * step]
