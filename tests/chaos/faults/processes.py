"""Processes that are killed, told to stop, or stand still for a while."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import time

from tests.chaos.faults.base import Lab, MemberFault, wait_back
from tests.chaos.load import Answer
from tests.chaos.members import COORDINATORS, DECODE, ETCD, PREFILL
from tests.chaos.streams import streams_on


class End(MemberFault):
    """A signal that ends it."""

    number: signal.Signals
    _start = 0

    async def inject(self, lab: Lab) -> None:
        await lab.cluster.wait_running(self.target)
        self._start = lab.cluster.expect_end(self.target)
        await lab.cluster.signal(self.target, self.number)

    async def heal(self, lab: Lab) -> None:
        if self._start:
            await wait_back(lab.cluster, self.target, self._start)


class Kill(End):
    """SIGKILL."""

    number = signal.SIGKILL


class KillPrefill(Kill):
    name, members = "kill-prefill", PREFILL


class KillDecode(Kill):
    """Notes which streams the worker had."""

    name, members = "kill-decode", DECODE

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.streams: list[Answer] = []
        self.killed_s = math.inf

    async def inject(self, lab: Lab) -> None:
        self.streams = await streams_on(lab.cluster, lab.load, self.target)
        self.killed_s = time.monotonic()
        await super().inject(lab)


class KillCoordinator(Kill):
    name, members = "kill-coordinator", COORDINATORS


class KillEtcd(Kill):
    name, members = "kill-etcd", (ETCD,)


class Drain(End):
    """SIGTERM: it finishes what it has and leaves."""

    number = signal.SIGTERM


class DrainPrefill(Drain):
    name, members = "drain-prefill", PREFILL


class DrainDecode(Drain):
    name, members = "drain-decode", DECODE


class DrainCoordinator(Drain):
    name, members = "drain-coordinator", COORDINATORS


class Stop(MemberFault):
    """SIGSTOP, and SIGCONT later."""

    longest_s = 8.0

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.hold_s = rng.uniform(1.0, self.longest_s)
        self._pid = 0

    async def inject(self, lab: Lab) -> None:
        self._pid = await lab.cluster.signal(self.target, signal.SIGSTOP)

    async def heal(self, lab: Lab) -> None:
        if self._pid and lab.cluster.pid_of(self.target) == self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGCONT)


class StopPrefill(Stop):
    name, members = "stop-prefill", PREFILL


class StopDecode(Stop):
    name, members = "stop-decode", DECODE


class StopCoordinator(Stop):
    name, members = "stop-coordinator", COORDINATORS


class StopEtcd(Stop):
    """For longer than leases live."""

    name, members = "stop-etcd", (ETCD,)

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.hold_s = 10.0
