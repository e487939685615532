"""Which workers does a simulated cluster have, and what do coordinators know of them at first?"""

from __future__ import annotations

from collections.abc import Sequence

from kvrelay.coordinator.scheduler.view import WorkerView
from kvrelay.simulator.config import ClusterConfig
from kvrelay.simulator.engine import SimulatedEngine
from kvrelay.simulator.events import EventLoop
from kvrelay.simulator.host_store import HostStore
from kvrelay.simulator.links import Links
from kvrelay.simulator.timing import TimeModel
from kvrelay.simulator.worker import SimulatedWorker
from kvrelay.step_times.model import StepTimes
from kvrelay.v1 import cluster_pb2
from kvrelay.workload.trace import TraceRequest


def make_workers(
    loop: EventLoop, config: ClusterConfig, times: TimeModel, requests: Sequence[TraceRequest]
) -> list[SimulatedWorker]:
    """Idle and empty ones. Their stores have at most the slots that these requests need, all of them together."""
    num_slots = min(config.hardware.num_store_blocks, _num_blocks(requests, config.hardware.block_tokens))
    links = Links(config.hardware.link_bytes_per_s)
    roles = (
        ("prefill", cluster_pb2.ROLE_PREFILL, config.num_prefill),
        ("decode", cluster_pb2.ROLE_DECODE, config.num_decode),
        ("both", cluster_pb2.ROLE_BOTH, config.num_both),
    )
    return [
        SimulatedWorker(
            f"{name}-{number}",
            role,
            loop,
            config.hardware,
            (HostStore(num_slots), SimulatedEngine(loop, times, config.engine), links),
        )
        for name, role, num_workers in roles
        for number in range(num_workers)
    ]


def _num_blocks(requests: Sequence[TraceRequest], block_tokens: int) -> int:
    """Of prompts and answers, as if they shared none."""
    return sum((each.num_prompt_tokens + each.num_output_tokens) // block_tokens + 1 for each in requests)


def make_views(workers: Sequence[SimulatedWorker], config: ClusterConfig, believed: StepTimes) -> list[WorkerView]:
    """For one coordinator, which changes them. Links are known as if they had been measured."""
    links = {worker.worker_id: config.hardware.link_bytes_per_s for worker in workers}
    return [
        WorkerView(
            worker_id=worker.worker_id,
            role=worker.role,
            model="",
            address=worker.worker_id,
            fingerprint=b"",
            block_size_tokens=config.hardware.block_tokens,
            max_model_len_tokens=config.engine.capacity_tokens,
            token_bytes=config.hardware.token_bytes,
            capacity_tokens=config.engine.capacity_tokens,
            max_running_requests=config.engine.max_running_requests,
            times=believed,
            link_bytes_per_s=links,
        )
        for worker in workers
    ]
