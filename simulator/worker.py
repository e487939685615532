"""What is a simulated worker? A host block store and an engine, and what it tells of both."""

from __future__ import annotations

from collections.abc import Callable

from kvrelay.simulator.config import Hardware
from kvrelay.simulator.decode_run import DecodeRun
from kvrelay.simulator.engine import SimulatedEngine
from kvrelay.simulator.events import EventLoop
from kvrelay.simulator.host_store import HostStore
from kvrelay.simulator.job import Job
from kvrelay.simulator.links import Links
from kvrelay.simulator.prefill_run import PrefillRun
from kvrelay.simulator.sequence import EngineSequence
from kvrelay.v1 import cluster_pb2, worker_pb2


class SimulatedWorker:
    """Prefills and decodes; the role is what coordinators make of it. The rules are those of `kvrelay.worker`."""

    def __init__(
        self,
        worker_id: str,
        role: cluster_pb2.Role.ValueType,
        loop: EventLoop,
        hardware: Hardware,
        parts: tuple[HostStore, SimulatedEngine, Links],
    ) -> None:
        self.worker_id = worker_id
        self.role = role
        self.loop = loop
        self.hardware = hardware
        self.store, self.engine, self._links = parts
        self.num_prefilled_tokens = 0
        """Prompt tokens that it has computed."""
        self._num_prefill_jobs = 0
        self._num_decode_jobs = 0
        self._num_queued_prompts = 0
        """That have no token yet."""
        self._num_queued_tokens = 0
        """Of these, what is not stored."""
        self.listeners: list[Callable[[], None]] = []
        """Called when load or store may have changed."""
        self.engine.on_change = self.touch

    @property
    def role_name(self) -> str:
        """As on the command line."""
        return cluster_pb2.Role.Name(self.role).removeprefix("ROLE_").lower()

    @property
    def num_jobs(self) -> int:
        return self._num_prefill_jobs + self._num_decode_jobs

    def touch(self) -> None:
        """Load or store may have changed."""
        for listener in self.listeners:
            listener()

    def prefill(self, job: Job, on_first_token: Callable[[], None]) -> None:
        """Compute a prompt for the job's decode worker."""
        self._num_prefill_jobs += 1
        PrefillRun(self, job, on_first_token).start()
        self.touch()

    def decode(self, job: Job, on_first_token: Callable[[], None], on_finished: Callable[[], None]) -> None:
        """Generate once the blocks that are coming are there; compute what is missing.

        `on_first_token` is called when the prompt was computed here.
        """
        self._num_decode_jobs += 1
        job.when_settled(DecodeRun(self, job, on_first_token, on_finished).start)
        self.touch()

    def let_go(self, job: Job) -> None:
        """Nothing is to be generated from the blocks that have come for a job."""
        self.store.unpin(job.decode_pins)
        job.decode_pins = []

    def prompt_ended(self, sequence: EngineSequence) -> None:
        """It has its first token."""
        self._num_queued_prompts -= 1
        self._num_queued_tokens -= sequence.num_queued_tokens

    def prefill_ended(self) -> None:
        self._num_prefill_jobs -= 1
        self.touch()

    def decode_ended(self) -> None:
        self._num_decode_jobs -= 1
        self.touch()

    def look_up(self, job: Job, call: Callable[[list[int]], None]) -> None:
        """Call with the slots of the prompt's prefix that are stored, pinned once.

        What the source has more is fetched before.
        """
        pins = self.store.pin_prefix(job.names)
        source, job.source = job.source, None
        if source is None:
            call(pins)
            return
        held = source.store.pin_prefix(job.names)
        reserved = self.store.reserve(max(0, len(held) - len(pins)))
        end = len(pins) + len(reserved)
        source.store.unpin(held[: len(pins)] + held[end:])

        def fetched() -> None:
            source.store.unpin(held[len(pins) : end])
            names = job.names[len(pins) : end]
            call(pins + [self.store.commit(slot, name) for slot, name in zip(reserved, names, strict=True)])

        self.loop.at(source.send(self, len(reserved)) + self.hardware.message_s, fetched)

    def num_cached_tokens(self, job: Job, num_blocks: int, num_sampled: int = 0) -> int:
        """Of a prompt of which so many blocks are stored; the last token, sampled or not, is always computed."""
        num_prompt_tokens = job.request.num_prompt_tokens
        return min(num_blocks * self.hardware.block_tokens, num_prompt_tokens, num_prompt_tokens + num_sampled - 1)

    def submit(self, sequence: EngineSequence) -> None:
        """Let it wait for the engine, which loads what is stored of it when it begins, as vLLM does."""
        sequence.num_queued_tokens = sequence.num_uncomputed_tokens - 1
        self._num_queued_prompts += 1
        self._num_queued_tokens += sequence.num_queued_tokens
        sequence.load_s = sequence.num_computed_tokens * self.hardware.token_bytes / self.hardware.load_bytes_per_s
        self.engine.submit(sequence)

    def send(self, target: SimulatedWorker, num_blocks: int) -> float:
        """Put blocks on their way; returns when they are there."""
        num_bytes = num_blocks * self.hardware.block_tokens * self.hardware.token_bytes
        return self._links.send(self.worker_id, target.worker_id, num_bytes, self.loop.now_s)

    def report(self) -> worker_pb2.WorkerStatus:
        """Of a worker's status, what coordinators read of its load."""
        engine = self.engine
        return worker_pb2.WorkerStatus(
            num_queued_prompts=self._num_queued_prompts,
            num_queued_prompt_tokens=self._num_queued_tokens,
            num_computed_prompt_tokens=engine.num_computed_prompt_tokens,
            num_prefill_jobs=self._num_prefill_jobs,
            num_decode_jobs=self._num_decode_jobs,
            num_context_tokens=engine.num_context_tokens,
        )
