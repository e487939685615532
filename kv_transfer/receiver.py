"""What does a worker do with KV blocks that others send it? Reserve, check, place, and tell who waits."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.encoding import Encoding
from kvrelay.kv_transfer.frame_decoder import FrameDecoder
from kvrelay.kv_transfer.landing import Buffer, Landing, LandingClosedError, OverlapError
from kvrelay.kv_transfer.neighbours import Neighbours
from kvrelay.kv_transfer.offers import check_layout, split_hashes
from kvrelay.kv_transfer.part_shape import EncodingError
from kvrelay.kv_transfer.posting import Post
from kvrelay.kv_transfer.segment import Segment
from kvrelay.kv_transfer.wire import FrameHeader, checksum
from kvrelay.v1 import cluster_pb2, kv_transfer_pb2
from kvrelay.v1.kv_transfer_pb2 import FrameAck, LocalRun, LocalSegment

_MAX_REMEMBERED = 1 << 14
"""Requests that need no transfer any more, remembered for an offer or a Decode that comes late."""


@dataclass(slots=True)
class Transfer:
    """One reservation: the wanted blocks of one offer. Its id is its epoch, never used again."""

    transfer_id: int
    request_id: str
    hashes: Sequence[bytes]
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
    received_bytes: int = 0
    received_blocks: int = 0
    last_frame_unix_ns: int = 0


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
        layout: cluster_pb2.KvLayout,
        *,
        hold_s: float = 60.0,
        encodings: Sequence[Encoding] = (),
        clock: Callable[[], float] = time.monotonic,
        post: Post = _at_once,
    ) -> None:
        """`encodings`: what frames may be coded as. `post`: how threads reach the event loop; at once in one thread."""
        self._store = store
        self._segment = segment
        self._layout = layout
        self._layer_bytes = segment.slot_bytes // layout.num_layers
        self._hold_s = hold_s
        self._clock = clock
        self._post = post
        self._transfers: dict[int, Transfer] = {}
        self._by_request: dict[str, Transfer] = {}
        self._waiters: dict[str, list[asyncio.Event]] = {}
        self._over: OrderedDict[str, None] = OrderedDict()
        self._decoder = FrameDecoder(layout, encodings)
        self.neighbours = Neighbours(clock=clock)
        self._arrived: deque[tuple[FrameHeader, Sequence[int], int]] = deque()
        """What threads have placed and the event loop has not followed."""
        self._all_layers = (1 << layout.num_layers) - 1

    @property
    def encodings(self) -> Sequence[kv_transfer_pb2.Encoding.ValueType]:
        """Values of the encodings that frames may have."""
        return self._decoder.encodings

    def meet(self, local: LocalSegment) -> bool:
        """Whether this sender's blocks can be copied from its memory."""
        return self.neighbours.meet(local, self._segment.slot_bytes)

    def offer(
        self, request_id: str, layout: cluster_pb2.KvLayout, block_hashes: bytes, *, source: bytes = b""
    ) -> tuple[int, list[int]]:
        """Reserve slots for what is missing; returns the transfer's id and the indices of the wanted blocks.

        `source` names the segment of `neighbours` that the blocks may be copied from.

        Fewer blocks than are missing are wanted when the store is full, and none for a request that is over or has
        started without them. Raises `OfferError`.
        """
        check_layout(layout, self._layout)
        hashes = split_hashes(block_hashes)
        self.cancel(request_id)
        if request_id in self._over:
            return self._new_id(), []
        found = [self._store.find(block_hash) for block_hash in hashes]
        present = [slot for slot in found if slot is not None]
        self._store.pin(present)
        missing = [index for index, slot in enumerate(found) if slot is None]
        slots = dict(zip(missing, self._store.reserve(len(missing)), strict=False))
        landing = Landing(self._segment, dict(slots), self._layer_bytes)
        deadline_s = self._clock() + self._hold_s
        transfer = Transfer(self._new_id(), request_id, hashes, deadline_s, source, landing, slots, pinned=present)
        self._transfers[transfer.transfer_id] = transfer
        self._by_request[request_id] = transfer
        wanted = list(transfer.slots)
        if not wanted:
            self._settle(transfer)
        return transfer.transfer_id, wanted

    def place(self, header: FrameHeader, payload: memoryview) -> FrameAck.Status.ValueType:
        """Check one frame and copy it into its slots; `announce` tells the event loop. Any thread."""
        transfer = self._transfers.get(header.transfer_id)
        if transfer is None:
            return FrameAck.STATUS_STALE
        if checksum(header, [payload]) != header.checksum:  # Before all else: the header may be what was changed.
            return FrameAck.STATUS_CORRUPT
        if not self._fits(header, transfer):
            return FrameAck.STATUS_REFUSED
        try:
            blocks = self._decoder.decode(header, payload)
        except EncodingError:
            return FrameAck.STATUS_REFUSED
        if len(blocks) != self._num_bytes(header):
            return FrameAck.STATUS_REFUSED
        return self._land(transfer, header, [blocks])

    def copy(self, run: LocalRun) -> FrameAck.Status.ValueType:
        """Like `place`, for a run in the segment of a sender on this machine. Any thread."""
        transfer = self._transfers.get(run.transfer_id)
        if transfer is None or (source := self.neighbours.segment(transfer.source)) is None:
            return FrameAck.STATUS_STALE
        header = FrameHeader(run.transfer_id, run.first_block, len(run.slots), run.first_layer, run.num_layers)
        if not self._fits(header, transfer) or len(run.generations) != len(run.slots):
            return FrameAck.STATUS_REFUSED
        if max(run.slots) >= source.num_slots:
            return FrameAck.STATUS_REFUSED
        offset, size = run.first_layer * self._layer_bytes, run.num_layers * self._layer_bytes
        views = _views(source, run.slots, offset, size)
        expected = list(run.generations)
        return self._land(transfer, header, views, lambda: [source.generation(slot) for slot in run.slots] == expected)

    def _land(
        self,
        transfer: Transfer,
        header: FrameHeader,
        runs: Sequence[Buffer],
        still_valid: Callable[[], bool] | None = None,
    ) -> FrameAck.Status.ValueType:
        layers = header.first_layer, header.num_layers
        try:
            written = transfer.landing.write(header.first_block, layers, runs, still_valid)
        except LandingClosedError:
            return FrameAck.STATUS_STALE
        except OverlapError:
            return FrameAck.STATUS_REFUSED
        if written is None:
            return FrameAck.STATUS_CORRUPT
        self._arrived.append((header, written, time.time_ns()))
        return FrameAck.STATUS_STORED

    def announce(self) -> None:
        """Have the event loop follow what was placed, once for many frames. Any thread."""
        self._post(self._follow)

    def _follow(self) -> None:
        while self._arrived:
            self._landed(*self._arrived.popleft())

    def _landed(self, header: FrameHeader, written: Sequence[int], unix_ns: int) -> None:
        """These blocks of a frame lie in their slots."""
        transfer = self._transfers.get(header.transfer_id)
        if transfer is None:  # Ended meanwhile.
            return
        bits = ((1 << header.num_layers) - 1) << header.first_layer
        for index in written:
            self._complete(transfer, index, bits)
        transfer.received_bytes += len(written) * header.num_layers * self._layer_bytes
        transfer.last_frame_unix_ns = unix_ns
        transfer.deadline_s = self._clock() + self._hold_s
        if not transfer.slots:
            self._settle(transfer)

    def _num_bytes(self, header: FrameHeader) -> int:
        return header.num_blocks * header.num_layers * self._layer_bytes

    def _fits(self, header: FrameHeader, transfer: Transfer) -> bool:
        end = header.first_block + header.num_blocks
        return (
            0 < header.num_blocks <= len(transfer.hashes)
            and end <= len(transfer.hashes)
            and 0 < header.num_layers <= self._layout.num_layers
            and header.first_layer + header.num_layers <= self._layout.num_layers
        )

    def _complete(self, transfer: Transfer, index: int, bits: int) -> None:
        slot = transfer.slots.get(index)
        if slot is None:  # The commit came first.
            return
        layers = transfer.layers.get(index, 0) | bits
        transfer.layers[index] = layers
        if layers == self._all_layers:
            del transfer.slots[index], transfer.layers[index]
            transfer.pinned.append(self._store.commit(slot, transfer.hashes[index]))
            transfer.received_blocks += 1

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
        for waiter in self._waiters.get(request_id, ()):
            waiter.set()

    async def wait_settled(self, request_id: str, timeout_s: float) -> Transfer | None:
        """Until the request's transfer is complete or committed, or for `timeout_s`; its state by then.

        Of the requests that share a transfer, those that come when it was let go of do not wait.
        """
        transfer = self._by_request.get(request_id)
        if request_id in self._over or (transfer is not None and transfer.settled):
            return transfer
        event = asyncio.Event()
        self._waiters.setdefault(request_id, []).append(event)
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            pass
        finally:
            self._waiters[request_id].remove(event)
            if not self._waiters[request_id]:
                del self._waiters[request_id]
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
        for waiter in self._waiters.get(transfer.request_id, ()):
            waiter.set()

    @staticmethod
    def _new_id() -> int:
        return secrets.randbits(63) | 1 << 63


def _views(source: Segment, slots: Sequence[int], offset: int, size: int) -> list[memoryview]:
    """Of `size` bytes from `offset` of each slot; whole slots that follow each other are joined."""
    views = []
    first = 0
    while first < len(slots):
        end = first + 1
        while size == source.slot_bytes and end < len(slots) and slots[end] == slots[end - 1] + 1:
            end += 1
        views.append(source.run_view(slots[first], offset, (end - first) * size))
        first = end
    return views
