"""What has one side of a transport to offer, to be measured?"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

LATENCY_BYTES = 64 << 10
BLOCKS = {"0.7MB": (30, 3, 32, 128), "2MiB": (32, 8, 16, 256)}
"""Layers, KV heads, tokens, elements of K and V, two bytes each: SmolLM2-135M and Llama-3.1-8B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """So many blocks, so many times, one repetition after the other."""

    block_bytes: int
    num_blocks: int
    repeat: int
    stamp: int
    """Is written into each block first, so that the bytes of the job before do not pass for those of this one."""

    @property
    def num_bytes(self) -> int:
        return self.block_bytes * self.num_blocks


def block_bytes(shape: tuple[int, int, int, int]) -> int:
    """Of one of `BLOCKS`."""
    layers, heads, tokens, elements = shape
    return layers * heads * tokens * elements * 2


class Side:
    """One end of a transport. Its memory lives as long as the process and has been touched."""

    def __init__(self, memory: Bytes) -> None:
        self.memory = memory

    def contact(self) -> str:
        """What the other side has to know to connect."""
        return ""

    def connect(self, contact: str) -> None:
        """To the other side, which has been started; the sender is told first."""

    def prepare(self, job: Job) -> None:
        """Whatever is not measured."""

    def blocks(self, job: Job) -> Iterator[Bytes]:
        """The blocks of a job in their order, as they lie in memory."""
        for i in range(job.num_blocks):
            yield self.memory[i * job.block_bytes : (i + 1) * job.block_bytes]

    def close(self) -> None:
        """Leave nothing behind in the system; the process ends next."""


class Sender(Side, ABC):
    """Holds what is sent."""

    def check(self, job: Job) -> None:
        """Raises `AssertionError` when not all has arrived; for those without a receiver, which compares."""

    @abstractmethod
    def send(self, job: Job) -> list[float]:
        """Returns seconds for each repetition: from before the first byte to the receiver's word that all are there."""


class Receiver(Side, ABC):
    """Holds what has arrived."""

    @abstractmethod
    def receive(self, job: Job) -> None:
        """Runs in a thread of its own; the sender starts once it does. May return at once when others do the work."""


def new_memory(num_bytes: int, *, random: bool) -> Bytes:
    """Random bytes to send, or zeros to write to. Its pages are there, huge ones where the system has them."""
    pages = mmap.mmap(-1, max(1, num_bytes))
    pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, np.uint8)[:num_bytes]
    memory[:] = np.frombuffer(np.random.default_rng(1).bytes(num_bytes), np.uint8) if random else 0
    return memory
