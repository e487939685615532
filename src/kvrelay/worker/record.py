"""What does a worker say of itself to the cluster, and how does that change while it runs?"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from kvrelay.errors import InvalidRequestError
from kvrelay.v1 import cluster_pb2

_ROLES = (cluster_pb2.ROLE_PREFILL, cluster_pb2.ROLE_DECODE, cluster_pb2.ROLE_BOTH)

Publish = Callable[[cluster_pb2.WorkerInfo], Awaitable[None]]
"""Returns once the cluster's list says so. If it is cancelled before, the list will say so later."""


async def _nowhere(_: cluster_pb2.WorkerInfo) -> None:
    """For a worker that is in no list."""


class WorkerRecord:
    """The record of this process: the one copy, from which every other is made. No I/O of its own."""

    def __init__(self, info: cluster_pb2.WorkerInfo, publish: Publish = _nowhere) -> None:
        self.info = info
        self._publish = publish

    async def set_role(self, role: cluster_pb2.Role.ValueType) -> None:
        """Be there for other requests from now on; what comes under the old role is done all the same.

        Returns once the cluster knows. Raises `InvalidRequestError` for what is no role, or once the worker drains.
        """
        if role not in _ROLES:
            raise InvalidRequestError(f"role {role} is unknown; use 1 (prefill), 2 (decode) or 3 (both)", field="role")
        if self.info.state == cluster_pb2.WORKER_STATE_DRAINING:
            raise InvalidRequestError(f"worker {self.info.worker_id} drains, so it takes no other role", field="role")
        self.info.role = role
        await self._publish(self.info)

    async def drain(self, drain_s: float) -> None:
        """Be there for nothing new, and for `drain_s` for the rest. Returns once the cluster knows."""
        self.info.state = cluster_pb2.WORKER_STATE_DRAINING
        self.info.drain_s = drain_s
        await self._publish(self.info)
