"""How does a simulated decode worker serve one request? Wait for blocks, load, compute the rest, generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvrelay.simulator.job import Job
from kvrelay.simulator.saving import Saving
from kvrelay.simulator.sequence import EngineSequence

if TYPE_CHECKING:
    from kvrelay.simulator.worker import SimulatedWorker


class DecodeRun:
    """A request at its decode worker. A `SequenceListener`."""

    def __init__(
        self,
        worker: SimulatedWorker,
        job: Job,
        on_first_token: Callable[[], None],
        on_finished: Callable[[], None],
    ) -> None:
        self._worker = worker
        self._job = job
        self._on_first_token = on_first_token
        self._on_finished = on_finished
        self._num_sampled = 0 if job.prefill is None else 1
        """Tokens that came with the prompt from the prefill worker."""
        self._pins: list[int] = []
        self._saving: Saving | None = None

    def start(self) -> None:
        """What is to come from the prefill worker has come; look up what is stored, and submit the rest."""
        self._worker.look_up(self._job, self._submit)

    def _submit(self, pins: list[int]) -> None:
        job, worker = self._job, self._worker
        self._pins = pins
        worker.let_go(job)
        worker.submit(
            EngineSequence(
                listener=self,
                num_prompt_tokens=job.request.num_prompt_tokens + self._num_sampled,
                num_computed_tokens=worker.num_cached_tokens(job, len(pins), self._num_sampled),
                num_output_tokens=job.request.num_output_tokens - self._num_sampled,
            )
        )

    def on_started(self, sequence: EngineSequence) -> None:
        """What was loaded may be evicted."""
        job, worker = self._job, self._worker
        self._pins = worker.store.extend_prefix(self._pins, job.names)
        num_cached_tokens = worker.num_cached_tokens(job, len(self._pins), self._num_sampled)
        sequence.num_computed_tokens = num_cached_tokens
        worker.num_prefilled_tokens += sequence.num_prompt_tokens - num_cached_tokens - self._num_sampled
        if job.prefill is None:
            job.num_cached_tokens = num_cached_tokens
        self._saving = Saving(worker.store, job.names, len(self._pins), worker.hardware.block_tokens)
        worker.store.unpin(self._pins)
        self._pins = []

    def on_computed(self, sequence: EngineSequence) -> None:
        assert self._saving is not None
        saved = self._saving.computed(sequence.num_computed_tokens, complete=sequence.num_generated_tokens > 0)
        self._worker.store.unpin(saved)
        self._worker.touch()

    def on_first_token(self, sequence: EngineSequence) -> None:
        self._worker.prompt_ended(sequence)
        if self._job.prefill is None:
            self._worker.loop.after(self._worker.hardware.message_s, self._on_first_token)

    def on_finished(self, sequence: EngineSequence) -> None:
        """Blocks that the answer completed go into the store, as far as there is room."""
        job, worker = self._job, self._worker
        assert self._saving is not None
        self._saving.close()
        names = job.answer_names
        slots = worker.store.reserve(len(names))
        worker.store.unpin([worker.store.commit(*block) for block in zip(slots, names, strict=False)])
        job.token_times_s += sequence.token_times_s
        worker.decode_ended()
        worker.loop.after(worker.hardware.message_s, self._on_finished)
