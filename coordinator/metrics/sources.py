"""What is read at the moment of a scrape, and from whom?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvrelay.coordinator.scheduler.view import WorkerView
from kvrelay.v1 import worker_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """A connected worker: as the scheduler sees it, and the gauges it sent last."""

    view: WorkerView
    status: worker_pb2.WorkerStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexReport:
    """This process's copy of the prefix index, and what etcd has of it."""

    num_entries: int
    """Pairs of a block and a worker that has it."""
    num_blocks: int
    lag_s: float
    """Age of the newest delta when it was applied."""
    num_rebuilds: int
    etcd_bytes: int
    """Keys and values."""
    num_writes: int
    """Of all workers to etcd, since the process began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Each is called once per scrape, in the event loop."""

    workers: Callable[[], Sequence[WorkerReport]]
    is_leader: Callable[[], bool] = lambda: False
    """Whether it does the cluster's chores."""
    queue_depth: Callable[[], int] = lambda: 0
    """Requests that are admitted and wait for their turn."""
    index: Callable[[], IndexReport | None] = lambda: None
