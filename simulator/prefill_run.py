"""How does a simulated prefill worker serve one request? Fetch, load, compute, push."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvrelay.simulator.job import Job
from kvrelay.simulator.saving import Saving
from kvrelay.simulator.sequence import EngineSequence

if TYPE_CHECKING:
    from kvrelay.simulator.worker import SimulatedWorker


class PrefillRun:
    """A prompt at a prefill worker, until its blocks are at the decode worker. A `SequenceListener`."""

    def __init__(self, worker: SimulatedWorker, job: Job, on_first_token: Callable[[], None]) -> None:
        self._worker = worker
        self._job = job
        self._on_first_token = on_first_token
        self._pins: list[int] = []
        self._saving: Saving | None = None
        self._targets: dict[int, int] = {}
        """Reserved at the decode worker: block -> slot."""
        self._num_sent = 0
        """Blocks from the first on that are on their way, as far as the other side wants them."""
        self._landed_s = 0.0

    def start(self) -> None:
        """Look up what is stored, fetch what the source has more, and submit the prompt."""
        self._worker.look_up(self._job, self._submit)

    def _submit(self, pins: list[int]) -> None:
        self._pins = pins
        self._worker.submit(
            EngineSequence(
                listener=self,
                num_prompt_tokens=self._job.request.num_prompt_tokens,
                num_computed_tokens=self._worker.num_cached_tokens(self._job, len(pins)),
                num_output_tokens=1,
            )
        )

    def on_started(self, sequence: EngineSequence) -> None:
        """Offer the blocks to the decode worker, and send those that are stored."""
        job, worker = self._job, self._worker
        self._pins = worker.store.extend_prefix(self._pins, job.names)
        sequence.num_computed_tokens = job.num_cached_tokens = worker.num_cached_tokens(job, len(self._pins))
        self._saving = Saving(worker.store, job.names, len(self._pins), worker.hardware.block_tokens)
        store = job.decode.store
        job.decode_pins = store.pin_present(job.names)
        wanted = [block for block, name in enumerate(job.names) if not store.has(name)]
        slots = store.reserve(len(wanted))
        self._targets = dict(zip(wanted, slots, strict=False))
        self._send(len(self._pins))

    def on_computed(self, sequence: EngineSequence) -> None:
        """Save what is complete, and send it."""
        assert self._saving is not None
        saved = self._saving.computed(sequence.num_computed_tokens, complete=sequence.num_generated_tokens > 0)
        self._pins += saved
        self._send(len(self._pins))
        self._worker.touch()

    def _send(self, num_blocks: int) -> None:
        num_wanted = sum(block in self._targets for block in range(self._num_sent, num_blocks))
        self._num_sent = num_blocks
        if num_wanted:
            self._landed_s = self._worker.send(self._job.decode, num_wanted)

    def on_first_token(self, sequence: EngineSequence) -> None:
        """The coordinator is told at the end, which is now."""
        self._worker.prompt_ended(sequence)

    def on_finished(self, sequence: EngineSequence) -> None:
        worker, job = self._worker, self._job
        assert self._saving is not None
        self._saving.close()
        job.token_times_s += sequence.token_times_s
        worker.num_prefilled_tokens += job.request.num_prompt_tokens - job.num_cached_tokens
        worker.prefill_ended()
        worker.loop.at(self._landed_s, self._landed)
        worker.loop.after(worker.hardware.message_s, self._on_first_token)

    def _landed(self) -> None:
        """All that was sent is at the decode worker; what had no slot here did not go."""
        job, target = self._job, self._job.decode
        for block, slot in self._targets.items():
            if block < self._num_sent:
                job.decode_pins.append(target.store.commit(slot, job.names[block]))
            else:
                target.store.release([slot])
        self._worker.store.unpin(self._pins)
        target.touch()
        job.settle()
