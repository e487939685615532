"""How is a lease kept alive, and when is it lost?"""

from __future__ import annotations

import asyncio
from typing import Never

from kvrelay.etcd import rpc_pb2
from kvrelay.etcd.errors import EtcdUnavailableError, LeaseLostError
from kvrelay.etcd.transport import Backoff, Stream, Transport

_KEEP_ALIVE = "/etcdserverpb.Lease/LeaseKeepAlive"

_KeepAliveStream = Stream[rpc_pb2.LeaseKeepAliveRequest, rpc_pb2.LeaseKeepAliveResponse]


class LeaseClock:
    """When a lease surely still lives: its time counts from when an answered keep-alive was sent. No I/O."""

    def __init__(self, lease_id: int, ttl_s: float, now: float) -> None:
        self.lease_id = lease_id
        self.ttl_s = ttl_s
        self._expires_at = now + ttl_s

    def left_s(self, now: float) -> float:
        return self._expires_at - now

    def check(self, now: float) -> None:
        """Raises `LeaseLostError` when the time is over."""
        if self.left_s(now) <= 0:
            raise LeaseLostError(self.lease_id)

    def acknowledge(self, sent_at: float, ttl_s: int) -> None:
        """Take an answer to the keep-alive of `sent_at`. Raises `LeaseLostError` when it says the lease is gone."""
        if ttl_s <= 0:
            raise LeaseLostError(self.lease_id)
        self._expires_at = max(self._expires_at, sent_at + self.ttl_s)


async def keep_alive(transport: Transport, lease_id: int, ttl_s: float, *, granted_at: float) -> Never:
    """Renew the lease three times within its time until cancelled. `granted_at` is on the loop's clock.

    Raises `LeaseLostError` when etcd says that it is gone or has not answered for `ttl_s`, `EtcdError` when etcd
    refuses the call.
    """
    loop = asyncio.get_running_loop()
    clock = LeaseClock(lease_id, ttl_s, granted_at)
    backoff = Backoff()
    while True:
        try:
            async with transport.stream(
                _KEEP_ALIVE, rpc_pb2.LeaseKeepAliveRequest, rpc_pb2.LeaseKeepAliveResponse
            ) as stream:
                while True:
                    await _renew(stream, clock, transport.config.attempt_timeout_s)
                    backoff.reset()
                    await asyncio.sleep(ttl_s / 3)
        except (EtcdUnavailableError, TimeoutError):
            clock.check(loop.time())
            await asyncio.sleep(min(backoff.next_s(), max(0.0, clock.left_s(loop.time()))))


async def _renew(stream: _KeepAliveStream, clock: LeaseClock, timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    sent_at = loop.time()
    async with asyncio.timeout(min(timeout_s, max(0.05, clock.left_s(sent_at)))):
        await stream.write(rpc_pb2.LeaseKeepAliveRequest(ID=clock.lease_id))
        response = await stream.read()
    clock.acknowledge(sent_at, response.TTL)
