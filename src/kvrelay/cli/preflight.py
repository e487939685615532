"""What can be told to be wrong at once, before an engine takes half a minute to load?"""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

from kvrelay.cli.failure import UNREACHABLE, WRONG_USAGE, fail
from kvrelay.cli.parsing import ALL_INTERFACES, Address, Addresses

_CONNECT_TIMEOUT_S = 2.0


def check_etcd(etcd: Addresses) -> None:
    """Leaves with a message unless somebody listens at one of the addresses."""
    reasons = []
    for address in etcd:
        try:
            socket.create_connection((address.host, address.port), _CONNECT_TIMEOUT_S).close()
            return
        except OSError as error:
            reasons.append(f"{address}: {error.strerror or error}")
    fail(f"no etcd answers ({'; '.join(reasons)}); start it, or correct --etcd", UNREACHABLE)


def check_can_listen(option: str, address: Address) -> None:
    """Leaves with a message if the address is not this machine's, or the port is taken."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with contextlib.closing(socket.socket(family)) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address.host, address.port))
            probe.listen()
        except OSError as error:
            reason = error.strerror or str(error)
            fail(f"cannot listen at {option} {address}: {reason}; choose another address or port", WRONG_USAGE)


def check_disk(directory: Path, size_bytes: int, num_workers: int = 1) -> None:
    """Leaves with a message unless the directory has room for the KV blocks of so many workers."""
    if not size_bytes:
        return
    from kvrelay.kv_transfer.disk_file import check_room

    try:
        check_room(directory, size_bytes * num_workers)
    except ValueError as error:
        fail(f"--kv-disk-path: {error}; choose another folder or correct --kv-disk-bytes", WRONG_USAGE)


def check_otlp(endpoint: str | None) -> None:
    """Leaves with a message unless the endpoint is a complete URL, or None."""
    from kvrelay.tracing import check_endpoint

    if endpoint is not None:
        try:
            check_endpoint(endpoint)
        except ValueError as error:
            fail(f"--otlp: {error}", WRONG_USAGE)


def check_advertised(listen: Address, advertise: Address | None) -> None:
    """Leaves with a message when others could not dial it: no port, or all interfaces and nothing said."""
    check_dialled("--advertise", advertise)
    if advertise is None and listen.host in (ALL_INTERFACES, "::"):
        fail(f"others cannot dial {listen}; say with --advertise HOST:PORT where they reach this worker", WRONG_USAGE)


def check_dialled(option: str, address: Address | None) -> None:
    """Leaves with a message when the address has no port."""
    if address is not None and address.port == 0:
        fail(f"{option} {address} needs the port that others dial", WRONG_USAGE)
