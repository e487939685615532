"""Which requests compute how many tokens in the next simulated step? vLLM's rules, without I/O."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvrelay.engine.base import EngineRequest
from kvrelay.engine.simulated_model import SimulatedConfig, TokenChain


@dataclass(slots=True, eq=False)
class SequenceState:
    """One request inside the engine."""

    request: EngineRequest
    chain: TokenChain
    order: tuple[int, int]
    """Priority, then arrival: the smallest is served first."""
    num_prompt_tokens: int
    num_tokens: int
    """Prompt and generated."""
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_saved_blocks: int = 0
    """Blocks in slots, loaded ones included."""
    saving: bool = True
    num_engine_blocks: int = 0
    loaded: bool = False
    """A preempted sequence computes what it loaded the first time: its slots may be gone."""
    over: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What one step does for one sequence."""

    sequence: SequenceState
    num_tokens: int
    """Tokens computed, those from slots not counted."""
    load: bool
    """The sequence's slots are read before."""


class Batch:
    """Waiting and running sequences, and the engine's own KV blocks they hold.

    Running sequences come first, in their order; then waiting ones are admitted while tokens, sequences and
    blocks last. When blocks run out, the last running sequence is preempted: it loses its blocks and waits
    to compute them again.
    """

    def __init__(self, config: SimulatedConfig) -> None:
        self._config = config
        self._free_blocks = config.num_engine_blocks
        self._num_added = 0
        self._waiting: list[SequenceState] = []
        self._running: list[SequenceState] = []

    def __iter__(self) -> Iterator[SequenceState]:
        yield from self._running
        yield from self._waiting

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the engine's blocks in use, 0..1."""
        return 1.0 - self._free_blocks / self._config.num_engine_blocks

    def add(self, request: EngineRequest) -> SequenceState:
        """Let a request wait for its turn."""
        num_tokens = len(request.prompt_token_ids)
        sequence = SequenceState(
            request=request,
            chain=TokenChain(self._config, request.prompt_token_ids),
            order=(request.priority, self._num_added),
            num_prompt_tokens=num_tokens,
            num_tokens=num_tokens,
            num_saved_blocks=request.kv.first_save,
        )
        self._num_added += 1
        bisect.insort(self._waiting, sequence, key=_order)
        return sequence

    def remove(self, sequence: SequenceState) -> None:
        """Forget a sequence and free its blocks."""
        (self._running if sequence in self._running else self._waiting).remove(sequence)
        self._free(sequence)
        sequence.over = True

    def schedule(self) -> list[Work]:
        """Choose the next step's work and take the blocks it needs; empty when nothing waits or runs."""
        budget = self._config.max_batched_tokens
        step: list[Work] = []
        preempted = False
        index = 0
        while index < len(self._running) and budget:
            sequence = self._running[index]
            num_tokens = min(budget, sequence.num_tokens - sequence.num_computed_tokens)
            while not self._grow(sequence, sequence.num_computed_tokens + num_tokens):
                preempted = True
                self._preempt(self._running[-1])
                if index == len(self._running):
                    break
            else:
                step.append(Work(sequence, num_tokens, load=False))
                budget -= num_tokens
                index += 1
        while budget and not preempted and self._waiting and len(self._running) < self._config.max_num_seqs:
            work = self._admit(self._waiting[0], budget)
            if work is None:
                break
            step.append(work)
            budget -= work.num_tokens
        return step

    def _admit(self, sequence: SequenceState, budget: int) -> Work | None:
        load = not sequence.loaded and len(sequence.request.kv.load) > 0
        num_loaded = sequence.request.kv.load_tokens if load else 0
        num_tokens = min(budget, sequence.num_tokens - num_loaded)
        if not self._grow(sequence, num_loaded + num_tokens):
            return None
        self._waiting.pop(0)
        self._running.append(sequence)
        if load:
            sequence.loaded = True
            sequence.num_computed_tokens = num_loaded
        return Work(sequence, num_tokens, load)

    def _grow(self, sequence: SequenceState, num_tokens: int) -> bool:
        missing = -(-num_tokens // self._config.block_size_tokens) - sequence.num_engine_blocks
        if missing > self._free_blocks:
            return False
        self._free_blocks -= max(0, missing)
        sequence.num_engine_blocks += max(0, missing)
        return True

    def _preempt(self, sequence: SequenceState) -> None:
        self._running.remove(sequence)
        self._free(sequence)
        sequence.num_computed_tokens = 0
        bisect.insort(self._waiting, sequence, key=_order)

    def _free(self, sequence: SequenceState) -> None:
        self._free_blocks += sequence.num_engine_blocks
        sequence.num_engine_blocks = 0


def _order(sequence: SequenceState) -> tuple[int, int]:
    return sequence.order
