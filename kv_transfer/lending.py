"""How does a worker give blocks of its store to one that asks for a prefix? By pushing them, like any others."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial

import structlog

from kvrelay.kv_transfer.block_part import BlockPart
from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.offers import HASH_BYTES, check_layout, split_hashes
from kvrelay.kv_transfer.peer import LayoutRefusedError, Peers
from kvrelay.kv_transfer.segment import Segment
from kvrelay.kv_transfer.sender import Push
from kvrelay.v1 import cluster_pb2, kv_transfer_pb2

_log = structlog.get_logger(__name__)

MAX_LOANS = 32
"""At a time; each pins slots."""


class BusyError(RuntimeError):
    """Too many loans are under way."""


class Lender:
    """Answers `Fetch`. Belongs to the worker's event loop; `close` it before the tasks' group ends."""

    def __init__(
        self,
        store: BlockStore,
        segment: Segment,
        layout: cluster_pb2.KvLayout,
        peers: Peers,
        counters: Counter[str],
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.local_segment: kv_transfer_pb2.LocalSegment | None = None
        """Told in offers, for receivers on this machine."""
        self._store = store
        self._segment = segment
        self._layout = layout
        self._peers = peers
        self._counters = counters
        self._group = tasks
        self._tasks: set[asyncio.Task[None]] = set()

    def lend(self, request: kv_transfer_pb2.FetchRequest) -> int:
        """Begin to push the prefix that the store has; returns of how many blocks it is.

        Raises `OfferError` for what does not fit, `PeerError` for an address that is none, and `BusyError`.
        """
        check_layout(request.layout, self._layout)
        slots = self._store.match(split_hashes(request.block_hashes))
        if not slots:
            return 0
        if len(self._tasks) == MAX_LOANS:
            raise BusyError(f"{MAX_LOANS} prefixes are being lent already; compute this one, or ask later")
        offer = kv_transfer_pb2.OfferRequest(
            request_id=request.request_id,
            layout=self._layout,
            block_hashes=request.block_hashes[: len(slots) * HASH_BYTES],
            trace=request.trace,
            local=self.local_segment,
        )
        peer = self._peers.get(request.address)
        push = Push(lambda: peer, self._segment, offer, self._store)
        self._store.pin(slots)
        for block, slot in enumerate(slots):
            push.add(BlockPart(block, slot, 0, self._layout.num_layers))
        push.finish()
        task = self._group.create_task(self._run(push, request.address), name=f"lend-{request.request_id}")
        self._tasks.add(task)
        task.add_done_callback(partial(self._over, push))
        return len(slots)

    async def _run(self, push: Push, address: str) -> None:
        try:
            result = await push.run()
        except LayoutRefusedError as error:
            _log.warning("loan refused", address=address, error=str(error))
            return
        except Exception:  # The boundary: what one peer answers must not end the worker.
            _log.exception("loan failed", address=address)
            return
        self._counters["blocks_lent"] += result.num_blocks
        if result.error:
            _log.warning("loan incomplete", address=address, error=result.error)

    def _over(self, push: Push, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        push.close()  # It may have been cancelled before it ran.

    def close(self) -> None:
        """Cancel what is under way."""
        for task in self._tasks:
            task.cancel()
