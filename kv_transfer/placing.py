"""Does what arrives fit its transfer, and is it what was sent? Then it goes into the transfer's slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvrelay.kv_transfer.frame_decoder import FrameDecoder
from kvrelay.kv_transfer.landing import Buffer, LandingClosedError, OverlapError
from kvrelay.kv_transfer.neighbours import Neighbours, views_of
from kvrelay.kv_transfer.part_shape import EncodingError
from kvrelay.kv_transfer.transfer import Transfer
from kvrelay.kv_transfer.wire import MAX_PAYLOAD_BYTES, FrameHeader, checksum
from kvrelay.v1.kv_transfer_pb2 import FrameAck, LocalRun


class Placing:
    """For the threads that take blocks in: any of them may call this, while the event loop changes the transfers."""

    def __init__(
        self, transfers: Mapping[int, Transfer], decoder: FrameDecoder, neighbours: Neighbours, *, layer_bytes: int
    ) -> None:
        """`transfers` by id; `layer_bytes`: of one block."""
        self._transfers = transfers
        self._decoder = decoder
        self._neighbours = neighbours
        self._layer_bytes = layer_bytes
        self.max_payload_bytes = max(MAX_PAYLOAD_BYTES, layer_bytes)
        """Of one frame."""

    def place(self, header: FrameHeader, payload: memoryview) -> FrameAck.Status.ValueType:
        """Of a frame."""
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
        """Of a run in the segment of a sender on this machine."""
        transfer = self._transfers.get(run.transfer_id)
        if transfer is None or (source := self._neighbours.segment(transfer.source)) is None:
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
