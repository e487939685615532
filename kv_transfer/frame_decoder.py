"""What are the blocks of a frame, however its payload is coded?"""

from __future__ import annotations

from collections.abc import Sequence

from kvrelay.kv_transfer.encoding import Encoding, decode
from kvrelay.kv_transfer.part_shape import EncodingError, PartShape
from kvrelay.kv_transfer.wire import FrameHeader
from kvrelay.v1 import kv_transfer_pb2
from kvrelay.v1.cluster_pb2 import KvLayout


class FrameDecoder:
    """Of one receiver. Any thread."""

    def __init__(self, layout: KvLayout, encodings: Sequence[Encoding]) -> None:
        self.layout = layout
        self._encodings = {encoding.value: encoding for encoding in encodings}

    @property
    def encodings(self) -> Sequence[kv_transfer_pb2.Encoding.ValueType]:
        """Values of those that are taken."""
        return [kv_transfer_pb2.Encoding.ValueType(value) for value in self._encodings]

    def decode(self, header: FrameHeader, payload: memoryview) -> memoryview:
        """The blocks one after the other: the payload itself, or memory of their size.

        The header's counts must be checked before. Raises `EncodingError` for a payload that is none of these blocks.
        """
        if not header.encoding:
            return payload
        encoding = self._encodings.get(header.encoding)
        if encoding is None:
            raise EncodingError(f"frames are coded in the way {header.encoding}, which was not agreed")
        shape = PartShape.of(self.layout, header.num_layers)
        blocks = memoryview(bytearray(header.num_blocks * shape.num_bytes))
        size = shape.num_bytes
        decode(encoding, shape, payload, [blocks[i * size : (i + 1) * size] for i in range(header.num_blocks)])
        return blocks
