"""How does a worker get a prompt's prefix that another worker's store holds?"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import structlog

from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.peer import PeerError, Peers
from kvrelay.kv_transfer.receiver import Receiver
from kvrelay.v1 import cluster_pb2, common_pb2, kv_transfer_pb2

_log = structlog.get_logger(__name__)

_WAIT_S = 10.0
"""For a prefix that was promised. A broken stream ends the wait at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSource:
    """Who may hold more of a prompt."""

    request_id: str
    """Of the request that wants the prompt."""
    address: str
    """host:port of its KvTransfer service."""
    trace: common_pb2.TraceContext


class Borrower:
    """Fetches prefixes into one worker's store."""

    def __init__(self, store: BlockStore, receiver: Receiver, peers: Peers, layout: cluster_pb2.KvLayout) -> None:
        self.address = ""
        """host:port of this worker's own KvTransfer service; nothing is fetched as long as it is unknown."""
        self._store = store
        self._receiver = receiver
        self._peers = peers
        self._layout = layout

    @contextlib.asynccontextmanager
    async def borrowed(self, source: PrefixSource | None, hashes: Sequence[bytes]) -> AsyncIterator[int]:
        """Fetch the blocks that the source has beyond the store's own prefix; gives the number of those that came.

        Within it neither they nor that prefix can be evicted. Whatever fails costs time, never the request.
        """
        present = self._store.match(hashes)
        if source is None or not self.address or source.address == self.address or len(present) == len(hashes):
            yield 0
            return
        transfer_id = f"{source.request_id}.prefix"
        request = kv_transfer_pb2.FetchRequest(
            request_id=transfer_id,
            address=self.address,
            layout=self._layout,
            block_hashes=b"".join(hashes),
            trace=source.trace,
        )
        self._store.pin(present)
        try:
            yield await self._fetch(source.address, request, len(present))
        finally:
            self._store.unpin(present)
            self._receiver.let_go(transfer_id)

    async def _fetch(self, address: str, request: kv_transfer_pb2.FetchRequest, num_present: int) -> int:
        try:
            if await self._peers.get(address).fetch(request) <= num_present:
                return 0
        except PeerError as error:
            _log.warning("prefix not fetched", address=address, error=str(error))
            return 0
        transfer = await self._receiver.wait_settled(request.request_id, _WAIT_S)
        return transfer.received_blocks if transfer else 0
