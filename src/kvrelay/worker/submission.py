"""Who holds which slots while the engine works on one request?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvrelay.block_hash import BlockHasher
from kvrelay.kv_transfer.block_part import BlockPart
from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.v1 import worker_pb2
from kvrelay.worker.work import Work

Sink = Callable[[worker_pb2.TokenDelta], None]
PartHandler = Callable[[BlockPart], None]
"""Gets each part of the prompt's blocks; its slot is pinned once for the call, and the handler unpins it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handlers:
    """Who is told what the engine does."""

    sink: Sink
    on_part: PartHandler | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSlots:
    """What the engine reads and writes for a prompt."""

    num_layers: int
    load: Sequence[int]
    """Pinned; the pins pass over to the submission."""
    load_tokens: int
    """So much of the prompt they hold."""
    saving: Mapping[int, int]
    """Reserved slots by block."""
    names: Sequence[bytes]
    """The hashes that the prompt's blocks are stored under."""


class Submission:
    """One request in the engine: its tokens, and the slots that it reads and writes.

    Owns a pin on each slot of `load` until the engine has read it, and each slot of `saving` until the block in it is
    complete. A block whose tokens are not all known yet waits for them: its name depends on them. When both the
    tokens have ended (`end`) and the engine is done with the slots (`close`), nothing is held any more.
    """

    def __init__(
        self, ticket: int, work: Work, store: BlockStore, hasher: BlockHasher, slots: PromptSlots, handlers: Handlers
    ) -> None:
        self.ticket = ticket
        self.work = work
        self.engine_request_id = f"{work.request_id}.{ticket}"
        self.num_queued_tokens = hasher.num_tokens - slots.load_tokens
        """To compute before the first token, as far as the worker knows."""
        self.num_computed_tokens = 0
        """Of these, what is in blocks that the engine has saved."""
        self.num_tokens = len(work.prompt_token_ids)
        """Of the prompt, and generated."""
        self.submitted_s = time.monotonic()
        self.started = asyncio.Event()
        """Set once the engine works on it, or will not any more."""
        self.ended = asyncio.Event()
        """Set when no token follows."""
        self.closed = asyncio.Event()
        """Set when the engine touches no slot of this request any more."""
        self._store = store
        self._hasher = hasher
        self._num_layers = slots.num_layers
        self._num_saved: dict[int, int] = {}
        self._loading = list(slots.load)
        self._saving = dict(slots.saving)
        self._names = slots.names
        self._unnamed: dict[int, int] = {}
        self._sink = handlers.sink
        self._on_part = handlers.on_part
        self.has_first_token = False

    def loaded(self, num_blocks: int) -> None:
        """The engine has taken so many blocks from the loaded slots, and reads them no more."""
        self.work.timeline.counters[f"{self.work.name}.blocks_loaded"] = num_blocks
        self._unpin_loaded()
        self.started.set()

    def _unpin_loaded(self) -> None:
        self._store.unpin(self._loading)
        self._loading = []

    def saved(self, part: BlockPart) -> bool:
        """Some layers of a block are complete in their slot; returns whether it is the whole block now."""
        self.started.set()
        block, slot = part.block, part.slot
        num_saved = self._num_saved.pop(block, 0) + part.num_layers
        if num_saved < self._num_layers:
            self._num_saved[block] = num_saved
            if self._on_part is not None and block < len(self._names):
                self._store.pin([slot])
                self._on_part(part)
            return False
        self._saving.pop(block, None)
        if block < len(self._names):
            num_tokens = self.num_computed_tokens + self._hasher.block_size
            self.num_computed_tokens = min(num_tokens, self.num_queued_tokens)
            self._finish_part(part, self._names[block])
        elif block < len(self._hasher.hashes):
            self._store_generated(slot, self._hasher.hashes[block])
        else:
            self._unnamed[block] = slot
        return True

    def add_delta(self, delta: worker_pb2.TokenDelta) -> None:
        """Pass tokens on, under the request's own id."""
        delta.request_id = self.work.request_id
        self.num_tokens += len(delta.token_ids)
        self._hasher.append(delta.token_ids)
        for block in [block for block in self._unnamed if block < len(self._hasher.hashes)]:
            self._store_generated(self._unnamed.pop(block), self._hasher.hashes[block])
        for event in delta.timeline.events:
            self.work.mark(event.name, event.unix_ns)
        delta.ClearField("timeline")
        self.has_first_token = self.has_first_token or bool(delta.token_ids)
        if delta.finish_reason:
            self.work.mark("last_token")
            delta.timeline.CopyFrom(self.work.timeline)
        self._sink(delta)
        if delta.finish_reason:
            self.end()

    def end(self) -> None:
        """No token follows."""
        self.started.set()
        self.ended.set()
        self._release_if_over()

    def close(self) -> None:
        """The engine is done with every slot."""
        self._unpin_loaded()
        self._store.release(self._saving.values())
        self._saving.clear()
        self.closed.set()
        self._release_if_over()

    def _release_if_over(self) -> None:
        if self.ended.is_set() and self.closed.is_set():
            self._store.release(self._unnamed.values())
            self._unnamed.clear()

    def _finish_part(self, part: BlockPart, name: bytes) -> None:
        """The last part of a block of the prompt; another slot may hold the same block already."""
        slot = self._store.commit(part.slot, name)
        if self._on_part is None:
            self._store.unpin([slot])
        else:
            self._on_part(part._replace(slot=slot))

    def _store_generated(self, slot: int, name: bytes) -> None:
        self._store.unpin([self._store.commit(slot, name)])
