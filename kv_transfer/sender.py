"""How does one request's KV get to the decode worker while prefill is still computing it?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from kvrelay.kv_transfer.block_part import BlockPart
from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.frame_order import FrameOrder, LocalOrder, cut
from kvrelay.kv_transfer.peer import Peer, PeerError
from kvrelay.kv_transfer.segment import Segment
from kvrelay.v1 import kv_transfer_pb2
from kvrelay.v1.kv_transfer_pb2 import FrameAck

_RESEND_S = 3.0
"""Without any ack for so long, what was sent is taken for lost and sent again, once."""
_GIVE_UP_S = 12.0
"""Without any ack for so long, the receiver takes nothing any more."""
_LOCAL_RUN_BYTES = 16 << 20
"""What one message has copied on the same machine: some milliseconds, so that streams share the work."""


@dataclass(slots=True)
class PushResult:
    """What became of a push."""

    num_wanted_bytes: int = 0
    """Of the blocks that the receiver lacks and has room for; 0 until it has answered."""
    num_blocks: int = 0
    """Acknowledged with all their layers."""
    num_bytes: int = 0
    """Sent, again or not."""
    num_stored_bytes: int = 0
    """Acknowledged."""
    busy_s: float = 0.0
    """In which something was on its way, sent and not acknowledged."""
    num_resent_frames: int = 0
    num_missing_blocks: int = 0
    transport: str = ""
    """How blocks went: grpc, shm, gloo or nccl, or several of them in the order of their first use with "+" between."""
    refusal: str = ""
    """Why the receiver wants less than it lacks; empty when it does not."""
    error: str = ""
    """Why the push ended early; empty when it did not."""


class Push:
    """Sends the blocks of one request as their parts become ready.

    The caller pins the slot for each `add`; the push unpins it once the peer has acknowledged the part or does not want
    it, or when the push is over. A push never fails its request: what does not arrive is computed by the peer.
    """

    def __init__(
        self,
        find_peer: Callable[[], Peer],
        segment: Segment,
        offer: kv_transfer_pb2.OfferRequest,
        store: BlockStore,
    ) -> None:
        """`find_peer` is called when the push runs: until then its peer may be closed for being idle."""
        self._find_peer = find_peer
        self._segment = segment
        self._offer = offer
        self._store = store
        self._num_layers = offer.layout.num_layers
        self._layer_bytes = segment.slot_bytes // self._num_layers
        self._ready: asyncio.Queue[BlockPart | None] = asyncio.Queue()
        self._orders: dict[tuple[int, int], FrameOrder] = {}
        """Sent and not acknowledged, each with a pin on the slot of every part."""
        self._busy_since_s = 0.0
        self._num_stored_layers = 0
        self._stored: list[tuple[int, int]] = []
        """When acks came (Unix time, ns), and for how many bytes."""
        self._progress = asyncio.Event()
        self._over = False
        self.result = PushResult()

    def add(self, part: BlockPart) -> None:
        """Some layers of a block of the offer are ready in a slot, which the push unpins."""
        if self._over:
            self._store.unpin([part.slot])
        else:
            self._ready.put_nowait(part)

    def stored_bytes_at(self, unix_ns: int) -> int:
        """How much was acknowledged by then."""
        return sum(num_bytes for stored_ns, num_bytes in self._stored if stored_ns <= unix_ns)

    def finish(self) -> None:
        """No more is added."""
        self._ready.put_nowait(None)

    async def run(self) -> PushResult:
        """Offer, send, commit. No slot is held any more when this ends; cancelled, it leaves none reserved at the peer.

        Raises `LayoutRefusedError` when the two workers do not fit together.
        """
        try:
            await self._run()
        except PeerError as error:
            self.result.error = self.result.error or str(error)
        finally:
            self.close()
        return self.result

    def close(self) -> None:
        """Unpin every slot that is still held; idempotent. The owner calls it, for a `run` that never started."""
        self._over = True
        self._drop_orders()
        while not self._ready.empty():
            part = self._ready.get_nowait()
            if part is not None:
                self._store.unpin([part.slot])

    async def _run(self) -> None:
        self._peer = self._find_peer()
        async with self._peer.offered(self._offer) as want:
            self.result.refusal = want.reason
            wanted = frozenset(want.blocks)
            self.result.num_wanted_bytes = len(wanted) * self._segment.slot_bytes
            with self._peer.acks(want, partial(self._on_ack, want)) as used:
                await self._send_all(want, wanted)
                self.result.transport = "+".join(used)
                # A peer that is stalled takes its time to answer, and gets no more frames meanwhile.
                self._drop_orders()
                # Also after a failure: the peer need not wait any longer.
                self.result.num_missing_blocks = await self._peer.commit(want.transfer_id)

    async def _send_all(self, want: kv_transfer_pb2.Want, wanted: Collection[int]) -> None:
        finished = False
        while not (finished or self._over):
            parts, finished = await self._next_parts()
            try:
                self._send(want, [part for part in parts if part.block in wanted])
            finally:
                self._store.unpin([part.slot for part in parts])
        await self._all_acknowledged(want)

    async def _all_acknowledged(self, want: kv_transfer_pb2.Want) -> None:
        quiet_s = 0.0
        while self._orders and not self._over:
            self._progress.clear()
            try:
                async with asyncio.timeout(_RESEND_S):
                    await self._progress.wait()
                quiet_s = 0.0
            except TimeoutError:
                quiet_s += _RESEND_S
                # Acks of other pushes say that ours wait behind them.
                if min(quiet_s, self._peer.quiet_s) >= _GIVE_UP_S:
                    self._end(f"{self._peer.address} took nothing for {_GIVE_UP_S:.0f} s")
                    return
                self._resend([order for order in self._orders.values() if order.was_sent], want)

    def _resend(self, orders: Iterable[FrameOrder], want: kv_transfer_pb2.Want) -> None:
        for order in orders:
            if not order.was_resent:
                order.was_resent = True
                self.result.num_resent_frames += 1
                self._put(want, order)

    async def _next_parts(self) -> tuple[list[BlockPart], bool]:
        """Everything that is ready, at least one part unless the input is finished."""
        parts: list[BlockPart] = []
        item = await self._ready.get()
        while item is not None:
            parts.append(item)
            if self._ready.empty():
                return parts, False
            item = self._ready.get_nowait()
        return parts, True

    def _send(self, want: kv_transfer_pb2.Want, parts: Sequence[BlockPart]) -> None:
        make, joined_bytes = (
            (LocalOrder, _LOCAL_RUN_BYTES) if want.local else (FrameOrder, self._peer.frame_bytes(want))
        )
        encode = partial(self._peer.coder.encode, frozenset(want.encodings))
        for run in cut(parts, self._layer_bytes, joined_bytes=joined_bytes):
            order = make(self._segment, self._layer_bytes, want.transfer_id, run, encode)
            self._store.pin(part.slot for part in run)
            if not self._orders:
                self._busy_since_s = time.monotonic()
            self._orders[order.key] = order
            self._put(want, order)

    def _put(self, want: kv_transfer_pb2.Want, order: FrameOrder) -> None:
        self.result.num_bytes += order.num_bytes
        self._peer.send(want, order)

    def _on_ack(self, want: kv_transfer_pb2.Want, ack: kv_transfer_pb2.FrameAck | str) -> None:
        if isinstance(ack, str):
            self._end(f"the stream to {self._peer.address} broke: {ack}")
            return
        key = ack.first_block, ack.first_layer
        order = self._orders.get(key)
        if order is None:
            return
        if ack.status == FrameAck.STATUS_STORED:
            self._num_stored_layers += len(order.parts) * order.parts[0].num_layers
            self.result.num_blocks = self._num_stored_layers // self._num_layers
            self.result.num_stored_bytes += order.num_bytes
            self._stored.append((time.time_ns(), order.num_bytes))
            self._settle(key)
        elif ack.status == FrameAck.STATUS_CORRUPT and not order.was_resent:
            self._resend([order], want)
        else:
            names = {value: name for name, value in FrameAck.Status.items()}
            self._end(f"{self._peer.address} answered {names.get(ack.status, ack.status)}")
        self._progress.set()

    def _settle(self, key: tuple[int, int]) -> None:
        """Nobody reads the order's slots any more."""
        order = self._orders.pop(key)
        if not self._orders:
            self.result.busy_s += time.monotonic() - self._busy_since_s
        order.drop()
        self._store.unpin([part.slot for part in order.parts])

    def _drop_orders(self) -> None:
        """What was not acknowledged is not wanted any more."""
        for key in list(self._orders):
            self._settle(key)

    def _end(self, error: str) -> None:
        self._over = True
        self.result.error = error
        self._progress.set()
        self.finish()
