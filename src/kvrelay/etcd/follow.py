"""How does a process keep a picture of all keys under a prefix, whatever happens to etcd?"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Never, Protocol

from kvrelay.etcd.client import DEFAULT_PAGE_KEYS, EtcdClient, Listing
from kvrelay.etcd.errors import EtcdError, WatchOutdatedError
from kvrelay.etcd.rpc_pb2 import Event, KeyValue
from kvrelay.etcd.transport import Backoff

logger = logging.getLogger(__name__)

DEFAULT_ABSENCE_GRACE_S = 10.0
_SLICE_S = 0.002

Steps = Iterable[object]
"""Work in pieces: one is done whenever the next item is asked for, and others may run between two of them."""


class Picture(Protocol):
    """What is made of the keys, in the event loop. A step must not block for more than a millisecond or so."""

    def replace(self, entries: Sequence[KeyValue]) -> Steps:
        """Take a whole listing. What it lacks is absent, but not gone yet."""

    def apply(self, events: Sequence[Event]) -> Steps:
        """Take changes in order."""

    def drop_absent(self) -> None:
        """What is still absent is gone. May come between two steps."""


async def follow_prefix(
    client: EtcdClient,
    prefix: bytes,
    picture: Picture,
    *,
    absence_grace_s: float = DEFAULT_ABSENCE_GRACE_S,
    on_connected: Callable[[bool], None] | None = None,
    page_keys: int = DEFAULT_PAGE_KEYS,
) -> Never:
    """Keep `picture` up to date until cancelled; run it as a task.

    While etcd is away the last known state stays. What is missing when etcd is back with another store or after a
    compaction has `absence_grace_s`, counted while etcd is there, to come back before it counts as gone.
    `on_connected` hears whether the picture is up to date. `page_keys` keys together must be less than 64 MiB. Raises
    `EtcdError` when etcd refuses the watch.
    """
    timer = _AbsenceTimer(absence_grace_s, picture.drop_absent)

    def announce(connected: bool) -> None:
        timer.on_connected(connected)
        if on_connected is not None:
            on_connected(connected)

    while True:
        listing = await _list(client, prefix, page_keys)
        await in_slices(picture.replace(listing.entries))
        start, cluster_id = listing.revision + 1, listing.cluster_id
        watch = client.watch_prefix(prefix, start_revision=start, cluster_id=cluster_id, on_connected=announce)
        try:
            async with aclosing(watch):
                async for events in watch:
                    await in_slices(picture.apply(events))
        except WatchOutdatedError as error:
            logger.warning("%s; listing %s again", error, prefix.decode())
            announce(False)
        finally:
            timer.cancel()


class _AbsenceTimer:
    """Calls back once a connection to etcd has lasted for the grace."""

    def __init__(self, grace_s: float, callback: Callable[[], None]) -> None:
        self._grace_s = grace_s
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None

    def on_connected(self, connected: bool) -> None:
        self.cancel()
        if connected:
            self._handle = asyncio.get_running_loop().call_later(self._grace_s, self._callback)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()


async def _list(client: EtcdClient, prefix: bytes, page_keys: int) -> Listing:
    """However long etcd takes."""
    backoff = Backoff()
    while True:
        try:
            return await client.list_prefix(prefix, page_keys=page_keys)
        except EtcdError as error:
            logger.warning("cannot list %s yet: %s", prefix.decode(), error)
            await asyncio.sleep(backoff.next_s())


async def in_slices(steps: Steps) -> None:
    """Others run whenever a few milliseconds have been spent."""
    began = time.perf_counter()
    for _ in steps:
        if time.perf_counter() - began > _SLICE_S:
            await asyncio.sleep(0)
            began = time.perf_counter()
