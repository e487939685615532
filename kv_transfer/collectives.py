"""Which process groups can a worker build with others, and which has it?

torch is imported where it is needed only: it takes seconds, and most workers need no group.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import structlog

from kvrelay.kv_transfer.collective_group import RECEIVER_RANK, SENDER_RANK, CollectiveConfig, Group, GroupError
from kvrelay.kv_transfer.transport import KvTransport
from kvrelay.v1.kv_transfer_pb2 import (
    COLLECTIVE_BACKEND_GLOO,
    COLLECTIVE_BACKEND_NCCL,
    CollectiveBackend,
    CollectiveGroup,
    CollectiveInvitation,
)

if TYPE_CHECKING:
    from kvrelay.kv_transfer.rendezvous import Rendezvous

_log = structlog.get_logger(__name__)


def usable_backends(transport: KvTransport) -> Sequence[CollectiveBackend.ValueType]:
    """What this process can build groups with, the best first. May import torch, which takes seconds."""
    if transport is not KvTransport.COLLECTIVE:
        return ()
    try:
        import torch
        import torch.distributed as dist
    except ImportError:
        return ()
    if not dist.is_available():
        return ()
    backends = []
    if dist.is_nccl_available() and torch.cuda.is_available():
        backends.append(COLLECTIVE_BACKEND_NCCL)
    if dist.is_gloo_available():
        backends.append(COLLECTIVE_BACKEND_GLOO)
    return backends


class Collectives:
    """All groups of one worker, as sender and as receiver. Belongs to the event loop but for what says so."""

    def __init__(
        self, backends: Sequence[CollectiveBackend.ValueType] = (), config: CollectiveConfig | None = None
    ) -> None:
        """`backends` may be set later; no group is ever made without."""
        self.backends = backends
        self.config = config or CollectiveConfig()
        self._hosts: tuple[str, str] | None = None
        self._rendezvous: Rendezvous | None = None
        self._starting = asyncio.Lock()
        self._lock = threading.Lock()
        self._groups: set[Group] = set()
        self._closing = threading.Event()

    def listen(self, listen_host: str, advertised_host: str) -> None:
        """From now on senders may be invited, to a store that listens and is reached at these hosts."""
        self._hosts = listen_host, advertised_host

    async def invite(self, offered: Iterable[int]) -> CollectiveInvitation | None:
        """For a sender with these backends; None when there is none in common, or no place to meet."""
        backend = next((backend for backend in self.backends if backend in offered), None)
        if backend is None or self._hosts is None or self._closing.is_set():
            return None
        async with self._starting:
            if self._rendezvous is None:
                from kvrelay.kv_transfer.rendezvous import Rendezvous

                try:
                    self._rendezvous = await asyncio.to_thread(Rendezvous, *self._hosts, self.config.open_s)
                except OSError as error:
                    _log.warning("no place to meet for process groups", error=str(error))
                    self._hosts = None
                    return None
        return self._rendezvous.invitation(backend)

    @contextlib.contextmanager
    def as_sender(
        self, invitation: CollectiveInvitation, group: CollectiveGroup, stop: threading.Event
    ) -> Iterator[Group]:
        """Build the group that an invitation is for. Any thread; blocks. Raises `GroupError`."""
        with self._open(
            invitation.store_address, invitation.world, group, SENDER_RANK, group.sender_host, stop
        ) as opened:
            yield opened

    @contextlib.contextmanager
    def as_receiver(self, group: CollectiveGroup) -> Iterator[Group]:
        """Build the group that a sender asks for. Any thread; blocks. Raises `GroupError`."""
        rendezvous = self._rendezvous
        if rendezvous is None or group.backend not in self.backends:
            raise GroupError("there is no invitation for such a group")
        from kvrelay.kv_transfer.rendezvous import own_host_towards

        own_host = own_host_towards(f"{group.sender_host}:9")
        with self._open(
            rendezvous.own_address, rendezvous.world, group, RECEIVER_RANK, own_host, self._closing
        ) as opened:
            yield opened

    @contextlib.contextmanager
    def _open(
        self, store_address: str, world: int, group: CollectiveGroup, rank: int, own_host: str, stop: threading.Event
    ) -> Iterator[Group]:
        from kvrelay.kv_transfer.rendezvous import meet

        store = meet(store_address, world, group.group_id, rank, stop, self.config.open_s)
        opened: Group
        if group.backend == COLLECTIVE_BACKEND_NCCL:
            from kvrelay.kv_transfer.nccl_group import NcclGroup

            opened = NcclGroup(store, rank, self.config)
        else:
            from kvrelay.kv_transfer.gloo_group import GlooGroup

            opened = GlooGroup(store, rank, own_host, self.config)
        del store  # And its connection.
        with self._lock:
            self._groups.add(opened)
        try:
            if stop.is_set() or self._closing.is_set():
                raise GroupError("this worker ends")
            yield opened
        finally:
            with self._lock:
                self._groups.discard(opened)
            opened.close()

    def close(self) -> None:
        """Break every group and build no more; their threads end soon. Any thread; idempotent."""
        self._closing.set()
        with self._lock:
            groups = list(self._groups)
        for group in groups:
            group.abort()
        if self._rendezvous is not None:
            self._rendezvous.close()
