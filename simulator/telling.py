"""When do simulated workers tell coordinators of their load and their blocks?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kvrelay.simulator.config import ClusterConfig
from kvrelay.simulator.coordinator import SimulatedCoordinator
from kvrelay.simulator.events import EventLoop
from kvrelay.simulator.worker import SimulatedWorker


class Ticker:
    """Calls at most once an interval, at its own beat, as long as somebody asks for it.

    `call` returns whether it wants to be called at the next beat as well.
    """

    def __init__(self, loop: EventLoop, interval_s: float, phase_s: float, call: Callable[[], bool]) -> None:
        self._loop = loop
        self._interval_s = interval_s
        self._phase_s = phase_s
        self._call = call
        self._due = False
        self._last_beat = -1

    def ask(self) -> None:
        """Call at the next beat."""
        if not self._due:
            self._due = True
            beat = math.floor((self._loop.now_s - self._phase_s) / self._interval_s) + 1
            # The quotient of a beat's own time may be rounded down: that beat has been.
            self._last_beat = max(beat, self._last_beat + 1)
            self._loop.at(self._phase_s + self._last_beat * self._interval_s, self._beat)

    def _beat(self) -> None:
        self._due = False
        if self._call():
            self.ask()


def connect(
    worker: SimulatedWorker, coordinators: Sequence[SimulatedCoordinator], config: ClusterConfig, phase: float
) -> None:
    """From now on the worker tells of itself whenever it changes; `phase` of an interval later than others."""
    loop, worker_id = worker.loop, worker.worker_id

    def report() -> bool:
        status = worker.report()
        for coordinator in coordinators:
            loop.after(config.hardware.message_s, coordinator.take_report, worker_id, status)
        return worker.num_jobs > 0

    def publish() -> bool:
        if worker.store.has_changed:
            change = worker.store.take_change()
            for coordinator in coordinators:
                loop.after(config.publish_delay_s, coordinator.take_change, worker_id, change)
        return False

    reports = Ticker(loop, config.report_interval_s, phase * config.report_interval_s, report)
    deltas = Ticker(loop, config.publish_interval_s, phase * config.publish_interval_s, publish)

    def on_touch() -> None:
        reports.ask()
        if worker.store.has_changed:
            deltas.ask()

    worker.listeners.append(on_touch)
