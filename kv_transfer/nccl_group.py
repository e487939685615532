"""How do bytes go from GPU to GPU? Through NCCL, from pinned host memory over a staging buffer on the device."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch.distributed import ProcessGroupNCCL, Store

from kvrelay.kv_transfer.collective_group import SENDER_RANK, CollectiveConfig, Group, GroupError, Staging, Transit

_POLL_S = 0.0001
_ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
"""A group's watchdog would otherwise end the process when its peer does."""
_environment_lock = threading.Lock()


class NcclGroup(Group):
    """Copies and transfers are ordered by a side stream; the host waits for events and nothing else."""

    def __init__(self, store: Store, rank: int, config: CollectiveConfig) -> None:
        """Blocks until the other side does the same. Raises `GroupError`."""
        self._other = 1 - rank
        self._deadline_s = config.deadline_s
        self._device = torch.device("cuda", 0)
        self._group: ProcessGroupNCCL | None = None
        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=config.open_s)
        try:
            self._stream = torch.cuda.Stream(self._device)
            with _environment():
                self._group = ProcessGroupNCCL(store, rank, 2, options)
            # NCCL connects with the first message.
            first = self.staging(1)
            (self.send if rank == SENDER_RANK else self.recv)(first, 1)()
        except (RuntimeError, GroupError) as error:
            self.abort()
            raise GroupError(f"no NCCL group: {error}") from error

    def staging(self, num_bytes: int) -> Staging:
        try:
            pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            return Staging(pinned.numpy(), torch.empty(num_bytes, dtype=torch.uint8, device=self._device), pinned)
        except RuntimeError as error:
            raise GroupError(f"no {num_bytes} bytes of pinned memory and of the GPU's: {error}") from error

    def send(self, staging: Staging, num_bytes: int) -> Transit:
        group = self._open_group()
        try:
            with torch.cuda.stream(self._stream):
                staging.device[:num_bytes].copy_(staging.pinned[:num_bytes], non_blocking=True)
                group.send([staging.device[:num_bytes]], self._other, 0).wait()
                return self._until_reached("send")
        except RuntimeError as error:
            raise GroupError(f"cannot send: {error}") from error

    def recv(self, staging: Staging, num_bytes: int) -> Transit:
        group = self._open_group()
        try:
            with torch.cuda.stream(self._stream):
                group.recv([staging.device[:num_bytes]], self._other, 0).wait()
                staging.pinned[:num_bytes].copy_(staging.device[:num_bytes], non_blocking=True)
                return self._until_reached("receive")
        except RuntimeError as error:
            raise GroupError(f"cannot receive: {error}") from error

    def _open_group(self) -> ProcessGroupNCCL:
        if self._group is None:
            raise GroupError("the group is closed")
        return self._group

    def _until_reached(self, what: str) -> Transit:
        """Waits until the stream has done everything up to here; `wait` of the work only orders the stream."""
        event = torch.cuda.Event()
        event.record(self._stream)

        def wait() -> None:
            end_s = time.monotonic() + self._deadline_s
            try:
                while not event.query():
                    if self._group is None or time.monotonic() > end_s:
                        raise GroupError(f"cannot {what}: not within {self._deadline_s} s, or the group was aborted")
                    time.sleep(_POLL_S)
            except RuntimeError as error:  # The device's own, of anything that ran in the stream.
                raise GroupError(f"cannot {what}: {error}") from error

        return wait

    def abort(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()

    def close(self) -> None:
        self.abort()


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """A process group reads its settings when it is made; the engine's own groups keep theirs."""
    with _environment_lock:
        before = {name: os.environ.get(name) for name in _ENVIRONMENT}
        os.environ.update(_ENVIRONMENT)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
