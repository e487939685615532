"""How are changes of a key range followed without losing or doubling one?"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

from kvrelay.etcd import rpc_pb2
from kvrelay.etcd.errors import EtcdUnavailableError, WatchOutdatedError
from kvrelay.etcd.transport import Backoff, Stream, Transport

logger = logging.getLogger(__name__)

_WATCH = "/etcdserverpb.Watch/Watch"

_WatchStream = Stream[rpc_pb2.WatchRequest, rpc_pb2.WatchResponse]


class WatchPosition:
    """Which events of a watch are still to come. No I/O.

    A watch resumes behind the last event it delivered. The header's revision does not serve for that: it may be
    ahead of events that are on their way. A server whose revision lies before the position, or whose cluster id is
    another, does not hold the store that the position belongs to.
    """

    def __init__(self, start_revision: int, cluster_id: int) -> None:
        self.next_revision = start_revision
        self._cluster_id = cluster_id
        self._fragments: list[rpc_pb2.Event] = []

    def begin(self) -> None:
        """A new stream: what the last one left incomplete comes again."""
        self._fragments.clear()

    def take(self, response: rpc_pb2.WatchResponse) -> list[rpc_pb2.Event]:
        """The new events in a response, complete revisions only.

        Raises `WatchOutdatedError`, or `EtcdUnavailableError` when the server ended the watch.
        """
        header = response.header
        if response.canceled:
            if response.compact_revision:
                raise WatchOutdatedError(
                    f"revision {self.next_revision} is compacted; {response.compact_revision} is the oldest"
                )
            raise EtcdUnavailableError(f"etcd: watch ended: {response.cancel_reason}")
        if response.created:
            if self._cluster_id not in (0, header.cluster_id) or header.revision + 1 < self.next_revision:
                raise WatchOutdatedError("etcd holds another store than before")
            self._cluster_id = header.cluster_id
            return []
        self._fragments += response.events
        if response.fragment:
            return []
        events = [event for event in self._fragments if event.kv.mod_revision >= self.next_revision]
        self._fragments.clear()
        if events:
            self.next_revision = events[-1].kv.mod_revision + 1
        return events


async def watch(
    transport: Transport,
    key: bytes,
    range_end: bytes,
    *,
    start_revision: int,
    cluster_id: int = 0,
    on_connected: Callable[[bool], None] | None = None,
) -> AsyncGenerator[list[rpc_pb2.Event], None]:
    """Yield the events from `start_revision` on, in order, each once, through lost connections and restarts.

    `on_connected` hears when the watch is open and when it is interrupted. Close the generator (`aclosing`).
    Raises `WatchOutdatedError` when events are lost for good, `EtcdError` when etcd refuses the watch.
    """
    position = WatchPosition(start_revision, cluster_id)
    backoff = Backoff()
    connected = False
    while True:
        try:
            async with transport.stream(_WATCH, rpc_pb2.WatchRequest, rpc_pb2.WatchResponse) as stream:
                await _open(stream, position, key, range_end, transport.config.attempt_timeout_s)
                connected = _announce(True, on_connected)
                backoff.reset()
                while True:
                    if events := position.take(await stream.read()):
                        yield events
        except (EtcdUnavailableError, TimeoutError) as error:
            if connected:
                logger.warning("watch interrupted, trying again: %s", error)
                connected = _announce(False, on_connected)
            await asyncio.sleep(backoff.next_s())


async def _open(stream: _WatchStream, position: WatchPosition, key: bytes, range_end: bytes, timeout_s: float) -> None:
    create = rpc_pb2.WatchCreateRequest(
        key=key, range_end=range_end, start_revision=position.next_revision, fragment=True
    )
    position.begin()
    async with asyncio.timeout(timeout_s):
        await stream.write(rpc_pb2.WatchRequest(create_request=create))
        response = await stream.read()
    position.take(response)


def _announce(connected: bool, listener: Callable[[bool], None] | None) -> bool:
    if listener is not None:
        listener(connected)
    return connected
