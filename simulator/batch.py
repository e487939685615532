"""Which sequences compute how many tokens in the next step of a simulated engine? The rules of vLLM."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kvrelay.simulator.config import EngineLimits
from kvrelay.simulator.sequence import EngineSequence
from kvrelay.simulator.timing import Chunk


@dataclass(slots=True)
class Step:
    """The prompts that a step computes, and how much of each; every decoding sequence gets a token besides."""

    num_free_tokens: int = 0
    """What the step could still compute."""
    prompts: list[tuple[EngineSequence, int]] = field(default_factory=list)
    load_s: float = 0.0
    """For what is loaded before it, of sequences that begin."""

    def add(self, sequence: EngineSequence) -> None:
        """As much of a prompt as the step has room for."""
        num_tokens = min(self.num_free_tokens, sequence.num_uncomputed_tokens)
        if num_tokens > 0:
            self.num_free_tokens -= num_tokens
            self.prompts.append((sequence, num_tokens))

    def chunks(self) -> list[Chunk]:
        return [
            Chunk(num_tokens, sequence.num_computed_tokens, num_tokens == sequence.num_uncomputed_tokens)
            for sequence, num_tokens in self.prompts
        ]


class Batch:
    """Waiting and running sequences, and room for their KV.

    Sequences that decode come first, then prompts begun, then waiting ones in the order they came, while the step has
    tokens and the engine has room. A prompt takes room for all its tokens when it begins. When running sequences need
    more room for their next tokens than is left, the last one that decodes is preempted: it waits in front of all
    others and computes everything again. A sequence that lacks one token only is computed like one that decodes.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self.waiting: deque[EngineSequence] = deque()
        self.prefilling: list[EngineSequence] = []
        self.decoding: list[EngineSequence] = []
        self.free_tokens = limits.capacity_tokens
        self.num_decoding_tokens = 0
        """Context of the sequences that decode."""
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    @property
    def num_context_tokens(self) -> int:
        """Of all that run."""
        return self._limits.capacity_tokens - self.free_tokens

    @property
    def num_computed_prompt_tokens(self) -> int:
        """Of prompts that have no token yet, since they were submitted."""
        return sum(s.num_queued_tokens - s.num_uncomputed_tokens + 1 for s in self.prefilling if not s.token_times_s)

    def can_admit(self) -> bool:
        """Whether the first waiting sequence has room, and everybody who runs for one more token."""
        return bool(
            self.waiting
            and self.num_running < self._limits.max_running_requests
            and self.waiting[0].num_tokens < self.free_tokens - self.num_running
        )

    def make_room(self) -> bool:
        """Preempt until all that run have room for one more token; returns whether none had to be."""
        num_preemptions = self.num_preemptions
        while self.decoding and self.free_tokens < self.num_running:
            sequence = self.decoding.pop()
            self.num_decoding_tokens -= sequence.num_tokens
            self.free_tokens += sequence.num_tokens
            sequence.num_computed_tokens = 0
            self.waiting.appendleft(sequence)
            self.num_preemptions += 1
        return self.num_preemptions == num_preemptions

    def next_step(self, *, admit: bool) -> Step:
        """The prompts of the next step; admits waiting sequences if it may."""
        step = Step(self._limits.max_batched_tokens - len(self.decoding))
        for sequence in self.prefilling:
            step.add(sequence)
        while admit and step.num_free_tokens and self.can_admit():
            sequence = self.waiting.popleft()
            self.free_tokens -= sequence.num_tokens
            if not sequence.started:
                sequence.started = True
                step.load_s += sequence.load_s
                sequence.listener.on_started(sequence)
            if sequence.num_uncomputed_tokens <= 1:
                self._decode(sequence)
                step.num_free_tokens -= 1
            else:
                self.prefilling.append(sequence)
                step.add(sequence)
        return step

    def num_steps_ahead(self) -> int:
        """How many steps the decoding sequences go on together, before one is done or room is short; at least 1."""
        shortest = min(sequence.num_missing_tokens for sequence in self.decoding)
        return max(1, min(shortest, self.free_tokens // self.num_running))

    def computed(self, sequence: EngineSequence, num_tokens: int) -> bool:
        """So much more of a prompt is computed; returns whether that was the rest, and a token was sampled."""
        sequence.num_computed_tokens += num_tokens
        if sequence.num_uncomputed_tokens:
            return False
        self.prefilling.remove(sequence)
        sequence.num_generated_tokens += 1
        self.free_tokens -= 1
        self._decode(sequence)
        return True

    def generated(self, num_sequences: int, num_steps: int) -> None:
        """The first `num_sequences` that decode have got so many tokens each."""
        for sequence in self.decoding[:num_sequences]:
            sequence.num_generated_tokens += num_steps
            sequence.num_computed_tokens = sequence.num_tokens - 1
        self.free_tokens -= num_sequences * num_steps
        self.num_decoding_tokens += num_sequences * num_steps

    def take_finished(self) -> list[EngineSequence]:
        """Forget those that have all their tokens."""
        finished = [sequence for sequence in self.decoding if sequence.num_missing_tokens <= 0]
        if finished:
            self.decoding = [sequence for sequence in self.decoding if sequence.num_missing_tokens > 0]
            num_tokens = sum(sequence.num_tokens for sequence in finished)
            self.num_decoding_tokens -= num_tokens
            self.free_tokens += num_tokens
        return finished

    def _decode(self, sequence: EngineSequence) -> None:
        self.decoding.append(sequence)
        self.num_decoding_tokens += sequence.num_tokens
