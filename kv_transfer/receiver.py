"""What does a worker do with KV blocks that others send it? Reserve, check, place, and tell who waits."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.frame_decoder import FrameDecoder
from kvrelay.kv_transfer.landing import Landing
from kvrelay.kv_transfer.neighbours import Neighbours
from kvrelay.kv_transfer.offers import check_layout, split_hashes
from kvrelay.kv_transfer.owners import Owners
from kvrelay.kv_transfer.placing import Placing
from kvrelay.kv_transfer.posting import Post
from kvrelay.kv_transfer.segment import Segment
from kvrelay.kv_transfer.transfer import Reservation, Transfer, new_transfer_id
from kvrelay.kv_transfer.waiters import Waiters
from kvrelay.kv_transfer.wire import FrameHeader
from kvrelay.v1 import cluster_pb2, kv_transfer_pb2
from kvrelay.v1.kv_transfer_pb2 import FrameAck, LocalRun, LocalSegment

_MAX_REMEMBERED = 1 << 14
"""Requests that need no transfer any more, remembered for an offer or a Decode that comes late."""
_MAX_TRANSFERS = 1 << 12
"""Open at a time. Each remembers up to 1 MiB of hashes."""


def _at_once(callback: Callable[..., object], *args: Any) -> None:
    callback(*args)


class Receiver:
    """All transfers into one worker's store. Belongs to the worker's event loop; only `place`,
    `copy` and what says so may be called by other threads, which tell the event loop through `post`.

    Blocks that arrived stay pinned until their requests have pins of their own (`let_go`), or until nobody comes for
    them: their sender has left without a word (`abandon`), their coordinator has no session here (`owners`), or nothing
    has come and nobody has waited for the hold time (`expire`). A block that is complete is a cache entry like any
    other, whatever becomes of its transfer.
    """

    def __init__(
        self,
        store: BlockStore,
        segment: Segment,
        decoder: FrameDecoder,
        *,
        hold_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        post: Post = _at_once,
    ) -> None:
        """`decoder`: of frames of the segment's layout. `post`: how threads reach the event loop, or at once."""
        self._store = store
        self._segment = segment
        self._layout = decoder.layout
        self._layer_bytes = segment.slot_bytes // decoder.layout.num_layers
        self._hold_s = hold_s
        self._clock = clock
        self._post = post
        self._transfers: dict[int, Transfer] = {}
        self._by_request: dict[str, Transfer] = {}
        self._waiters = Waiters()
        self.owners = Owners(self._disown)
        self._over: OrderedDict[str, None] = OrderedDict()
        self._decoder = decoder
        self.neighbours = Neighbours(clock=clock)
        self._placing = Placing(self._transfers, decoder, self.neighbours, layer_bytes=self._layer_bytes)
        self._arrived: deque[tuple[int, Sequence[int], int, int]] = deque()
        """What threads have placed and the event loop has not followed: transfer, blocks, bit set of layers, time."""

    @property
    def max_payload_bytes(self) -> int:
        """Of one frame."""
        return self._placing.max_payload_bytes

    @property
    def encodings(self) -> Sequence[kv_transfer_pb2.Encoding.ValueType]:
        """Values of the encodings that frames may have."""
        return self._decoder.encodings

    def meet(self, local: LocalSegment) -> bool:
        """Whether this sender's blocks can be copied from its memory."""
        return self.neighbours.meet(local, self._segment.slot_bytes)

    def offer(
        self,
        request_id: str,
        layout: cluster_pb2.KvLayout,
        block_hashes: bytes,
        *,
        source: bytes = b"",
        owner: str = "",
    ) -> Reservation:
        """Reserve slots for what is missing. Raises `OfferError`.

        `source` names the segment of `neighbours` that the blocks may be copied from, `owner` the coordinator.
        """
        check_layout(layout, self._layout)
        hashes = split_hashes(block_hashes)
        self.cancel(request_id)
        if request_id in self._over:
            return Reservation(new_transfer_id(), [], "the request is over, or has begun without them")
        if len(self._transfers) >= _MAX_TRANSFERS:
            return Reservation(new_transfer_id(), [], f"{_MAX_TRANSFERS} transfers are open")
        found = [self._store.find(block_hash) for block_hash in hashes]
        present = [slot for slot in found if slot is not None]
        self._store.pin(present)
        missing = [index for index, slot in enumerate(found) if slot is None]
        slots = dict(zip(missing, self._store.reserve(len(missing)), strict=False))
        transfer_id = new_transfer_id()
        landing = Landing(self._segment, dict(slots), self._layer_bytes, partial(self._note, transfer_id))
        transfer = self._transfers[transfer_id] = Transfer(
            transfer_id,
            request_id,
            hashes,
            self._layout.num_layers,
            self._clock() + self._hold_s,
            source,
            landing,
            slots,
            pinned=present,
            owner=owner,
        )
        self._by_request[request_id] = transfer
        wanted = list(transfer.slots)
        if not wanted:
            self._settle(transfer)
        reason = f"the store has room for {len(wanted)} of {len(missing)} blocks" if len(wanted) < len(missing) else ""
        return Reservation(transfer_id, wanted, reason)

    def place(self, header: FrameHeader, payload: memoryview) -> FrameAck.Status.ValueType:
        """Check one frame and copy it into its slots; `announce` tells the event loop. Any thread.

        The transfer's last frame tells by itself.
        """
        return self._placing.place(header, payload)

    def copy(self, run: LocalRun) -> FrameAck.Status.ValueType:
        """Like `place`, for a run in the segment of a sender on this machine. Any thread."""
        return self._placing.copy(run)

    def _note(self, transfer_id: int, blocks: Sequence[int], layers: int, is_last: bool) -> None:
        """Of a thread that has written these blocks, before it lets the landing be closed."""
        self._arrived.append((transfer_id, blocks, layers, time.time_ns()))
        if is_last:
            self.announce()

    def announce(self) -> None:
        """Have the event loop follow what was placed, once for many frames. Any thread."""
        self._post(self._follow)

    def _follow(self) -> None:
        while self._arrived:
            self._landed(*self._arrived.popleft())

    def _landed(self, transfer_id: int, blocks: Sequence[int], layers: int, unix_ns: int) -> None:
        """These layers of these blocks lie in their slots."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:  # Ended meanwhile.
            return
        for block in blocks:
            slot = transfer.arrived(block, layers)
            if slot is not None:
                transfer.pinned.append(self._store.commit(slot, transfer.hashes[block]))
                transfer.received_blocks += 1
        transfer.received_bytes += len(blocks) * layers.bit_count() * self._layer_bytes
        transfer.last_frame_unix_ns = unix_ns
        transfer.deadline_s = self._clock() + self._hold_s
        if not transfer.slots:
            self._settle(transfer)

    def open_transfers(self) -> set[int]:
        """Ids of all that have not ended. Any thread."""
        return set(self._transfers)

    def stream_broke(self, transfer_ids: Iterable[int]) -> None:
        """With a stream end the transfers that it carried: whoever waits computes the rest at once. Any thread."""
        for transfer_id in transfer_ids:
            self._post(self._end, transfer_id)

    def commit(self, transfer_id: int) -> int:
        """The sender is done; returns how many wanted blocks did not arrive. Their slots are free again."""
        num_missing = self._end(transfer_id)
        if transfer := self._transfers.get(transfer_id):
            transfer.committed = True
            if self.owners.is_gone(transfer.owner):
                self._release(transfer)
        return num_missing

    def abandon(self, transfer_id: int) -> None:
        """The sender has left. Without a `commit` its request will not go on here either, unless it waits already."""
        transfer = self._transfers.get(transfer_id)
        if transfer is not None and not transfer.committed:
            self._release(transfer)

    def _disown(self, owner: str) -> None:
        for transfer in [each for each in self._transfers.values() if each.owner == owner]:
            self._release(transfer)

    def _release(self, transfer: Transfer) -> None:
        """No more comes, and nobody comes for what is there: whoever waits goes on with it."""
        is_awaited = transfer.request_id in self._waiters
        self._end(transfer.transfer_id)
        if not is_awaited:
            self.let_go(transfer.request_id)

    def _end(self, transfer_id: int) -> int:
        """No more comes; returns how many wanted blocks did not arrive."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            return 0
        transfer.landing.close()
        self._follow()
        num_missing = len(transfer.slots)
        self._store.release(transfer.slots.values())
        transfer.slots.clear()
        transfer.layers.clear()
        self._settle(transfer)
        return num_missing

    def end(self, request_id: str) -> None:
        """No more is coming for this request, whether anything has come or not: who waits need not."""
        transfer = self._by_request.get(request_id)
        if transfer is not None:
            self._end(transfer.transfer_id)
        self._waiters.wake(request_id)

    async def wait_settled(self, request_id: str, timeout_s: float) -> Transfer | None:
        """Until the request's transfer is complete or committed, or for `timeout_s`; its state by then.

        Of the requests that share a transfer, those that come when it was let go of do not wait.
        """
        transfer = self._by_request.get(request_id)
        if request_id in self._over or (transfer is not None and transfer.settled):
            return transfer
        await self._waiters.wait(request_id, timeout_s)
        return self._by_request.get(request_id)

    def cancel(self, request_id: str) -> None:
        """End the request's transfer: free what did not arrive, let go of what did. Unknown ids are fine."""
        transfer = self._by_request.pop(request_id, None)
        if transfer is None:
            return
        del self._transfers[transfer.transfer_id]
        transfer.landing.close()
        self._store.release(transfer.slots.values())
        self._store.unpin(transfer.pinned)

    def let_go(self, request_id: str) -> None:
        """A request that has its own pins, or is over, does not need the transfer; others that wait for it may.

        An offer that comes later is not taken.
        """
        transfer = self._by_request.get(request_id)
        if request_id in self._waiters and (transfer is None or not transfer.settled):
            return
        self.cancel(request_id)
        self._over[request_id] = None
        if len(self._over) > _MAX_REMEMBERED:
            self._over.popitem(last=False)

    def expire(self) -> int:
        """Cancel what nobody has fed or waited for within the hold time; returns how many. Unmap senders that left."""
        self.neighbours.expire()
        now = self._clock()
        late = [
            t.request_id for t in self._transfers.values() if t.deadline_s < now and t.request_id not in self._waiters
        ]
        for request_id in late:
            self.cancel(request_id)
        return len(late)

    @property
    def num_transfers(self) -> int:
        return len(self._transfers)

    def _settle(self, transfer: Transfer) -> None:
        transfer.settled = True
        self._waiters.wake(transfer.request_id)
