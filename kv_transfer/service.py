"""The control half of the KvTransfer service: translates between the wire and the receiver."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from kvrelay.kv_transfer.collectives import Collectives
from kvrelay.kv_transfer.lending import BusyError
from kvrelay.kv_transfer.offers import LayoutMismatchError, OfferError
from kvrelay.kv_transfer.peer import PeerError
from kvrelay.kv_transfer.receiver import Receiver
from kvrelay.kv_transfer.wire import SERVICE
from kvrelay.v1 import kv_transfer_pb2

_Context = grpc.aio.ServicerContext[Any, Any]


class KvTransferService:
    """Handlers of one worker. Frames come in elsewhere: `push_server`."""

    def __init__(
        self,
        receiver: Receiver,
        push_address: str,
        lend: Callable[[kv_transfer_pb2.FetchRequest], int],
        *,
        maps_memory: bool = True,
        collectives: Collectives | None = None,
    ) -> None:
        """`push_address`: host:port where senders reach this worker's `PushServer`; `lend`: `Lender.lend`.

        `maps_memory`: whether it copies out of the memory of senders on this machine; `collectives`: `PushServer`'s.
        """
        self._maps_memory = maps_memory
        self._collectives = collectives
        self._receiver = receiver
        self._lend = lend
        self._push_address = push_address

    async def offer(self, request: kv_transfer_pb2.OfferRequest, context: _Context) -> None:
        """See kv_transfer.proto."""
        receiver = self._receiver
        local = self._maps_memory and receiver.meet(request.local)
        invitation = await self._collectives.invite(request.collective) if self._collectives and not local else None
        try:
            reservation = receiver.offer(
                request.request_id,
                request.layout,
                request.block_hashes,
                source=request.local.proof if local else b"",
                owner=request.coordinator_id,
            )
        except LayoutMismatchError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except OfferError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        want = kv_transfer_pb2.Want(
            transfer_id=reservation.transfer_id,
            blocks=reservation.blocks,
            reason=reservation.reason,
            push_address=self._push_address,
            local=local,
            encodings=receiver.encodings,
            collective=invitation,
        )
        try:
            await context.write(want)
            await asyncio.Event().wait()  # Until the sender ends the call, or its connection does, or this server.
        finally:
            receiver.abandon(reservation.transfer_id)

    async def commit(self, request: kv_transfer_pb2.CommitRequest, context: _Context) -> kv_transfer_pb2.CommitResponse:
        """See kv_transfer.proto."""
        return kv_transfer_pb2.CommitResponse(num_missing_blocks=self._receiver.commit(request.transfer_id))

    async def fetch(self, request: kv_transfer_pb2.FetchRequest, context: _Context) -> kv_transfer_pb2.FetchResponse:
        """See kv_transfer.proto."""
        try:
            num_blocks = self._lend(request)
        except LayoutMismatchError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except (OfferError, PeerError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except BusyError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        return kv_transfer_pb2.FetchResponse(num_blocks=num_blocks)


def add_to_server(service: KvTransferService, server: grpc.aio.Server) -> None:
    """Register the handlers."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Offer": grpc.unary_stream_rpc_method_handler(
            service.offer,
            request_deserializer=kv_transfer_pb2.OfferRequest.FromString,
            response_serializer=kv_transfer_pb2.Want.SerializeToString,
        ),
        "Commit": grpc.unary_unary_rpc_method_handler(
            service.commit,
            request_deserializer=kv_transfer_pb2.CommitRequest.FromString,
            response_serializer=kv_transfer_pb2.CommitResponse.SerializeToString,
        ),
        "Fetch": grpc.unary_unary_rpc_method_handler(
            service.fetch,
            request_deserializer=kv_transfer_pb2.FetchRequest.FromString,
            response_serializer=kv_transfer_pb2.FetchResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
