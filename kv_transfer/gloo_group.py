"""How do bytes go from CPU to CPU? Through gloo, over TCP connections of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
from torch.distributed import ProcessGroupGloo, Store, Work

from kvrelay.kv_transfer.collective_group import CollectiveConfig, Group, GroupError, Staging, Transit

_RUN_TAG, _ABORT_TAG = 0, 1
_AT_ONCE = timedelta(milliseconds=1)


class GlooGroup(Group):
    """Each has an event loop's thread and a worker's thread of gloo's, and a port while it connects."""

    def __init__(self, store: Store, rank: int, host: str, config: CollectiveConfig) -> None:
        """Blocks until the other side does the same. `host`: of this machine, in the other side's network.

        Raises `GroupError`.
        """
        self._other = 1 - rank
        self._deadline = timedelta(seconds=config.deadline_s)
        options = ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=config.open_s)
        options._threads = 1
        try:
            # By default gloo resolves the machine's own name, which may lead nowhere or to loopback.
            device = (
                ProcessGroupGloo.create_device(interface=config.interface)
                if config.interface
                else ProcessGroupGloo.create_device(hostname=host)
            )
            options._devices = [device]
            self._group: ProcessGroupGloo | None = ProcessGroupGloo(store, rank, 2, options)
        except RuntimeError as error:
            raise GroupError(f"no gloo group from {config.interface or host}: {error}") from error

    def staging(self, num_bytes: int) -> Staging:
        return Staging(np.empty(num_bytes, np.uint8))

    def send(self, staging: Staging, num_bytes: int) -> Transit:
        tensor = torch.from_numpy(staging.host[:num_bytes])
        return self._begin("send", lambda group: group.send([tensor], self._other, _RUN_TAG))

    def recv(self, staging: Staging, num_bytes: int) -> Transit:
        tensor = torch.from_numpy(staging.host[:num_bytes])
        return self._begin("receive", lambda group: group.recv([tensor], self._other, _RUN_TAG))

    def _begin(self, what: str, begin: Callable[[ProcessGroupGloo], Work]) -> Transit:
        group = self._group
        if group is None:
            raise GroupError("the group is closed")
        try:
            work = begin(group)
        except RuntimeError as error:
            raise GroupError(f"cannot {what}: {error}") from error

        def wait() -> None:
            try:
                work.wait(self._deadline)
            except RuntimeError as error:
                raise GroupError(f"cannot {what}: {error}") from error

        return wait

    def abort(self) -> None:
        """gloo's own `abort` leaves those waiting who wait; a receive that times out breaks the connection."""
        group = self._group
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.recv([torch.empty(1, dtype=torch.uint8)], self._other, _ABORT_TAG).wait(_AT_ONCE)

    def close(self) -> None:
        self.abort()
        self._group = None
