"""What does a worker do with KV blocks that others send it? Reserve, check, place, and tell who waits."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.frame_decoder import FrameDecoder
from kvrelay.kv_transfer.landing import Buffer, Landing, LandingClosedError, OverlapError
from kvrelay.kv_transfer.neighbours import Neighbours, views_of
from kvrelay.kv_transfer.offers import check_layout, split_hashes
from kvrelay.kv_transfer.part_shape import EncodingError
from kvrelay.kv_transfer.posting import Post
from kvrelay.kv_transfer.segment import Segment
from kvrelay.kv_transfer.transfer import Transfer
from kvrelay.kv_transfer.waiters import Waiters
from kvrelay.kv_transfer.wire import MAX_PAYLOAD_BYTES, FrameHeader, checksum
from kvrelay.v1 import cluster_pb2, kv_transfer_pb2
from kvrelay.v1.kv_transfer_pb2 import FrameAck, LocalRun, LocalSegment

_MAX_REMEMBERED = 1 << 14
"""Requests that need no transfer any more, remembered for an offer or a Decode that comes late."""
_MAX_TRANSFERS = 1 << 12
"""Open at a time. Each remembers up to 1 MiB of hashes."""


class Reservation(NamedTuple):
    """The answer to an offer."""

    transfer_id: int
    blocks: list[int]
    """Indices into the offer of those that are wanted."""
    reason: str
    """Why fewer than are missing; empty otherwise."""


def _at_once(callback: Callable[..., object], *args: Any) -> None:
    callback(*args)


class Receiver:
    """All transfers into one worker's store. Belongs to the worker's event loop; only `place`,
    `copy` and what says so may be called by other threads, which tell the event loop through `post`.

    Blocks that arrived stay pinned until their requests have pins of their own (`let_go`), or until nothing has come
    and nobody has waited for the hold time: what a lost cancel leaves behind frees itself (`expire`). A block that is
    complete is a cache entry like any other, whatever becomes of its transfer.
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
        self.max_payload_bytes = max(MAX_PAYLOAD_BYTES, self._layer_bytes)
        """Of one frame."""
        self._hold_s = hold_s
        self._clock = clock
        self._post = post
        self._transfers: dict[int, Transfer] = {}
        self._by_request: dict[str, Transfer] = {}
        self._waiters = Waiters()
        self._over: OrderedDict[str, None] = OrderedDict()
        self._decoder = decoder
        self.neighbours = Neighbours(clock=clock)
        self._arrived: deque[tuple[int, Sequence[int], int, int]] = deque()
        """What threads have placed and the event loop has not followed: transfer, blocks, bit set of layers, time."""

    @property
    def encodings(self) -> Sequence[kv_transfer_pb2.Encoding.ValueType]:
        """Values of the encodings that frames may have."""
        return self._decoder.encodings

    def meet(self, local: LocalSegment) -> bool:
        """Whether this sender's blocks can be copied from its memory."""
        return self.neighbours.meet(local, self._segment.slot_bytes)

    def offer(
        self, request_id: str, layout: cluster_pb2.KvLayout, block_hashes: bytes, *, source: bytes = b""
    ) -> Reservation:
        """Reserve slots for what is missing. Raises `OfferError`.

        `source` names the segment of `neighbours` that the blocks may be copied from.
        """
        check_layout(layout, self._layout)
        hashes = split_hashes(block_hashes)
        self.cancel(request_id)
        if request_id in self._over:
            return Reservation(self._new_id(), [], "the request is over, or has begun without them")
        if len(self._transfers) >= _MAX_TRANSFERS:
            return Reservation(self._new_id(), [], f"{_MAX_TRANSFERS} transfers are open")
        found = [self._store.find(block_hash) for block_hash in hashes]
        present = [slot for slot in found if slot is not None]
        self._store.pin(present)
        missing = [index for index, slot in enumerate(found) if slot is None]
        slots = dict(zip(missing, self._store.reserve(len(missing)), strict=False))
        transfer_id = self._new_id()
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
        transfer = self._transfers.get(header.transfer_id)
        if transfer is None:
            return FrameAck.STATUS_STALE
        if checksum(header, [payload]) != header.checksum:  # Before all else: the header may be what was changed.
            return FrameAck.STATUS_CORRUPT
        num_bytes = header.num_blocks * header.num_layers * self._layer_bytes
        if not transfer.fits(header) or num_bytes > self.max_payload_bytes:  # A short payload may decode to much.
            return FrameAck.STATUS_REFUSED
        try:
            blocks = self._decoder.decode(header, payload)
        except EncodingError:
            return FrameAck.STATUS_REFUSED
        if len(blocks) != num_bytes:
            return FrameAck.STATUS_REFUSED
        return self._land(transfer, header, [blocks])

    def copy(self, run: LocalRun) -> FrameAck.Status.ValueType:
        """Like `place`, for a run in the segment of a sender on this machine. Any thread."""
        transfer = self._transfers.get(run.transfer_id)
        if transfer is None or (source := self.neighbours.segment(transfer.source)) is None:
            return FrameAck.STATUS_STALE
        header = FrameHeader(run.transfer_id, run.first_block, len(run.slots), run.first_layer, run.num_layers)
        if not transfer.fits(header) or len(run.generations) != len(run.slots):
            return FrameAck.STATUS_REFUSED
        if max(run.slots) >= source.num_slots:
            return FrameAck.STATUS_REFUSED
        offset, size = run.first_layer * self._layer_bytes, run.num_layers * self._layer_bytes
        views = views_of(source, run.slots, offset, size)
        expected = list(run.generations)
        return self._land(transfer, header, views, lambda: [source.generation(slot) for slot in run.slots] == expected)

    def _land(
        self,
        transfer: Transfer,
        header: FrameHeader,
        runs: Sequence[Buffer],
        still_valid: Callable[[], bool] | None = None,
    ) -> FrameAck.Status.ValueType:
        try:
            written = transfer.landing.write(header.first_block, header.layers, runs, still_valid)
        except LandingClosedError:
            return FrameAck.STATUS_STALE
        except OverlapError:
            return FrameAck.STATUS_REFUSED
        if written is None:
            return FrameAck.STATUS_CORRUPT
        return FrameAck.STATUS_STORED

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
            self._post(self.commit, transfer_id)

    def commit(self, transfer_id: int) -> int:
        """The sender is done; returns how many wanted blocks did not arrive. Their slots are free again."""
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
            self.commit(transfer.transfer_id)
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

    @staticmethod
    def _new_id() -> int:
        return secrets.randbits(63) | 1 << 63
