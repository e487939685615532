"""What is reported, sent and received: some layers of one KV block."""

from __future__ import annotations

from typing import NamedTuple


class BlockPart(NamedTuple):
    """Layers of a block of one request that are complete in a slot of the host block store."""

    block: int
    """Its index in the request."""
    slot: int
    first_layer: int
    num_layers: int
