"""How much of a prompt does the store hold, and what follows for the engine?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.block_hash import BlockHasher
from kvrelay.kv_transfer.block_store import BlockStore


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPrompt:
    """A prompt's blocks and the slots of those that are stored."""

    hashes: Sequence[bytes]
    """All blocks of the prompt, the last one full or not."""
    present: Sequence[int]
    """Slots of the first of them."""
    load: Sequence[int]
    """Slots for the engine: `present`, or one more."""
    load_tokens: int
    """What they hold of the prompt; at most all tokens but the last, from which the engine samples."""


def look_up(store: BlockStore, hasher: BlockHasher, last_token_id: int) -> StoredPrompt:
    """Find the stored prefix of a prompt; `hasher` has seen all tokens but the last, and has seen all afterwards.

    A block that is not full is stored under the tokens it had. The prompt of a decode worker may have one token more
    than that (the first one, sampled by the prefill worker), so such a block counts too. Nothing is pinned.
    """
    block_size = hasher.block_size
    num_usable = hasher.num_tokens
    shorter = hasher.partial_hash()
    hasher.append([last_token_id])
    hashes = hasher.all_hashes()
    present = store.match(hashes)
    load = list(present)
    if len(present) < len(hashes) and len(present) == num_usable // block_size and shorter is not None:
        slot = store.find(shorter)
        if slot is not None:
            load.append(slot)
    return StoredPrompt(hashes=hashes, present=present, load=load, load_tokens=min(len(load) * block_size, num_usable))
