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

    def remove(self, request_id: str) -> bool:
        """Whether it was there."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return False
        self.num -= entry[0]
        self.num_tokens -= entry[1]
        return True

    def clear(self) -> None:
        self.num = self.num_tokens = 0
        self._entries.clear()


class WorkerLoad:
    """What this coordinator has given to a worker, and what the worker reports of everybody's.

    The load is what this coordinator gave, or what the worker reported with all that it was given here since, whichever
    is more: reports are late, and those of others are known by them alone.
    """

    def __init__(self) -> None:
        self._prompts, self._new_prompts = _Tally(), _Tally()
        self._sequences, self._new_sequences = _Tally(), _Tally()
        self._status = worker_pb2.WorkerStatus()

    @property
    def has_sequences(self) -> bool:
        """Whether some were added here and not removed."""
        return bool(self._sequences)

    def add_prompt(self, request_id: str, num_tokens: int) -> None:
        """A prompt of which so much is to be computed."""
        self._prompts.add(request_id, 1, num_tokens)
        self._new_prompts.add(request_id, 1, num_tokens)

    def remove_prompt(self, request_id: str) -> bool:
        """It is computed, or will not be; returns whether it was there."""
        self._new_prompts.remove(request_id)
        return self._prompts.remove(request_id)

    def add_sequences(self, request_id: str, num_sequences: int, num_tokens: int) -> None:
        """Sequences that are the worker's to generate, with so much context in all."""
        self._sequences.add(request_id, num_sequences, num_tokens)
        self._new_sequences.add(request_id, num_sequences, num_tokens)

    def remove_sequences(self, request_id: str) -> bool:
        """They are over; returns whether they were there."""
        self._new_sequences.remove(request_id)
        return self._sequences.remove(request_id)

    def report(self, status: worker_pb2.WorkerStatus) -> None:
        """Take a worker's report; an empty one forgets the last."""
        self._status = status
        self._new_prompts.clear()
        self._new_sequences.clear()

    def fill(self, view: WorkerView) -> None:
        """Bring the view's figures up to date."""
        status, new_prompts, new_sequences = self._status, self._new_prompts, self._new_sequences
        view.num_queued_prompts = max(self._prompts.num, status.num_queued_prompts + new_prompts.num)
        view.num_queued_prompt_tokens = max(
            self._prompts.num_tokens, status.num_queued_prompt_tokens + new_prompts.num_tokens
        )
        num_in_engine = status.num_running_requests + status.num_waiting_requests - status.num_prefill_jobs
        view.num_running_requests = max(
            self._sequences.num, max(num_in_engine, status.num_decode_jobs) + new_sequences.num
        )
        view.num_context_tokens = max(self._sequences.num_tokens, status.num_context_tokens + new_sequences.num_tokens)
