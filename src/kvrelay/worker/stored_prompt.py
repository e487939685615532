"""How much of a prompt does the store hold, and what follows for the engine?"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from kvrelay.block_hash import BlockHasher
from kvrelay.kv_transfer.block_store import BlockStore


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNames:
    """Under which hashes a prompt's blocks may be stored."""

    hashes: Sequence[bytes]
    """All blocks of the prompt, the last one full or not."""
    or_last: bytes | None
    """Of the last block as it was before the prompt's last token, unless it was empty then."""
    num_usable: int
    """Tokens but the last, from which the engine samples."""
    block_size: int


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
    restored_tokens: int = 0
    """Of these, what was read from disk for this request."""


def name_blocks(hasher: BlockHasher, last_token_id: int) -> BlockNames:
    """Names of a prompt's blocks; `hasher` has seen all tokens but the last, and has seen all afterwards.

    A block that is not full is stored under the tokens it had. The prompt of a decode worker may have one token more
    than that (the first one, sampled by the prefill worker), so its last block has two names.
    """
    num_usable, or_last = hasher.num_tokens, hasher.partial_hash()
    hasher.append([last_token_id])
    return BlockNames(hashes=hasher.all_hashes(), or_last=or_last, num_usable=num_usable, block_size=hasher.block_size)


def look_up(store: BlockStore, names: BlockNames, restored: Container[int] = ()) -> StoredPrompt:
    """Find the stored prefix of a prompt. Nothing is pinned. `restored`: slots that were read from disk for it."""
    present = store.match(names.hashes)
    load = list(present)
    if len(present) == len(names.hashes) - 1 and names.or_last is not None:
        slot = store.find(names.or_last)
        if slot is not None:
            load.append(slot)
    sizes = [min(names.block_size, names.num_usable - i * names.block_size) for i in range(len(load))]
    return StoredPrompt(
        hashes=names.hashes,
        present=present,
        load=load,
        load_tokens=sum(sizes),
        restored_tokens=sum(size for slot, size in zip(load, sizes, strict=True) if slot in restored),
    )
