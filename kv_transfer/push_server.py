"""How do frames come in without the event loop? Over gRPC on a port of their own, served by threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from kvrelay import grpc_options
from kvrelay.kv_transfer.receiver import Receiver
from kvrelay.kv_transfer.service import SERVICE
from kvrelay.kv_transfer.wire import FrameError, decode_frame
from kvrelay.v1 import kv_transfer_pb2

MAX_STREAMS = 256
"""At a time: each takes a thread while it is open, and senders close those that they do not use. More are refused."""

_STOP_S = 2.0


class PushServer:
    """Serves `KvTransfer.Push` into one receiver.

    Memory is bounded by the streams: each holds one frame here and what gRPC's flow control lets in.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._server: grpc.Server | None = None

    def start(self, listen: str) -> int:
        """Serve at `listen` (host:port, 0 for a free one); returns the port. Raises `OSError` when it is taken."""
        threads = ThreadPoolExecutor(MAX_STREAMS, thread_name_prefix="kv-push")
        self._server = grpc.server(threads, options=grpc_options.server_options(), maximum_concurrent_rpcs=MAX_STREAMS)
        handler = grpc.stream_stream_rpc_method_handler(
            self.push,
            request_deserializer=bytes,
            response_serializer=kv_transfer_pb2.FrameAck.SerializeToString,
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Push": handler}),))
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise OSError(f"cannot listen at {listen} for KV blocks: {error}") from error
        self._server.start()
        return port

    def stop(self) -> None:
        """End every stream and wait for its thread, for a while. Idempotent."""
        if self._server is not None:
            self._server.stop(None).wait(_STOP_S)
            self._server = None

    def push(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[kv_transfer_pb2.FrameAck]:
        """See kv_transfer.proto. In a thread of its own."""
        unfinished: set[int] = set()
        half_closed = False
        try:
            for data in frames:
                try:
                    header, payload = decode_frame(data)
                except FrameError as error:
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
                unfinished.add(header.transfer_id)
                yield kv_transfer_pb2.FrameAck(
                    transfer_id=header.transfer_id,
                    first_block=header.first_block,
                    num_blocks=header.num_blocks,
                    first_layer=header.first_layer,
                    num_layers=header.num_layers,
                    status=self._receiver.place(header, payload),
                )
            half_closed = True
        finally:
            if not half_closed:
                self._receiver.stream_broke(unfinished)
