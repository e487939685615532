"""Where do the processes of one run listen, log and keep their files?"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom

from kvrelay.launch.state import RunningCluster

_MAX_KEPT_LOGS = 20
_PORTS = range(16384, 32768)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Addresses and directories, every port chosen."""

    etcd: Sequence[str]
    http: str
    grpc: str
    log_dir: Path
    run_dir: Path

    @property
    def http_url(self) -> str:
        """The OpenAI API as this machine reaches it, without /v1."""
        return f"http://{_dialled(self.http)}"

    def http_url_at(self, port: int) -> str:
        """Another port of the OpenAI API's host, as this machine reaches it."""
        host = self.http.rpartition(":")[0]
        return f"http://{_dialled(f'{host}:{port}')}"

    @property
    def grpc_address(self) -> str:
        """The gRPC API as this machine reaches it."""
        return _dialled(self.grpc)

    def running_cluster(self, *, cluster: str, model: str) -> RunningCluster:
        """What this process says about itself."""
        return RunningCluster(
            pid=os.getpid(),
            http_url=self.http_url,
            grpc_address=self.grpc_address,
            etcd=tuple(self.etcd),
            cluster=cluster,
            model=model,
            log_dir=str(self.log_dir),
            run_dir=str(self.run_dir),
        )


def with_port(address: str) -> str:
    """The address with a port that is free now, where it has port 0.

    It is none of those that systems by default give to outgoing connections, for one of these could take it before it
    is bound. Raises `OSError` when there is none, or no such host.
    """
    host, _, port = address.rpartition(":")
    if port != "0":
        return address
    name = host.strip("[]")
    for candidate in SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket(socket.AF_INET6 if ":" in name else socket.AF_INET) as probe:
            try:
                probe.bind((name, candidate))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise
            return f"{host}:{candidate}"
    raise OSError(errno.EADDRINUSE, f"no port of {host} from {_PORTS[0]} to {_PORTS[-1]} is free")


def new_log_dir(state_dir: Path) -> Path:
    """A directory for this run's logs; of earlier ones the newest are kept."""
    logs = state_dir / "logs"
    log_dir = logs / time.strftime("%Y%m%d-%H%M%S")
    log_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    for old in sorted(path for path in logs.iterdir() if path.is_dir())[:-_MAX_KEPT_LOGS]:
        shutil.rmtree(old, ignore_errors=True)
    return log_dir


def _dialled(address: str) -> str:
    host, _, port = address.rpartition(":")
    everywhere = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - read, not bound
    return f"{everywhere.get(host, host)}:{port}"
