"""vLLM's worker for CPUs, able to go on for others, and to serve seeded prompts that take several engine steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from vllm.v1.worker.cpu_worker import CPUWorker

from kvrelay.engine.continuing_worker import ContinuingWorker

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput
    from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput


class ContinuingCPUWorker(ContinuingWorker, CPUWorker):
    """vLLM draws a token after every chunk of a prompt, drops all but the last, and turns the request's generator back
    each time (vllm/v1/worker/gpu_model_runner.py, `_bookkeeping_sync`). Generators on a CPU cannot be turned back: that
    ends the engine. So what will be dropped is drawn without the request's generator.
    """

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        runner = self.model_runner
        generators = runner.input_batch.generators
        dropped = np.flatnonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])
        withheld = {row: generators.pop(row) for row in dropped.tolist() if row in generators}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            generators.update(withheld)
