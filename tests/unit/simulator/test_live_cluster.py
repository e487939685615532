"""Simulated workers are like running ones: mean times by role, least sizes; what was never measured is no guess."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvrelay.simulator.live_cluster import Asked, NotMeasuredError, like_workers
from kvrelay.step_times.model import StepTimes
from kvrelay.v1 import cluster_pb2, worker_pb2

LAYOUT = cluster_pb2.KvLayout(dtype="bfloat16", num_layers=2, num_kv_heads=3, head_elements=8, block_size_tokens=32)
PROMPTS = StepTimes(prefill_fixed_s=0.1, prefill_token_s=0.01, num_prefills=10)
STEPS = StepTimes(step_fixed_s=0.05, step_request_s=0.002, num_steps=20)


def asked(
    role: cluster_pb2.Role.ValueType, times: StepTimes, *links: float, num_engine_blocks: int = 100, model: str = "m"
) -> Asked:
    info = cluster_pb2.WorkerInfo(
        role=role,
        model=model,
        layout=LAYOUT,
        num_engine_blocks=num_engine_blocks,
        max_running_requests=16,
        max_batched_tokens=256,
    )
    return info, worker_pb2.WorkerStatus(
        step_times=times.to_proto(),
        links=[worker_pb2.LinkSpeed(address="a", bytes_per_s=speed) for speed in links],
        store=worker_pb2.BlockStoreStatus(num_slots=10, slot_bytes=1000),
    )


def test_times_come_from_the_role_and_sizes_from_all() -> None:
    live = like_workers(
        [
            asked(cluster_pb2.ROLE_PREFILL, PROMPTS, 1e9),
            asked(
                cluster_pb2.ROLE_PREFILL,
                replace(PROMPTS, prefill_fixed_s=0.3, num_prefills=30),
                3e9,
                num_engine_blocks=50,
            ),
            asked(cluster_pb2.ROLE_DECODE, replace(STEPS, prefill_fixed_s=9.0, num_prefills=1)),
        ]
    )
    assert live.times.prefill_fixed_s == pytest.approx(0.25)
    assert live.times.prefill_token_s == pytest.approx(0.01)
    assert live.times.step_fixed_s == pytest.approx(0.05)
    assert (live.times.num_prefills, live.times.num_steps) == (40, 20)
    assert (live.engine.max_batched_tokens, live.engine.max_running_requests) == (256, 16)
    assert live.engine.capacity_tokens == 50 * 32
    assert live.hardware.token_bytes == 2 * 3 * 8 * 2
    assert live.hardware.link_bytes_per_s == pytest.approx(2e9)
    assert live.hardware.store_bytes == 10_000
    assert live.hardware.block_tokens == 32


def test_without_prefill_workers_those_that_decode_tell_of_prompts() -> None:
    both = replace(STEPS, prefill_fixed_s=0.4, num_prefills=3)
    assert like_workers([asked(cluster_pb2.ROLE_DECODE, both)]).times.prefill_fixed_s == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("workers", "told"),
    [
        ([], "no worker of the cluster answers"),
        ([(cluster_pb2.WorkerInfo(layout=LAYOUT), None)], "no worker of the cluster answers"),
        ([asked(cluster_pb2.ROLE_BOTH, STEPS), asked(cluster_pb2.ROLE_BOTH, STEPS, model="n")], "several models, m, n"),
        ([asked(cluster_pb2.ROLE_DECODE, STEPS)], "no worker has computed a prompt yet"),
        ([asked(cluster_pb2.ROLE_BOTH, PROMPTS)], "no worker has decoded anything yet"),
    ],
)
def test_what_is_not_measured_is_told(workers: list[Asked], told: str) -> None:
    with pytest.raises(NotMeasuredError, match=told):
        like_workers(workers)
