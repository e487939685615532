"""Does a worker idle while a request waits, at another one of its role or in a coordinator?"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from kvrelay.simulator.worker import SimulatedWorker


@dataclass(slots=True)
class _Group:
    """The workers of one role."""

    num_workers: int = 0
    num_idle: int = 0
    num_waiting: int = 0
    since_s: float = 0.0
    idle_while_waiting_s: float = 0.0

    def change(self, now_s: float, idle: int, waiting: int) -> None:
        """So many more of them are idle, so many more requests wait."""
        self.idle_while_waiting_s += (now_s - self.since_s) * min(self.num_idle, self.num_waiting)
        self.since_s = now_s
        self.num_idle += idle
        self.num_waiting += waiting


class Balance:
    """Sums up the worker-seconds in which a worker was idle and a request waited to begin at another one of its role.

    Idle is who has no request, not who waits for the blocks of one. As many idle workers count at a time as requests
    wait. Those that wait in a coordinator wait for the workers whose role is to compute prompts.
    """

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = defaultdict(_Group)

    def follow(self, worker: SimulatedWorker) -> None:
        """A worker that is idle yet."""
        group, engine = self._groups[worker.role_name], worker.engine
        group.num_workers += 1
        group.num_idle += 1
        was_idle, num_waited = True, 0

        def on_touch() -> None:
            nonlocal was_idle, num_waited
            is_idle, num_waiting = not worker.num_jobs, engine.num_waiting
            if (is_idle, num_waiting) != (was_idle, num_waited):
                group.change(worker.loop.now_s, is_idle - was_idle, num_waiting - num_waited)
                was_idle, num_waited = is_idle, num_waiting

        worker.listeners.append(on_touch)

    def queued(self, now_s: float, change: int) -> None:
        """So many more requests wait in coordinators."""
        for role in ("prefill", "both", "decode"):
            if role in self._groups:
                self._groups[role].change(now_s, 0, change)
                break

    def idle_while_waiting(self, duration_s: float) -> dict[str, float]:
        """Role -> share of its workers' time."""
        return {
            role: group.idle_while_waiting_s / (group.num_workers * duration_s) if duration_s > 0 else 0.0
            for role, group in self._groups.items()
        }
