"""What do vLLM's workers get so that their samplers can go on for others?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from kvrelay.engine.continuations import Continuations

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class ContinuingWorker(Worker):  # type: ignore[misc]
    """vLLM's worker for GPUs, or with another one behind it in the order of resolution, that one."""

    _continuations: Continuations | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        # vLLM's second model runner draws by seed and place in the sequence, and keeps its accounts in another way.
        if isinstance(self.model_runner, GPUModelRunner):
            self._continuations = Continuations(self.model_runner)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        output = super().execute_model(scheduler_output)
        if self._continuations is not None:
            self._continuations.follow(scheduler_output)
        return output
