"""Offers, commits and requests for a prefix: each gets its answer or an error, and reserves nothing beyond its call."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

from google.protobuf.message import DecodeError

from kvrelay.engine.simulated_model import SimulatedConfig
from kvrelay.kv_transfer.service import KvTransferService
from kvrelay.tracing import Tracing
from kvrelay.v1 import cluster_pb2
from kvrelay.v1.kv_transfer_pb2 import COLLECTIVE_BACKEND_GLOO, CommitRequest, FetchRequest, LocalSegment, OfferRequest
from tests.fuzz.calls import AbortedError, Call
from tests.fuzz.target import BETWEEN, AsyncCheck, Target, in_loop, joined, pieces
from tests.support.eventually import eventually
from tests.support.simulated_cluster import SimulatedWorker, is_idle, simulated_worker

_CONFIG = SimulatedConfig(num_layers=2, num_kv_heads=1, max_model_len_tokens=256, num_engine_blocks=64, time_scale=0)
_OFFER, _COMMIT, _FETCH = 0, 1, 2


@contextlib.asynccontextmanager
async def _open() -> AsyncIterator[AsyncCheck]:
    async with simulated_worker("w", cluster_pb2.ROLE_BOTH, "m", _CONFIG, Tracing()) as worker:
        host = worker.host
        service = KvTransferService(host.receiver, "127.0.0.1:9", host.lender.lend, collectives=host.collectives)
        (slot,) = host.store.reserve(1)
        host.store.unpin([host.store.commit(slot, bytes(16))])
        yield lambda data: _check(worker, service, data)


async def _check(worker: SimulatedWorker, service: KvTransferService, data: bytes) -> None:
    """The first byte of each message says which call it is."""
    receiver = worker.host.receiver
    request_ids: list[str] = []
    transfer_ids: list[int] = []
    async with asyncio.TaskGroup() as group:
        tasks = []
        for piece in pieces(data):
            call = Call()
            handler = _handler(worker, service, piece, transfer_ids, request_ids, call)
            tasks.append(group.create_task(handler))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            transfer_ids += [want.transfer_id for want in call.written]
        for task in tasks:
            task.cancel()

    def over() -> bool:
        for request_id in request_ids:  # Of a committed offer: its request would come for the blocks.
            receiver.cancel(request_id)
        return is_idle(worker)

    await eventually(over, "nothing is held")


async def _handler(
    worker: SimulatedWorker,
    service: KvTransferService,
    piece: bytes,
    transfer_ids: list[int],
    request_ids: list[str],
    call: Call,
) -> None:
    context = cast("Any", call)
    with contextlib.suppress(AbortedError, DecodeError):
        match piece[0] % 3 if piece else None:
            case 0:
                offer = OfferRequest.FromString(piece[1:])
                if piece[0] & 4 == 0:
                    offer.layout.CopyFrom(worker.info.layout)
                request_ids.append(offer.request_id)
                await service.offer(offer, context)
            case 1:
                commit = CommitRequest.FromString(piece[1:])
                if transfer_ids and commit.transfer_id % 4:
                    commit.transfer_id = transfer_ids[commit.transfer_id % len(transfer_ids)]
                await service.commit(commit, context)
            case 2:
                fetch = FetchRequest.FromString(piece[1:])
                request_ids.append(fetch.request_id)
                fetch.layout.CopyFrom(worker.info.layout)
                if len(fetch.address) % 2:
                    fetch.address = worker.info.address
                await service.fetch(fetch, context)


def _seeds() -> Iterator[bytes]:
    hashes = b"".join(bytes([i]) * 16 for i in range(5))
    local = LocalSegment(path="/proc/1/fd/3", proof=bytes(16))
    offer = OfferRequest(request_id="r", block_hashes=hashes, coordinator_id="c")
    near = OfferRequest(request_id="s", block_hashes=hashes, local=local, collective=[COLLECTIVE_BACKEND_GLOO])
    commit = CommitRequest(transfer_id=1)
    fetch = FetchRequest(request_id="f", block_hashes=hashes, address="a")
    for calls in (
        [(_OFFER, offer), (_COMMIT, commit), (_OFFER, near)],
        [(_OFFER, near), (_OFFER, near), (_COMMIT, CommitRequest(transfer_id=4))],
        [(_FETCH, fetch), (_OFFER, offer)],
        [(_OFFER + 6, offer)],
    ):
        yield joined(bytes([kind]) + message.SerializeToString() for kind, message in calls)


TARGET = Target("kv_calls", "Offer, Commit and Fetch requests", lambda: in_loop(_open), _seeds, (BETWEEN,))
