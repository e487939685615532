"""How do frames come in without the event loop? Over gRPC on a port of their own, served by threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from kvrelay import grpc_options
from kvrelay.kv_transfer.collect_receiver import receive_runs
from kvrelay.kv_transfer.collectives import Collectives
from kvrelay.kv_transfer.receiver import Receiver
from kvrelay.kv_transfer.wire import SERVICE, FrameError, FrameHeader, decode_frame
from kvrelay.v1 import kv_transfer_pb2
from kvrelay.v1.kv_transfer_pb2 import FrameAck

MAX_STREAMS = 256
"""At a time: each takes a thread while it is open, and senders close those that they do not use. More are refused."""

_WINDOW_BYTES = 16 << 20
"""What may come ahead of the frame that is read. With 4 MiB large frames were measured to be a sixth slower; left to
itself gRPC lets in up to 115 MiB for a thread that is slow, and is no faster."""
_HEADER_BYTES = 64 << 10
"""What a message may have beside a frame's payload, with room to spare."""
_STOP_S = 2.0
_MAX_UNTOLD = 64
"""Frames before acks go out unasked."""
_MAX_NOTED = 1024
"""Transfers that a stream remembers before it forgets those that are over."""
_CUT_SHORT = "the stream ended without a last message that says so"


class PushServer:
    """Serves `KvTransfer.Push` into one receiver.

    Memory is bounded by the streams: each holds one frame here and the window ahead of it.
    """

    def __init__(self, receiver: Receiver, collectives: Collectives | None = None) -> None:
        """`collectives`: of the worker, if others may send to it through process groups."""
        self._receiver = receiver
        self._collectives = collectives
        self._server: grpc.Server | None = None
        self._threads: ThreadPoolExecutor | None = None

    def start(self, listen: str) -> int:
        """Serve at `listen` (host:port, 0 for a free one); returns the port. Raises `OSError` when it is taken."""
        self._threads = ThreadPoolExecutor(MAX_STREAMS, thread_name_prefix="kv-push")
        max_message_bytes = self._receiver.max_payload_bytes + _HEADER_BYTES
        options = [
            *grpc_options.server_options(max_message_bytes=max_message_bytes),
            *grpc_options.fixed_window(_WINDOW_BYTES),
        ]
        self._server = grpc.server(self._threads, options=options, maximum_concurrent_rpcs=MAX_STREAMS)
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Push": grpc.stream_stream_rpc_method_handler(
                self.push,
                request_deserializer=bytes,
                response_serializer=kv_transfer_pb2.FrameAcks.SerializeToString,
            ),
            "Copy": grpc.stream_stream_rpc_method_handler(
                self.copy,
                request_deserializer=kv_transfer_pb2.LocalRun.FromString,
                response_serializer=kv_transfer_pb2.FrameAcks.SerializeToString,
            ),
        }
        if self._collectives is not None:
            handlers["Collect"] = grpc.stream_stream_rpc_method_handler(
                self.collect,
                request_deserializer=kv_transfer_pb2.CollectRun.FromString,
                response_serializer=kv_transfer_pb2.FrameAcks.SerializeToString,
            )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = grpc_options.listen_at(self._server, listen)
        self._server.start()
        return port

    def stop(self) -> None:
        """End every stream and wait for its thread, for a while. Idempotent. `Collectives.close` comes before."""
        if self._server is not None:
            self._server.stop(None).wait(_STOP_S)
            self._server = None
        if self._threads is not None:  # gRPC leaves them waiting for work until somebody collects garbage.
            self._threads.shutdown(wait=False)
            self._threads = None

    def push(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[kv_transfer_pb2.FrameAcks]:
        """See kv_transfer.proto. In a thread of its own."""
        with self._stream() as transfer_ids:
            acks: list[FrameAck] = []
            is_last = 0
            for data in frames:
                try:
                    header, payload = decode_frame(data)
                except FrameError as error:
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
                is_last = header.is_last
                if header.num_blocks:
                    self._note(transfer_ids, header.transfer_id)
                    acks.append(_ack(header, self._receiver.place(header, payload)))
                if acks and (header.ack_now or acks[-1].status != FrameAck.STATUS_STORED or len(acks) == _MAX_UNTOLD):
                    yield self._tell(acks)
                    acks = []
            if acks:
                yield self._tell(acks)
            if not is_last:
                context.abort(grpc.StatusCode.ABORTED, _CUT_SHORT)

    def copy(
        self, runs: Iterator[kv_transfer_pb2.LocalRun], context: grpc.ServicerContext
    ) -> Iterator[kv_transfer_pb2.FrameAcks]:
        """See kv_transfer.proto. In a thread of its own."""
        with self._stream() as transfer_ids:
            for run in runs:
                if run.is_last:
                    return
                self._note(transfer_ids, run.transfer_id)
                header = FrameHeader(run.transfer_id, run.first_block, len(run.slots), run.first_layer, run.num_layers)
                yield self._tell([_ack(header, self._receiver.copy(run))])
            context.abort(grpc.StatusCode.ABORTED, _CUT_SHORT)

    def collect(
        self, messages: Iterator[kv_transfer_pb2.CollectRun], context: grpc.ServicerContext
    ) -> Iterator[kv_transfer_pb2.FrameAcks]:
        """See kv_transfer.proto. In a thread of its own."""
        assert self._collectives is not None
        with self._stream() as transfer_ids:
            try:
                for header, status in receive_runs(messages, self._receiver, self._collectives):
                    self._note(transfer_ids, header.transfer_id)
                    yield self._tell([_ack(header, status)])
            except ConnectionError as error:
                context.abort(grpc.StatusCode.ABORTED, str(error))
            except ValueError as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    def _tell(self, acks: Sequence[FrameAck]) -> kv_transfer_pb2.FrameAcks:
        self._receiver.announce()
        return kv_transfer_pb2.FrameAcks(acks=acks)

    def _note(self, transfer_ids: set[int], transfer_id: int) -> None:
        if len(transfer_ids) >= _MAX_NOTED:
            transfer_ids &= self._receiver.open_transfers()
        transfer_ids.add(transfer_id)

    @contextlib.contextmanager
    def _stream(self) -> Iterator[set[int]]:
        """Collects the transfers of one stream, which end with it unless the sender has ended it in order."""
        transfer_ids: set[int] = set()
        try:
            yield transfer_ids
        except BaseException:
            self._receiver.stream_broke(transfer_ids)
            raise


def _ack(header: FrameHeader, status: FrameAck.Status.ValueType) -> FrameAck:
    return FrameAck(
        transfer_id=header.transfer_id,
        first_block=header.first_block,
        num_blocks=header.num_blocks,
        first_layer=header.first_layer,
        num_layers=header.num_layers,
        status=status,
    )
