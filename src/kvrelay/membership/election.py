"""Which one of several processes does what only one must do?

The leader is who created a key that did not exist, under a lease: it leads until the key is gone. Others watch the key.
The lease is lost here before it can expire in etcd, for its time counts from when a keep-alive was sent; so there are
never two leaders, unless one goes on although it is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from kvrelay.etcd import Creation, EtcdClient, EtcdError, EtcdUnavailableError, Lease, WatchOutdatedError
from kvrelay.etcd.transport import Backoff

logger = logging.getLogger(__name__)

DEFAULT_TTL_S = 5
_RESIGN_TIMEOUT_S = 2.0


class LeadershipLostError(EtcdError):
    """Somebody deleted or overwrote the leader's key."""


@asynccontextmanager
async def campaign(
    client: EtcdClient, key: bytes, candidate_id: str, *, ttl_s: int = DEFAULT_TTL_S
) -> AsyncIterator[None]:
    """Wait, for however long, until this process leads; then run the body, which is cancelled when it leads no more.

    Then, or when etcd is away for `ttl_s` while it waits, this raises `LeaseLostError`, `LeadershipLostError` or what
    else etcd says, always an `EtcdError`: campaign again. Leaving gives the leadership back, trying for two seconds.
    What the body raises comes out as it is.
    """
    lease = await client.grant_lease(ttl_s)
    try:
        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(client.keep_alive(lease), name=f"lease of {candidate_id}'s candidacy")
            won = await _win(client, key, candidate_id.encode(), lease)
            guarding = tasks.create_task(_until_deposed(client, key, lease, won), name=f"leadership of {candidate_id}")
            try:
                yield
            finally:
                keeping.cancel()
                guarding.cancel()
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        await _resign(client, lease)


async def _win(client: EtcdClient, key: bytes, value: bytes, lease: Lease) -> Creation:
    """Returns how the key was created, or found to be ours."""
    backoff = Backoff()
    while True:
        try:
            creation = await client.create(key, value, lease_id=lease.lease_id)
        except EtcdUnavailableError as error:
            logger.warning("cannot ask for %s yet: %s", key.decode(), error)
            await asyncio.sleep(backoff.next_s())
            continue
        # An attempt that seemed to fail may have created it.
        if creation.found is None or creation.found.lease == lease.lease_id:
            return creation
        backoff.reset()
        await _until_changed(client, key, creation)


async def _until_changed(client: EtcdClient, key: bytes, seen: Creation) -> None:
    """Until the key is not what it was at that revision, or may not be."""
    watching = client.watch_prefix(key, start_revision=seen.revision + 1, cluster_id=seen.cluster_id)
    try:
        async with aclosing(watching) as changes:
            async for events in changes:
                if any(event.kv.key == key for event in events):
                    return
    except WatchOutdatedError:
        return


async def _until_deposed(client: EtcdClient, key: bytes, lease: Lease, seen: Creation) -> None:
    """Raises `LeadershipLostError` when the key is not ours any more."""
    backoff = Backoff()
    while True:
        await _until_changed(client, key, seen)
        try:
            listing = await client.list_prefix(key)
        except EtcdUnavailableError:  # The lease tells for how long that may last.
            await asyncio.sleep(backoff.next_s())
            continue
        backoff.reset()
        if not any(entry.key == key and entry.lease == lease.lease_id for entry in listing.entries):
            raise LeadershipLostError(f"{key.decode()} was taken from its leader")
        seen = Creation(None, listing.revision, listing.cluster_id)


async def _resign(client: EtcdClient, lease: Lease) -> None:
    """Delete the key by ending its lease; without etcd the lease ends by itself."""
    try:
        async with asyncio.timeout(_RESIGN_TIMEOUT_S):
            await client.revoke_lease(lease.lease_id)
    except (EtcdError, TimeoutError) as error:
        reason = str(error) or f"etcd has not answered within {_RESIGN_TIMEOUT_S:g} s"
        logger.warning("could not resign: %s; another leader follows within %g s", reason, lease.ttl_s)
