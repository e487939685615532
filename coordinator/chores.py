"""What is done once for the whole cluster, by whichever coordinator leads? No request ever waits for it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Never

import structlog

from kvrelay.cancellation import raise_if_cancelled
from kvrelay.etcd import EtcdClient, EtcdError
from kvrelay.etcd.transport import Backoff
from kvrelay.membership import campaign, chores_key

_log = structlog.get_logger(__name__)

_MOST_PERIOD_S = 60.0


class History:
    """Which revisions of etcd are old enough to be forgotten? No I/O."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._seen: deque[tuple[float, int]] = deque()
        self._forgotten = 0

    def note(self, now_s: float, revision: int) -> int | None:
        """Take the newest revision; returns one up to which everything may go, None when nothing more may."""
        self._seen.append((now_s, revision))
        old = self._forgotten
        while self._seen and now_s - self._seen[0][0] >= self._keep_s:
            old = self._seen.popleft()[1]
        if old <= self._forgotten:
            return None
        self._forgotten = old
        return old


class Chores:
    """Those of one cluster. Every coordinator runs them; they do something at the leader only."""

    def __init__(self, cluster: str, coordinator_id: str, *, etcd_history_s: float | None) -> None:
        """Etcd is made to forget what was overwritten or deleted so long ago; None: it is not."""
        self._key = chores_key(cluster)
        self._coordinator_id = coordinator_id
        self._etcd_history_s = etcd_history_s
        self.is_leading = False

    async def run(self, client: EtcdClient) -> None:
        """Until cancelled; then the leadership is given back. Returns at once when there is nothing to do.

        While etcd is away nobody leads.
        """
        if self._etcd_history_s is None:
            return
        backoff = Backoff()
        while True:
            try:
                async with campaign(client, self._key, self._coordinator_id):
                    _log.info("leading")
                    self.is_leading = True
                    backoff.reset()
                    await _keep_history_short(client, self._etcd_history_s)
            except EtcdError as error:
                _log.warning("leading no more" if self.is_leading else "not leading", reason=str(error))
            finally:
                self.is_leading = False
            raise_if_cancelled()
            await asyncio.sleep(backoff.next_s())


async def _keep_history_short(client: EtcdClient, keep_s: float) -> Never:
    history = History(keep_s)
    while True:
        try:
            revision = history.note(time.monotonic(), (await client.status()).header.revision)
            if revision is not None:
                await client.compact(revision)
                _log.info("etcd's history is compacted", revision=revision)
        except EtcdError as error:  # Away, or somebody else compacts, too. The lease tells when to stop leading.
            _log.warning("etcd's history is not compacted", reason=str(error))
        await asyncio.sleep(min(_MOST_PERIOD_S, keep_s / 10))
