"""What must be sent, until it is acknowledged: consecutive blocks with the same layers, a message's worth."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvrelay.kv_transfer.block_part import BlockPart
from kvrelay.kv_transfer.segment import Segment
from kvrelay.kv_transfer.wire import FRAME_BYTES, MAX_PAYLOAD_BYTES, FrameHeader, checksum, encode_frame
from kvrelay.v1.kv_transfer_pb2 import LocalRun

Encode = Callable[[int, Sequence[memoryview]], tuple[int, Sequence[memoryview | bytes]]]


def as_it_is(_num_layers: int, views: Sequence[memoryview]) -> tuple[int, Sequence[memoryview | bytes]]:
    """No encoding."""
    return 0, views


class FrameOrder:
    """One frame to be made by the thread that sends it.

    Its slots are pinned as long as somebody may `encode` it: after `drop` has returned nobody reads them.
    """

    def __init__(
        self,
        segment: Segment,
        layer_bytes: int,
        transfer_id: int,
        parts: Sequence[BlockPart],
        encode: Encode = as_it_is,
    ) -> None:
        """`encode`: the layers of some blocks -> value of an `Encoding`, and the payload in pieces."""
        self.parts = parts
        self.was_sent = False
        self.was_resent = False
        self._segment = segment
        self._layer_bytes = layer_bytes
        self._transfer_id = transfer_id
        self._encode = encode
        self._lock = threading.Lock()
        self._dropped = False

    @property
    def key(self) -> tuple[int, int]:
        """First block and first layer: what an ack names."""
        return self.parts[0].block, self.parts[0].first_layer

    @property
    def num_bytes(self) -> int:
        return len(self.parts) * self.parts[0].num_layers * self._layer_bytes

    def encode(self, *, ack_now: bool) -> bytes | None:
        """The frame, or None when it is not wanted any more. Any thread."""
        with self._lock:
            if self._dropped:
                return None
            self.was_sent = True
            first = self.parts[0]
            offset, size = first.first_layer * self._layer_bytes, first.num_layers * self._layer_bytes
            views = [self._segment.slot_view(part.slot, offset, size) for part in self.parts]
            try:
                encoding, pieces = self._encode(first.num_layers, views)
                header = FrameHeader(
                    self._transfer_id, first.block, len(views), first.first_layer, first.num_layers, ack_now, encoding
                )
                return encode_frame(header, pieces)
            finally:
                for view in views:  # A traceback would keep them, and the segment could not be closed.
                    view.release()

    def gather(self, into: npt.NDArray[np.uint8]) -> FrameHeader | None:
        """Copy the blocks to the beginning of `into`, as they are, for a way that takes header and payload apart.

        Returns the frame's header with its checksum, or None when it is not wanted any more. Any thread.
        """
        with self._lock:
            if self._dropped:
                return None
            self.was_sent = True
            first = self.parts[0]
            offset, size = first.first_layer * self._layer_bytes, first.num_layers * self._layer_bytes
            views = [self._segment.slot_view(part.slot, offset, size) for part in self.parts]
            try:
                for i, view in enumerate(views):
                    np.copyto(into[i * size : (i + 1) * size], np.frombuffer(view, np.uint8))
                header = FrameHeader(
                    transfer_id=self._transfer_id,
                    first_block=first.block,
                    num_blocks=len(views),
                    first_layer=first.first_layer,
                    num_layers=first.num_layers,
                )
                return dataclasses.replace(header, checksum=checksum(header, views))
            finally:
                for view in views:
                    view.release()

    def drop(self) -> None:
        """Do not send it; waits while it is being made, a copy of some megabytes at most. Idempotent."""
        with self._lock:
            self._dropped = True


class LocalOrder(FrameOrder):
    """For a receiver on the same machine: the message says where the blocks are, their bytes stay.

    The receiver may still read the slots after `drop`; it learns from their generations that it must not use them.
    """

    def encode(self, *, ack_now: bool) -> bytes | None:
        """A LocalRun; each is acknowledged at once."""
        with self._lock:
            if self._dropped:
                return None
            self.was_sent = True
            first = self.parts[0]
            slots = [part.slot for part in self.parts]
            run = LocalRun(
                transfer_id=self._transfer_id,
                first_block=first.block,
                first_layer=first.first_layer,
                num_layers=first.num_layers,
                slots=slots,
                generations=[self._segment.generation(slot) for slot in slots],
            )
            return run.SerializeToString()


def cut(parts: Sequence[BlockPart], layer_bytes: int, *, joined_bytes: int = FRAME_BYTES) -> Iterator[list[BlockPart]]:
    """Into lists for a message each: neighbours with the same layers are joined, large parts are divided by layers."""
    run: list[BlockPart] = []
    for part in parts:
        for piece in _divide(part, max(1, MAX_PAYLOAD_BYTES // layer_bytes)):
            if run and not (_joins(run[-1], piece) and (len(run) + 1) * piece.num_layers * layer_bytes <= joined_bytes):
                yield run
                run = []
            run.append(piece)
    if run:
        yield run


def _divide(part: BlockPart, most_layers: int) -> Iterator[BlockPart]:
    end = part.first_layer + part.num_layers
    for first in range(part.first_layer, end, most_layers):
        yield part._replace(first_layer=first, num_layers=min(most_layers, end - first))


def _joins(last: BlockPart, part: BlockPart) -> bool:
    layers = last.first_layer, last.num_layers
    return part.block == last.block + 1 and (part.first_layer, part.num_layers) == layers
