"""How does one rank copy blocks between its paged KV cache and the host block store?"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from kvrelay.kv_transfer.segment import HEADER_BYTES, Segment

_LENGTH_BYTES = 4
_MADV_POPULATE_WRITE = 23
"""madvise(2): since Linux 5.14."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLayout:
    """What rank 0 tells the worker about the engine's KV cache, through the segment's header."""

    dtype: str
    format: str
    num_layers: int
    num_kv_heads: int
    """All heads, over all ranks."""
    head_elements: int
    block_size_tokens: int
    slot_bytes: int
    num_engine_blocks: int
    num_ranks: int

    def write(self, header: memoryview) -> None:
        """Store it in `header`."""
        text = json.dumps(asdict(self)).encode()
        header[:_LENGTH_BYTES] = len(text).to_bytes(_LENGTH_BYTES, "little")
        header[_LENGTH_BYTES : _LENGTH_BYTES + len(text)] = text

    @classmethod
    def read(cls, header: memoryview) -> RankLayout:
        """What `write` stored. Raises `ValueError` when nothing was."""
        size = int.from_bytes(header[:_LENGTH_BYTES], "little")
        if not 0 < size <= HEADER_BYTES - _LENGTH_BYTES:
            raise ValueError("the engine has not told the layout of its KV cache")
        return cls(**json.loads(bytes(header[_LENGTH_BYTES : _LENGTH_BYTES + size])))


_Copy = Callable[[Any, Any, Any], None]
"""(rows, index of the target among them, source)."""
_Runs = Callable[[Iterable[tuple[int, int]]], Iterable[tuple[Any, Any]]]
"""(slot, engine block) -> indices of what is copied at once in the store and in the engine."""


class UnsupportedKvCacheError(RuntimeError):
    """The engine's KV cache has a shape that cannot be handed over."""


class RankCopier:
    """Copies rows of bytes: a row is what one rank holds of one block in one layer, `[kv_head, token, K||V]`.

    Slots are canonical, `[layer, kv_head, token, K||V]` with all heads, so ranks of different sizes
    understand each other; a rank's row is one contiguous run of its slot. Copies are one pass over the bytes. On a CPU
    they are over when the call returns; on a GPU they are in the current stream then.
    """

    def __init__(
        self, segment: Segment, kv_caches: Mapping[str, torch.Tensor], rank: int, num_ranks: int, num_kv_heads: int
    ) -> None:
        """`kv_caches`: layer -> `[block, kv_head, token, element]` of this rank, one shape for all.

        `num_kv_heads`: of the whole model. Raises `UnsupportedKvCacheError`.
        """
        layers = list(kv_caches.values())
        first = layers[0]
        _check(kv_caches)
        _, heads, tokens, elements = first.shape
        row_bytes = heads * tokens * elements * first.element_size()
        layer_bytes = row_bytes // heads * num_kv_heads
        # With fewer heads than ranks several ranks hold the same head and write the same bytes.
        first_head = rank * num_kv_heads // num_ranks
        self.layout = RankLayout(
            dtype=str(first.dtype).removeprefix("torch."),
            format=f"{first.device.type}-BHNC",
            num_layers=len(layers),
            num_kv_heads=num_kv_heads,
            head_elements=elements,
            block_size_tokens=tokens,
            slot_bytes=layer_bytes * len(layers),
            num_engine_blocks=first.shape[0],
            num_ranks=num_ranks,
        )
        segment.configure(self.layout.slot_bytes)
        self._slots = np.frombuffer(segment.slots, dtype=np.uint8)
        store = self._slots.reshape(segment.num_slots, len(layers), layer_bytes)
        offset = first_head * row_bytes // heads
        # Of each layer this rank's rows: in the store `[slot, byte]`, in the engine `[block, byte]`.
        self._store: list[Any] = [store[:, i, offset : offset + row_bytes] for i in range(len(layers))]
        self._engine: list[Any] = [layer.view(torch.uint8).view(layer.shape[0], row_bytes) for layer in layers]
        if _is_on_cpu(first):
            # numpy takes 0.4 us a row beyond the copy, torch 5; a row of a small model is copied in 2 us.
            self._engine = [layer.numpy() for layer in self._engine]
            self._copy: _Copy = _copy_array
            self._runs: _Runs = _runs
        else:
            self._store = [torch.from_numpy(layer) for layer in self._store]
            self._copy, self._runs = _copy_tensor, _rows

    def populate(self) -> None:
        """Give every slot its memory now: a page's first write takes ten times as long as any other.

        A kernel that cannot do it leaves it to the first writes.
        """
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(self.pool_address), ctypes.c_size_t(self.pool_bytes), _MADV_POPULATE_WRITE)

    @property
    def pool_address(self) -> int:
        """Where the slots are in this process."""
        return int(self._slots.ctypes.data)

    @property
    def pool_bytes(self) -> int:
        return self._slots.nbytes

    def load(self, copies: Iterable[tuple[int, int]]) -> None:
        """Store -> engine for every (slot, engine block)."""
        runs = list(self._runs(copies))
        for store, engine in zip(self._store, self._engine, strict=True):
            for slots, blocks in runs:
                self._copy(engine, blocks, store[slots])

    def save(self, copies: Iterable[tuple[int, int]], layers: range | None = None) -> None:
        """Engine -> store for every (slot, engine block), in some of the layers or all."""
        runs = list(self._runs(copies))
        for layer in layers or range(len(self._engine)):
            store, engine = self._store[layer], self._engine[layer]
            for slots, blocks in runs:
                self._copy(store, slots, engine[blocks])


def _is_on_cpu(tensor: torch.Tensor) -> bool:
    return bool(tensor.device.type == "cpu")


def _copy_array(rows: Any, index: Any, source: Any) -> None:
    rows[index] = source


def _copy_tensor(rows: Any, index: Any, source: Any) -> None:
    rows[index].copy_(source, non_blocking=True)


def _rows(copies: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """One by one: torch copies what is not contiguous through temporaries, and waits for them."""
    return copies


def _runs(copies: Iterable[tuple[int, int]]) -> Iterator[tuple[int | slice, int | slice]]:
    """Join neighbours."""
    start_slot = start_block = count = 0
    for slot, block in copies:
        if count and slot == start_slot + count and block == start_block + count:
            count += 1
            continue
        if count:
            yield _run(start_slot, count), _run(start_block, count)
        start_slot, start_block, count = slot, block, 1
    if count:
        yield _run(start_slot, count), _run(start_block, count)


def _run(start: int, count: int) -> int | slice:
    """The faster index of one row is its number."""
    return slice(start, start + count) if count > 1 else start


def _check(kv_caches: Mapping[str, torch.Tensor]) -> None:
    shapes = {(tuple(t.shape), t.dtype) for t in kv_caches.values()}
    if len(shapes) != 1:
        raise UnsupportedKvCacheError(f"layers with different KV caches are not supported: {sorted(map(str, shapes))}")
    for name, tensor in kv_caches.items():
        if tensor.dim() != 4 or not tensor.is_contiguous():
            raise UnsupportedKvCacheError(
                f"the KV cache of layer {name} is {tuple(tensor.shape)} with strides {tensor.stride()};"
                " needed is a contiguous [block, kv_head, token, element] (vLLM's layout LBHNC)"
            )
