"""A worker serves in both roles for a while."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import grpc

from kvrelay.grpc_options import open_channel
from kvrelay.v1 import cluster_pb2, worker_pb2, worker_pb2_grpc
from tests.chaos.faults.base import BACK_TIMEOUT_S, Fault, Lab
from tests.chaos.members import PREFILL, WORKERS

_CALL_TIMEOUT_S = 5.0


class ChangeRole(Fault):
    """Told by the call that `kvrelay role set` makes; etcd may be away, or the worker itself."""

    name = "change-role"

    def __init__(self, rng: random.Random) -> None:
        self.target = rng.choice(WORKERS)
        self.hold_s = rng.uniform(1.0, 8.0)

    async def inject(self, lab: Lab) -> None:
        with suppress(grpc.aio.AioRpcError):
            await self._set(lab, cluster_pb2.ROLE_BOTH)

    async def heal(self, lab: Lab) -> None:
        role = cluster_pb2.ROLE_PREFILL if self.target in PREFILL else cluster_pb2.ROLE_DECODE
        async with asyncio.timeout(BACK_TIMEOUT_S):
            while True:
                with suppress(grpc.aio.AioRpcError):
                    await self._set(lab, role)
                    return
                await asyncio.sleep(0.1)

    async def _set(self, lab: Lab, role: cluster_pb2.Role.ValueType) -> None:
        async with open_channel(lab.cluster.addresses.listen[self.target, "grpc"]) as channel:
            request = worker_pb2.SetRoleRequest(role=role)
            await worker_pb2_grpc.WorkerStub(channel).SetRole(request, timeout=_CALL_TIMEOUT_S)
