"""Which streams does a worker have right now? Their coordinators know."""

from __future__ import annotations

import asyncio

import grpc

from kvrelay.grpc_options import open_channel
from kvrelay.v1 import inference_pb2, inference_pb2_grpc
from tests.chaos.cluster import Cluster
from tests.chaos.load import Answer, Load
from tests.chaos.members import COORDINATORS

_TIMEOUT_S = 1.0


async def streams_on(cluster: Cluster, load: Load, worker_id: str) -> list[Answer]:
    """Open streams with a first token that this worker decodes; without those whose coordinator does not answer."""
    found = await asyncio.gather(*(_of_coordinator(cluster, load, name, worker_id) for name in COORDINATORS))
    return [stream for streams in found for stream in streams]


async def _of_coordinator(cluster: Cluster, load: Load, coordinator: str, worker_id: str) -> list[Answer]:
    streams = [each for each in load.open_answers if each.coordinator == coordinator and each.token_times_s]
    async with open_channel(cluster.addresses.listen[coordinator, "grpc"]) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        decode_ids = await asyncio.gather(*(_decode_worker(stub, each.plan.request_id) for each in streams))
    return [each for each, decode_id in zip(streams, decode_ids, strict=True) if decode_id == worker_id]


async def _decode_worker(stub: inference_pb2_grpc.InferenceAsyncStub, request_id: str) -> str | None:
    try:
        decision = await stub.Explain(inference_pb2.ExplainRequest(request_id=request_id), timeout=_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return None
    return decision.decode_worker_id
