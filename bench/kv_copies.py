"""Limits without a network: a copy within a process, and the copy from the host block store into an engine's cache."""

from __future__ import annotations

import random
import time

import numpy as np
import torch

from bench.kv_side import BLOCKS, Job, Sender, block_bytes, new_memory
from kvrelay.kv_transfer.rank_copier import RankCopier
from kvrelay.kv_transfer.segment import Segment, size_for


class Memcpy(Sender):
    """Block by block from one region to another, both larger than any cache."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(new_memory(num_bytes, random=True))
        self._target = new_memory(num_bytes, random=False)

    def send(self, job: Job) -> list[float]:
        pairs = [(self._target[i : i + job.block_bytes], self.memory[i : i + job.block_bytes]) for i in _starts(job)]
        seconds = []
        for _ in range(job.repeat):
            began = time.perf_counter()
            for target, source in pairs:
                np.copyto(target, source)
            seconds.append(time.perf_counter() - began)
        return seconds

    def check(self, job: Job) -> None:
        assert np.array_equal(self._target[: job.num_bytes], self.memory[: job.num_bytes])


def _starts(job: Job) -> range:
    return range(0, job.num_bytes, job.block_bytes)


class StoreToEngine(Sender):
    """`RankCopier.load` from a segment's slots into the paged KV cache of a CPU engine, both in random order."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(new_memory(0, random=False))  # The store is.
        torch.set_num_threads(1)
        self._block_bytes = 0
        self._cache: list[torch.Tensor] = []
        self._copies: list[tuple[int, int]] = []

    def prepare(self, job: Job) -> None:
        """A full store and the engine of the model that has blocks of this size, kept for more jobs of that size."""
        if self._block_bytes == job.block_bytes:
            return
        self._block_bytes = job.block_bytes
        [(layers, heads, tokens, elements)] = [s for s in BLOCKS.values() if block_bytes(s) == job.block_bytes]
        size = (job.num_blocks, heads, tokens, elements)
        self._cache = [torch.ones(size, dtype=torch.bfloat16) for _ in range(layers)]
        segment = Segment.create(size_for(job.num_blocks, job.block_bytes))
        self._copier = RankCopier(segment, {str(i): layer for i, layer in enumerate(self._cache)}, 0, 1, heads)
        self.memory = np.frombuffer(segment.slots, np.uint8)
        self.memory[:] = new_memory(self.memory.nbytes, random=True)
        numbers = random.Random(1)
        slots, blocks = (numbers.sample(range(job.num_blocks), job.num_blocks) for _ in range(2))
        self._copies = list(zip(slots, blocks, strict=True))

    def send(self, job: Job) -> list[float]:
        seconds = []
        for _ in range(job.repeat):
            began = time.perf_counter()
            self._copier.load(self._copies)
            seconds.append(time.perf_counter() - began)
        return seconds

    def check(self, job: Job) -> None:
        store = torch.from_numpy(self.memory)[: job.num_bytes].view(job.num_blocks, len(self._cache), -1)
        for number, layer in enumerate(self._cache):
            rows = layer.view(torch.uint8).view(job.num_blocks, -1)
            assert all(torch.equal(rows[block], store[slot, number]) for slot, block in self._copies)
