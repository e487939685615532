"""Where do two workers meet to build a process group? In a torch TCPStore that the receiver hosts."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from kvrelay.kv_transfer.collective_group import GroupError
from kvrelay.v1.kv_transfer_pb2 import CollectiveBackend, CollectiveInvitation

_WORLD = "world"
_POLL_S = 0.005
_CONNECT_S = 3.0
"""For a store that has just taken a connection."""
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "[::]": "::1", "::": "::1"}  # noqa: S104


class Rendezvous:
    """The store of one worker, for all that send to it. Any thread."""

    def __init__(self, listen_host: str, advertised_host: str, timeout_s: float) -> None:
        """Listens at a free port. Raises `OSError`."""
        self.world = secrets.randbits(64)
        listen_host = listen_host.strip("[]")
        family, kind, _, _, address = socket.getaddrinfo(listen_host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listening:  # Left to itself, torch listens on every interface.
            listening.bind(address)
            listening.listen()
            self._port = listening.getsockname()[1]
            self._own_host = _WILDCARDS.get(listen_host, listen_host)
            try:
                self._server: TCPStore | None = TCPStore(
                    self._own_host,
                    self._port,
                    is_master=True,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=timeout_s),
                    master_listen_fd=listening.fileno(),
                )
                listening.detach()
                self._server.set(_WORLD, str(self.world))
            except RuntimeError as error:
                raise OSError(f"no TCPStore at {listen_host}: {error}") from error
        self._advertised_host = advertised_host

    def invitation(self, backend: CollectiveBackend.ValueType) -> CollectiveInvitation:
        """What a sender has to know."""
        return CollectiveInvitation(
            backend=backend, store_address=f"{self._advertised_host}:{self._port}", world=self.world
        )

    @property
    def own_address(self) -> str:
        """Where this worker itself reaches the store."""
        return f"{self._own_host}:{self._port}"

    def close(self) -> None:
        """Free the port; whoever waits in the store is told. Idempotent."""
        self._server = None


def meet(address: str, world: int, group_id: int, rank: int, stop: threading.Event, timeout_s: float) -> Store:
    """The part of the store at `address` that is this group's, once the other side is there as well.

    Raises `GroupError` at once when nobody listens there, when it is another receiver's store or `stop` is set, after
    some seconds when the store closes just then, and after `timeout_s` when the other side does not come.
    """
    end_s = time.monotonic() + timeout_s
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        # torch tries a port again that refuses, until the time is over, and the store may close just now.
        socket.create_connection((host, int(port)), timeout_s).close()
        connect_s = min(timeout_s, _CONNECT_S)
        client = TCPStore(
            host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=connect_s)
        )
        client.set_timeout(timedelta(seconds=timeout_s))
        if not client.check([_WORLD]) or client.get(_WORLD) != str(world).encode():
            raise GroupError(f"the store at {address} is another one")
        store = PrefixStore(f"{group_id:016x}", client)
        store.set(str(rank), "here")
        while not store.check([str(1 - rank)]):
            if stop.wait(_POLL_S) or time.monotonic() > end_s:
                raise GroupError(f"the other side did not come to {address}")
    except (OSError, RuntimeError) as error:
        if isinstance(error, GroupError):
            raise
        raise GroupError(f"no rendezvous at {address}: {error}") from error
    return store


def own_host_towards(address: str) -> str:
    """The address of this machine from which packets to `host:port` go. Sends nothing. Raises `GroupError`."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, _, _, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise GroupError(f"no way to {address}: {error}") from error
