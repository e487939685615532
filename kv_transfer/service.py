"""The KvTransfer service: translates between the wire and the receiver."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from kvrelay.kv_transfer.receiver import LayoutMismatchError, OfferError, Receiver
from kvrelay.kv_transfer.wire import FrameError, decode_frame
from kvrelay.v1 import kv_transfer_pb2

SERVICE = "kvrelay.v1.KvTransfer"

_Context = grpc.aio.ServicerContext[bytes, bytes]


class KvTransferService:
    """Handlers of one worker. Frames stay bytes until `decode_frame` slices them."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    async def offer(self, request: kv_transfer_pb2.OfferRequest, context: _Context) -> kv_transfer_pb2.Want:
        """See kv_transfer.proto."""
        try:
            transfer_id, blocks = self._receiver.offer(request.request_id, request.layout, request.block_hashes)
        except LayoutMismatchError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except OfferError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return kv_transfer_pb2.Want(transfer_id=transfer_id, blocks=blocks)

    async def push(self, frames: AsyncIterator[bytes], context: _Context) -> AsyncIterator[kv_transfer_pb2.FrameAck]:
        """See kv_transfer.proto. With the stream end the transfers on it: whoever waits computes the rest at once."""
        unfinished: set[int] = set()
        try:
            async for data in frames:
                try:
                    header, payload = decode_frame(data)
                except FrameError as error:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
                status = self._receiver.place(header, payload)
                if self._receiver.is_open(header.transfer_id):
                    unfinished.add(header.transfer_id)
                else:
                    unfinished.discard(header.transfer_id)
                yield kv_transfer_pb2.FrameAck(
                    transfer_id=header.transfer_id,
                    first_block=header.first_block,
                    num_blocks=header.num_blocks,
                    status=status,
                )
        finally:
            for transfer_id in unfinished:
                self._receiver.commit(transfer_id)

    async def commit(self, request: kv_transfer_pb2.CommitRequest, context: _Context) -> kv_transfer_pb2.CommitResponse:
        """See kv_transfer.proto."""
        return kv_transfer_pb2.CommitResponse(num_missing_blocks=self._receiver.commit(request.transfer_id))


def add_to_server(service: KvTransferService, server: grpc.aio.Server) -> None:
    """Register the handlers; `Push` with the bytes as they come, which generated code does not offer."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Offer": grpc.unary_unary_rpc_method_handler(
            service.offer,
            request_deserializer=kv_transfer_pb2.OfferRequest.FromString,
            response_serializer=kv_transfer_pb2.Want.SerializeToString,
        ),
        "Push": grpc.stream_stream_rpc_method_handler(
            service.push,
            request_deserializer=bytes,
            response_serializer=kv_transfer_pb2.FrameAck.SerializeToString,
        ),
        "Commit": grpc.unary_unary_rpc_method_handler(
            service.commit,
            request_deserializer=kv_transfer_pb2.CommitRequest.FromString,
            response_serializer=kv_transfer_pb2.CommitResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
