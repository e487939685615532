"""vLLM's worker for GPUs, able to go on for others."""

from __future__ import annotations

from kvrelay.engine.continuing_worker import ContinuingWorker


class ContinuingGPUWorker(ContinuingWorker):
    """Nothing more than that."""
