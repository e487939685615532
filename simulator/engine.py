"""When does a simulated engine do what? Steps under virtual time, many at once where nothing interferes."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from kvrelay.simulator.batch import Batch, Step
from kvrelay.simulator.config import EngineLimits
from kvrelay.simulator.events import EventLoop
from kvrelay.simulator.sequence import EngineSequence
from kvrelay.simulator.timing import Seconds, TimeModel, mixed_step_s

_MOST_STEPS = 1024
"""Taken at once; bounds what is computed in vain when somebody interferes."""


class SimulatedEngine:
    """Chunked prefill and continuous batching.

    While sequences decode and nothing else is to do, as many steps are taken at once as their number stays the same:
    one event for all of them. A sequence that comes in between cuts this leap at the end of the step in which it comes.
    The times of tokens are those of single steps, to the last bit (`leaps` off takes single steps, to compare).
    """

    def __init__(self, loop: EventLoop, times: TimeModel, limits: EngineLimits, *, leaps: bool = True) -> None:
        self._loop = loop
        self._times = times
        self._leaps = leaps
        self._batch = Batch(limits)
        self._step = Step()
        self._num_stepping = 0
        """Sequences that decode in the steps under way: the first of the batch."""
        self._ends_s: Seconds | None = None
        """Of the steps under way; None when idle."""
        self._starts_s = 0.0
        self._token = 0
        """Tells the end of a leap that was cut from the end that holds."""
        self.busy_s = 0.0
        self.on_change = _ignore
        """Called after anything has changed that the figures below tell."""

    @property
    def is_idle(self) -> bool:
        return self._ends_s is None

    @property
    def num_waiting(self) -> int:
        """Sequences that have not begun, or were preempted."""
        return len(self._batch.waiting)

    @property
    def num_running(self) -> int:
        return self._batch.num_running

    @property
    def num_preemptions(self) -> int:
        return self._batch.num_preemptions

    @property
    def num_computed_prompt_tokens(self) -> int:
        """Of prompts that have no token yet, what of them was not stored before."""
        return self._batch.num_computed_prompt_tokens

    @property
    def num_context_tokens(self) -> int:
        """Of what runs, at this moment, steps inside of a leap included."""
        return self._batch.num_context_tokens + self._num_stepping * self._num_steps_done()

    def submit(self, sequence: EngineSequence) -> None:
        """Let a sequence wait for its turn."""
        self._batch.waiting.append(sequence)
        if self._ends_s is None:
            self._begin()
        elif len(self._ends_s) > 1 and self._batch.can_admit():
            self._cut(self._ends_s)
        self.on_change()

    def _num_steps_done(self) -> int:
        return 0 if self._ends_s is None else bisect_left(self._ends_s, self._loop.now_s)

    def _cut(self, ends_s: Seconds) -> None:
        num_steps = min(len(ends_s), bisect_left(ends_s, self._loop.now_s) + 1)
        self._run(ends_s[:num_steps])

    def _begin(self) -> None:
        """Start the next step, or steps; nothing when there is nothing to do."""
        batch = self._batch
        self._step = batch.next_step(admit=batch.make_room())
        self._num_stepping = len(batch.decoding)
        now_s = self._starts_s = self._loop.now_s
        self._ends_s = None
        if self._step.prompts:
            chunks = self._step.chunks()
            step_s = mixed_step_s(self._times, chunks, self._num_stepping, batch.num_decoding_tokens)
            self._run(np.array([now_s + self._step.load_s + step_s]))
        elif batch.decoding:
            leaps = self._leaps and not self._step.load_s
            num_steps = min(batch.num_steps_ahead(), _MOST_STEPS) if leaps else 1
            steps_s = self._times.steps_s(self._num_stepping, batch.num_decoding_tokens, num_steps)
            self._run(np.add.accumulate(np.concatenate(([now_s + self._step.load_s], steps_s)))[1:])

    def _run(self, ends_s: Seconds) -> None:
        self._ends_s = ends_s
        self._token += 1
        self._loop.at(float(ends_s[-1]), self._end, self._token)

    def _end(self, token: int) -> None:
        if token != self._token:
            return
        ends_s = self._ends_s
        assert ends_s is not None
        self.busy_s += float(ends_s[-1]) - self._starts_s
        batch = self._batch
        stepped = batch.decoding[: self._num_stepping]
        batch.generated(self._num_stepping, len(ends_s))
        new = [sequence for sequence in stepped if not sequence.token_times_s]
        for sequence in stepped:
            sequence.token_times_s.append(ends_s)
        prompts = self._step.prompts
        sampled = [sequence for sequence, num_tokens in prompts if batch.computed(sequence, num_tokens)]
        new += [sequence for sequence in sampled if not sequence.token_times_s]
        for sequence in sampled:
            sequence.token_times_s.append(ends_s)
        finished = batch.take_finished()
        for sequence, _ in prompts:
            sequence.listener.on_computed(sequence)
        for sequence in new:
            sequence.listener.on_first_token(sequence)
        for sequence in finished:
            sequence.listener.on_finished(sequence)
        self._begin()
        self.on_change()


def _ignore() -> None:
    """Stands in until somebody wants to know."""
