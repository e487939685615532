"""What is known about one reservation while its blocks come in?"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvrelay.kv_transfer.landing import Landing
from kvrelay.kv_transfer.wire import FrameHeader


class Reservation(NamedTuple):
    """The answer to an offer."""

    transfer_id: int
    blocks: list[int]
    """Indices into the offer of those that are wanted."""
    reason: str
    """Why fewer than are missing; empty otherwise."""


def new_transfer_id() -> int:
    """Random, and never 0."""
    return secrets.randbits(63) | 1 << 63


@dataclass(slots=True)
class Transfer:
    """The wanted blocks of one offer. Its id is its epoch, never used again."""

    transfer_id: int
    request_id: str
    hashes: Sequence[bytes]
    num_layers: int
    deadline_s: float
    source: bytes
    """The proof of the sender's segment, if that is on this machine."""
    landing: Landing
    slots: dict[int, int]
    """Reserved slots of the blocks that are not complete, by index in the offer."""
    layers: dict[int, int] = field(default_factory=dict)
    """Bit set of the layers that arrived, by index of the block."""
    pinned: list[int] = field(default_factory=list)
    """Ready slots held for the request, in the offer's order as they came."""
    settled: bool = False
    """Whether no more is coming."""
    committed: bool = False
    """Whether the sender has said so: its request goes on, and comes for the blocks."""
    owner: str = ""
    """The coordinator whose request it is."""
    received_bytes: int = 0
    received_blocks: int = 0
    last_frame_unix_ns: int = 0

    def fits(self, header: FrameHeader) -> bool:
        """Whether these blocks and layers are some of the offer's. Any thread."""
        return (
            header.num_blocks > 0
            and header.first_block + header.num_blocks <= len(self.hashes)
            and header.num_layers > 0
            and header.first_layer + header.num_layers <= self.num_layers
        )

    def arrived(self, block: int, layers: int) -> int | None:
        """Note a bit set of layers; returns the slot, which is no longer of this transfer, of a block that is complete.

        None also for a block that is not wanted any more.
        """
        if block not in self.slots:
            return None
        have = self.layers.get(block, 0) | layers
        if have != (1 << self.num_layers) - 1:
            self.layers[block] = have
            return None
        self.layers.pop(block, None)
        return self.slots.pop(block)
