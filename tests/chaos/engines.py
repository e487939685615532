"""Which engine do the workers under test run?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TestedEngine:
    """An engine and what it is given."""

    name: str
    worker_options: Sequence[str]
    engine_options: Sequence[str]
    start_timeout_s: float
    """For all members together."""
    heartbeat_timeout_s: float = 2.0
    is_model_known: bool
    """Whether `RequestPlan.expected` can tell what comes; otherwise the cluster is asked before anything is broken."""

    def environment(self, worker: int) -> Mapping[str, str]:
        """Of the worker with this number."""
        if self.name == "simulated":
            return {}
        # Engines that share cores without knowing it take many times as long.
        return {"VLLM_CPU_OMP_THREADS_BIND": str(worker % 2), "VLLM_CPU_KVCACHE_SPACE": "1"}


SIMULATED = TestedEngine(
    name="simulated",
    worker_options=("--engine", "simulated", "--kv-host-bytes", str(16 << 20)),
    engine_options=("--decode-step-s", "0.02", "--layer-groups", "4"),
    start_timeout_s=120.0,
    is_model_known=True,
)
"""Its store holds far less than the prompts of a run, so that blocks are evicted all the time."""
VLLM = TestedEngine(
    name="vllm",
    worker_options=("--kv-host-bytes", str(64 << 20)),
    engine_options=("--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16"),
    start_timeout_s=400.0,
    heartbeat_timeout_s=5.0,
    is_model_known=False,
)
"""In float32, where what is generated does not depend on what else is in the batch. Four of them on two cores leave the
processes beside them without a core for seconds."""
ENGINES = {engine.name: engine for engine in (SIMULATED, VLLM)}
