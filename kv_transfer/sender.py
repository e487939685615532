"""How does one request's KV get to the decode worker while prefill is still computing it?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvrelay.kv_transfer.peer import Peer, PeerError
from kvrelay.kv_transfer.segment import Segment
from kvrelay.kv_transfer.wire import MAX_PAYLOAD_BYTES, FrameHeader, checksum, encode_frame
from kvrelay.v1 import kv_transfer_pb2
from kvrelay.v1.kv_transfer_pb2 import FrameAck

_ACK_TIMEOUT_S = 30.0


@dataclass(slots=True)
class PushResult:
    """What became of a push."""

    num_blocks: int = 0
    num_bytes: int = 0
    num_resent_frames: int = 0
    num_missing_blocks: int = 0
    error: str = ""
    """Why the push ended early; empty when it did not."""


class Push:
    """Sends the blocks of one request as they become ready.

    The caller pins a slot for each `add`; `unpin` gets it back once the peer has acknowledged the block or does
    not want it, or when the push is over. A push never fails its request: what does not arrive is computed by the
    peer.
    """

    def __init__(
        self, peer: Peer, segment: Segment, offer: kv_transfer_pb2.OfferRequest, unpin: Callable[[Sequence[int]], None]
    ) -> None:
        self._peer = peer
        self._segment = segment
        self._offer = offer
        self._unpin = unpin
        self._held: dict[int, int] = {}
        self._ready: asyncio.Queue[int | None] = asyncio.Queue()
        self._to_resend: list[int] = []
        self._resent: set[int] = set()
        self._progress = asyncio.Event()
        self._over = False
        self.result = PushResult()

    def add(self, block: int, slot: int) -> None:
        """Block `block` of the offer is ready in `slot`, which the push unpins."""
        if self._over:
            self._unpin([slot])
            return
        self._held[block] = slot
        self._ready.put_nowait(block)

    def finish(self) -> None:
        """No more blocks are added."""
        self._ready.put_nowait(None)

    async def run(self) -> PushResult:
        """Offer, send, commit. No slot is held any more when this ends.

        Raises `LayoutRefusedError` when the two workers do not fit together.
        """
        try:
            await self._run()
        except PeerError as error:
            self.result.error = str(error)
        except TimeoutError:
            self.result.error = f"{self._peer.address} took nothing for {_ACK_TIMEOUT_S:.0f} s"
        finally:
            self.close()
        return self.result

    def close(self) -> None:
        """Unpin every slot that is still held; idempotent. The owner calls it, for a `run` that never started."""
        self._over = True
        self._unpin(list(self._held.values()))
        self._held.clear()

    async def _run(self) -> None:
        want = await self._peer.offer(self._offer)
        wanted = frozenset(want.blocks)
        with self._peer.acks(want.transfer_id, self._on_ack):
            finished = False
            while not (finished or self._over):
                blocks, finished = await self._next_blocks()
                for block in blocks:
                    if block not in wanted:
                        self._drop(block)
                for run in self._frames([block for block in blocks if block in wanted]):
                    await self._send(want.transfer_id, run)
            while self._held and not self._over:
                self._progress.clear()
                resend, self._to_resend = self._to_resend, []
                for run in self._frames(resend):
                    await self._send(want.transfer_id, run)
                async with asyncio.timeout(_ACK_TIMEOUT_S):
                    await self._progress.wait()
        self.result.num_missing_blocks = await self._peer.commit(want.transfer_id)

    async def _next_blocks(self) -> tuple[list[int], bool]:
        """Every block that is ready, at least one unless the input is finished."""
        blocks: list[int] = []
        item = await self._ready.get()
        while item is not None:
            blocks.append(item)
            if self._ready.empty():
                return blocks, False
            item = self._ready.get_nowait()
        return blocks, True

    def _frames(self, blocks: Sequence[int]) -> Iterator[list[int]]:
        """Cut into runs of neighbours that fit a frame."""
        most = max(1, MAX_PAYLOAD_BYTES // self._segment.slot_bytes)
        run: list[int] = []
        for block in blocks:
            if run and (block != run[-1] + 1 or len(run) == most):
                yield run
                run = []
            run.append(block)
        if run:
            yield run

    async def _send(self, transfer_id: int, run: Sequence[int]) -> None:
        parts = [self._segment.slot_view(self._held[block]) for block in run if block in self._held]
        if len(parts) < len(run):  # The push ended while waiting.
            return
        header = FrameHeader(transfer_id, run[0], len(run), 0, self._offer.layout.num_layers, checksum(parts))
        frame = encode_frame(header, parts)
        self.result.num_bytes += sum(len(part) for part in parts)
        for part in parts:  # A cancelled task's traceback would keep them, and the segment could not be closed.
            part.release()
        async with asyncio.timeout(_ACK_TIMEOUT_S):
            await self._peer.send(frame)

    def _on_ack(self, ack: kv_transfer_pb2.FrameAck | None) -> None:
        if ack is None:
            self._end(f"the stream to {self._peer.address} broke")
            return
        run = range(ack.first_block, ack.first_block + ack.num_blocks)
        if ack.status == FrameAck.STATUS_STORED:
            self.result.num_blocks += len(run)
            for block in run:
                self._drop(block)
        elif ack.status == FrameAck.STATUS_CORRUPT and not self._resent & set(run):
            self._resent.update(run)
            self._to_resend.extend(run)
            self.result.num_resent_frames += 1
        else:
            self._end(f"{self._peer.address} answered {FrameAck.Status.Name(ack.status)}")
        self._progress.set()

    def _drop(self, block: int) -> None:
        slot = self._held.pop(block, None)
        if slot is not None:
            self._unpin([slot])

    def _end(self, error: str) -> None:
        self._over = True
        self.result.error = error
        self._progress.set()
        self.finish()
