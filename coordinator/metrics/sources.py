"""What is read at the moment of a scrape, and from whom?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvrelay.coordinator.scheduler.view import WorkerView
from kvrelay.v1 import worker_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """A connected worker: as the scheduler sees it, and the gauges it sent last."""

    view: WorkerView
    status: worker_pb2.WorkerStatus


class IndexFigures(Protocol):
    """What this process's copy of the prefix index holds, and how well it follows etcd."""

    @property
    def num_entries(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_speculated(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def lag_s(self) -> float: ...
    @property
    def num_rebuilds(self) -> int: ...
    @property
    def num_etcd_keys(self) -> int: ...
    @property
    def etcd_bytes(self) -> int: ...
    @property
    def num_writes(self) -> int: ...
    @property
    def writes_per_s(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Each is called once per scrape, in the event loop."""

    workers: Callable[[], Sequence[WorkerReport]]
    is_leader: Callable[[], bool] = lambda: False
    """Whether it does the cluster's chores."""
    queue_depth: Callable[[], int] = lambda: 0
    """Requests that are admitted and wait for their turn."""
    index: Callable[[], IndexFigures | None] = lambda: None
