"""torch.distributed's gloo: send and receive of tensors between two processes, over the loopback device."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from bench.kv_side import Job, Receiver, Sender, Side, new_memory

_TIMEOUT = timedelta(seconds=60)
_SENDER, _RECEIVER = 0, 1


def _group(store: dist.TCPStore, rank: int) -> dist.ProcessGroupGloo:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = _TIMEOUT
    return dist.ProcessGroupGloo(store, rank, 2, options)


def _tensors(side: Side, job: Job) -> list[torch.Tensor]:
    return [torch.from_numpy(block) for block in side.blocks(job)]


class GlooSender(Sender):
    """All blocks are posted at once, each under a tag of its own."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(new_memory(num_bytes, random=True))
        self._done = torch.zeros(1, dtype=torch.uint8)

    def connect(self, contact: str) -> None:
        self._store = dist.TCPStore("127.0.0.1", int(contact), 2, is_master=False, timeout=_TIMEOUT)

    def prepare(self, job: Job) -> None:
        if not hasattr(self, "_group"):
            self._group = _group(self._store, _SENDER)

    def send(self, job: Job) -> list[float]:
        tensors = _tensors(self, job)
        seconds = []
        for _ in range(job.repeat):
            began = time.perf_counter()
            works = [self._group.send([tensor], _RECEIVER, tag) for tag, tensor in enumerate(tensors, start=1)]
            for work in works:
                work.wait()
            self._group.recv([self._done], _RECEIVER, 0).wait()
            seconds.append(time.perf_counter() - began)
        return seconds


class GlooReceiver(Receiver):
    """All receives are posted at once, too."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(new_memory(num_bytes, random=False))
        self._done = torch.zeros(1, dtype=torch.uint8)
        self._store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)

    def contact(self) -> str:
        return str(self._store.port)

    def receive(self, job: Job) -> None:
        if not hasattr(self, "_group"):
            self._group = _group(self._store, _RECEIVER)
        tensors = _tensors(self, job)
        for _ in range(job.repeat):
            works = [self._group.recv([tensor], _SENDER, tag) for tag, tensor in enumerate(tensors, start=1)]
            for work in works:
                work.wait()
            self._group.send([self._done], _SENDER, 0).wait()
