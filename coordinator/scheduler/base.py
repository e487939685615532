"""The contract of a scheduling policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from kvrelay.coordinator.scheduler.decision import Decision
from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView


class Scheduler(ABC):
    """Chooses the workers of each request. No I/O, no clock; what is random comes from a seed.

    The coordinator, the simulator and tests run the same code.
    """

    name: ClassVar[str]
    """As on the command line."""
    may_prefill_locally = False
    """Whether a decode worker may be chosen to compute a prompt although there are prefill workers."""

    @abstractmethod
    def plan(self, request: RequestShape, workers: Sequence[WorkerView]) -> Decision:
        """Choose among `workers`, which may serve other models, drain or have other KV layouts.

        The caller accounts for the request in the views afterwards. Raises `NoWorkersError`, `InvalidRequestError`
        when the prompt is too long for every worker, and, where the policy looks at targets, `OverloadedError` when no
        plan meets the request's `ttft_s`, with the seconds after which another attempt makes sense (`retry_after_s`).
        """
