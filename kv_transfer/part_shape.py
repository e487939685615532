"""What do the bytes of one block, or of some of its layers, consist of? Elements of a known type in a known order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from kvrelay.v1.cluster_pb2 import KvLayout

Buffer = memoryview | bytes

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Of one element, by the types that can be encoded."""


class EncodingError(ValueError):
    """The bytes are not an encoded frame of this shape: the sender is at fault, or the way to here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartShape:
    """`[layer, kv_head, token, K||V]` in native byte order; the first half of the last dimension is K."""

    num_layers: int
    num_kv_heads: int
    block_size_tokens: int
    head_elements: int
    dtype: str
    """A key of `ITEM_BYTES`."""

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"KV blocks of {self.dtype} cannot be encoded, only of {', '.join(ITEM_BYTES)}")
        if min(self.num_layers, self.num_kv_heads, self.block_size_tokens, self.head_elements) < 1:
            raise ValueError(f"an empty part of a block: {self}")

    @classmethod
    def of(cls, layout: KvLayout, num_layers: int) -> PartShape:
        """So many layers of one block of this layout. Raises `ValueError` for a type that cannot be encoded."""
        return cls(
            num_layers=num_layers,
            num_kv_heads=layout.num_kv_heads,
            block_size_tokens=layout.block_size_tokens,
            head_elements=layout.head_elements,
            dtype=layout.dtype,
        )

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def bits(self) -> np.dtype[Any]:
        """The unsigned integer with the bits of one element."""
        return np.dtype(f"u{self.item_bytes}")

    @property
    def num_rows(self) -> int:
        """Layers times heads."""
        return self.num_layers * self.num_kv_heads

    @property
    def row_elements(self) -> int:
        """Of one head in one layer."""
        return self.block_size_tokens * self.head_elements

    @property
    def num_elements(self) -> int:
        return self.num_rows * self.row_elements

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.item_bytes

    def check(self, parts: Sequence[Buffer]) -> None:
        """Raises `ValueError` unless each of them has the bytes of one part."""
        for part in parts:
            size = memoryview(part).nbytes
            if size != self.num_bytes:
                raise ValueError(f"a part of {size} bytes where {self} has {self.num_bytes}")


def flat(array: npt.NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array; they live as long as the view."""
    return array.reshape(-1).view(np.uint8).data
