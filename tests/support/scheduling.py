"""Workers and requests as the scheduler sees them."""

from __future__ import annotations

from typing import Any

from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView
from kvrelay.step_times.model import StepTimes
from kvrelay.v1 import cluster_pb2

PREFILL, DECODE, BOTH = cluster_pb2.ROLE_PREFILL, cluster_pb2.ROLE_DECODE, cluster_pb2.ROLE_BOTH
BLOCK_SIZE_TOKENS = 32
TIMES = StepTimes(prefill_fixed_s=0.01, prefill_token_s=1e-4, step_fixed_s=0.02, step_request_s=1e-4)


def view(worker_id: str, role: cluster_pb2.Role.ValueType, **values: Any) -> WorkerView:
    defaults: dict[str, Any] = {
        "model": "m",
        "address": f"{worker_id}:1",
        "fingerprint": b"f",
        "block_size_tokens": BLOCK_SIZE_TOKENS,
        "max_model_len_tokens": 100_000,
        "times": TIMES,
    }
    return WorkerView(worker_id=worker_id, role=role, **(defaults | values))


def shape(num_prompt_tokens: int = 100, **values: Any) -> RequestShape:
    return RequestShape(num_prompt_tokens=num_prompt_tokens, **({"model": "m"} | values))
