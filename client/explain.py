"""Why did a request go where it went? The coordinator that planned it knows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from kvrelay.etcd import EtcdConfig, connect
from kvrelay.grpc_options import open_channel
from kvrelay.membership import list_coordinators
from kvrelay.v1 import cluster_pb2, inference_pb2, inference_pb2_grpc

_TIMEOUT_S = 5.0


class NotExplainedError(Exception):
    """No coordinator can tell; the message says why."""


async def explain(
    etcd: Sequence[str], cluster: str, request_id: str
) -> tuple[cluster_pb2.CoordinatorInfo, inference_pb2.Decision]:
    """Ask every coordinator of the cluster. Raises `EtcdError` and `NotExplainedError`."""
    async with connect(EtcdConfig(endpoints=list(etcd))) as client:
        coordinators = await list_coordinators(client, cluster)
    if not coordinators:
        raise NotExplainedError(f"no coordinator of cluster {cluster!r} is running")
    answers = await asyncio.gather(*(_ask(coordinator, request_id) for coordinator in coordinators))
    found = [
        (coordinator, answer)
        for coordinator, answer in zip(coordinators, answers, strict=True)
        if isinstance(answer, inference_pb2.Decision)
    ]
    if found:
        return max(found, key=lambda pair: pair[1].unix_ns)
    silent = [
        f"{coordinator.coordinator_id} does not answer: {answer}"
        for coordinator, answer in zip(coordinators, answers, strict=True)
        if isinstance(answer, str)
    ]
    known = f"none of {len(coordinators)} coordinators has planned request {request_id!r} of late"
    raise NotExplainedError("; ".join([known, *silent]))


async def _ask(coordinator: cluster_pb2.CoordinatorInfo, request_id: str) -> inference_pb2.Decision | str | None:
    """None when it does not know the request, a text when it cannot be asked."""
    async with open_channel(coordinator.own_grpc_address or coordinator.grpc_address) as channel:
        request = inference_pb2.ExplainRequest(request_id=request_id)
        try:
            return await inference_pb2_grpc.InferenceStub(channel).Explain(request, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None
            return error.details() or error.code().name
