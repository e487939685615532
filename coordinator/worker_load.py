"""How much does a worker have to do, whichever coordinators gave it?"""

from __future__ import annotations

from kvrelay.coordinator.scheduler.view import WorkerView
from kvrelay.v1 import worker_pb2


class _Tally:
    """Work by request id, and its sums."""

    def __init__(self) -> None:
        self.num = 0
        self.num_tokens = 0
        self._entries: dict[str, tuple[int, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._entries)

    def add(self, request_id: str, num: int, num_tokens: int) -> None:
        self.remove(request_id)
        self._entries[request_id] = num, num_tokens
        self.num += num
        self.num_tokens += num_tokens

    def remove(self, request_id: str) -> tuple[int, int] | None:
        """How many it was, and their tokens; None when it was not there."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self.num -= entry[0]
            self.num_tokens -= entry[1]
        return entry

    def get(self, request_id: str) -> tuple[int, int] | None:
        """How many, and their tokens; None when it is not there."""
        return self._entries.get(request_id)


class WorkerLoad:
    """What this coordinator has given to a worker, and what the worker reports of everybody's.

    What was given here is known at once, and so is that it ended. The rest is as late as the reports: what is above the
    own is what others gave, and how far the prompts are that the worker computes.
    """

    def __init__(self) -> None:
        self._prompts = _Tally()
        self._sequences, self._sent_sequences = _Tally(), _Tally()
        self._num_others_prompts = 0
        self._num_others_tokens = 0
        self._num_computed_tokens = 0
        """Of the prompts that have not ended."""
        self._num_others_sequences = 0
        self._num_others_context_tokens = 0
        """What own sequences have generated is in here, too."""

    @property
    def has_sequences(self) -> bool:
        """Whether some were added here and not removed."""
        return bool(self._sequences)

    def add_prompt(self, request_id: str, num_tokens: int) -> None:
        """A prompt of which so much is to be computed."""
        self._prompts.add(request_id, 1, num_tokens)

    def remove_prompt(self, request_id: str) -> bool:
        """It is computed, or will not be; returns whether it was there."""
        entry = self._prompts.remove(request_id)
        if entry is None:
            return False
        self._num_computed_tokens = max(0, self._num_computed_tokens - entry[1])
        return True

    def add_sequences(self, request_id: str, num_sequences: int, num_tokens: int) -> None:
        """Sequences that are the worker's to generate, with so much context in all."""
        self._sequences.add(request_id, num_sequences, num_tokens)

    def sent_sequences(self, request_id: str) -> None:
        """The worker has them, and reports them from now on; before, their prompt is computed elsewhere."""
        if entry := self._sequences.get(request_id):
            self._sent_sequences.add(request_id, *entry)

    def remove_sequences(self, request_id: str) -> bool:
        """They are over; returns whether they were there."""
        self._sent_sequences.remove(request_id)
        return self._sequences.remove(request_id) is not None

    def report(self, status: worker_pb2.WorkerStatus) -> None:
        """Take a worker's report; an empty one forgets the last."""
        prompts, sent = self._prompts, self._sent_sequences
        self._num_others_tokens = max(0, status.num_queued_prompt_tokens - prompts.num_tokens)
        self._num_computed_tokens = status.num_computed_prompt_tokens
        self._num_others_prompts = max(0, status.num_queued_prompts - prompts.num)
        num_in_engine = status.num_running_requests + status.num_waiting_requests - status.num_prefill_jobs
        self._num_others_sequences = max(0, num_in_engine - sent.num, status.num_decode_jobs - sent.num)
        self._num_others_context_tokens = max(0, status.num_context_tokens - sent.num_tokens)

    def fill(self, view: WorkerView) -> None:
        """Bring the view's figures up to date."""
        prompts, sequences = self._prompts, self._sequences
        view.num_queued_prompts = prompts.num + self._num_others_prompts
        num_tokens = prompts.num_tokens + self._num_others_tokens
        view.num_queued_prompt_tokens = max(0, num_tokens - self._num_computed_tokens)
        view.num_running_requests = sequences.num + self._num_others_sequences
        view.num_context_tokens = sequences.num_tokens + self._num_others_context_tokens
