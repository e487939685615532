"""How do several coordinators serve at the same two ports of one machine?

A small process holds the ports and starts the replicas, each of which listens at both (SO_REUSEPORT): the system gives
every new connection to one of them. None leads, and none knows of the others.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import structlog

from kvrelay.coordinator.http_server import bind
from kvrelay.etcd import EtcdConfig, connect
from kvrelay.launch.marked_processes import VARIABLE
from kvrelay.launch.readiness import Presence
from kvrelay.launch.start import Start
from kvrelay.launch.supervisor import ChildSpec, Supervisor, SupervisorConfig, supervise
from kvrelay.membership import follow_coordinators
from kvrelay.signals import ASKING

_log = structlog.get_logger(__name__)

_GRACE_S = 6.0
"""A coordinator drains for 5 s; `kvrelay up` gives all of this 7 s."""
_EXIT_FAILED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicasConfig:
    """Everything the process above the replicas needs to know."""

    coordinator_id: str
    """The replicas' own are this, a dash and a number."""
    num_replicas: int
    etcd: Sequence[str]
    """host:port of every member."""
    cluster: str
    http_listen: str
    grpc_listen: str
    """host:port; port 0 takes a free one, the same for all."""
    arguments: Sequence[str]
    """Of the `kvrelay` command that runs one of them; its addresses and id are added."""
    environment: Mapping[str, str]
    """What they inherit."""


def replica_ids(coordinator_id: str, num_replicas: int) -> list[str]:
    """What the processes of a coordinator are called. A single one has the coordinator's own id."""
    if num_replicas == 1:
        return [coordinator_id]
    return [f"{coordinator_id}-{index}" for index in range(num_replicas)]


def run_replicas(config: ReplicasConfig) -> int:
    """Keep the replicas running until SIGTERM or SIGINT, which they get too; a second one kills them.

    Returns 0, or an exit code that tells why they cannot start. Raises `OSError` for an address that cannot be had.
    """
    with (
        closing(bind(config.http_listen, shares_port=True)) as http,
        closing(bind(config.grpc_listen, shares_port=True)) as grpc,
    ):
        # Neither socket listens, so no connection comes here; they keep others from the ports while no replica lives.
        listen = {
            "--http": _with_port(config.http_listen, http.getsockname()[1]),
            "--grpc": _with_port(config.grpc_listen, grpc.getsockname()[1]),
        }
        return asyncio.run(_Replicas(config, listen).run())


class _Replicas:
    """One run. Listens to its supervisor."""

    def __init__(self, config: ReplicasConfig, listen: Mapping[str, str]) -> None:
        self._config = config
        self._listen = listen
        self._ids = replica_ids(config.coordinator_id, config.num_replicas)
        self._start = Start()
        self._stop = asyncio.Event()
        self._exit_code = 0
        self._supervisor: Supervisor | None = None

    async def run(self) -> int:
        """Until told to stop; returns the exit code."""
        for number in ASKING:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        config = SupervisorConfig(run_id=self._run_id(), grace_s=_GRACE_S)
        async with supervise(config, self) as supervisor, asyncio.TaskGroup() as tasks:
            self._supervisor = supervisor
            for replica_id in self._ids:
                supervisor.start(self._spec(replica_id))
            starting = tasks.create_task(self._await_start(), name="await start")
            await self._stop.wait()
            starting.cancel()
        return self._exit_code

    def on_started(self, name: str, pid: int) -> None:
        _log.info("replica starts", coordinator_id=name, keeper_pid=pid)

    def on_ended(self, name: str, status: int, restart_in_s: float) -> None:
        if self._start.is_hopeless(status):
            _log.error("replica cannot start", coordinator_id=name, status=status)
            self._exit_code = status if 0 < status < 128 else _EXIT_FAILED
            self._stop.set()
        else:
            _log.warning("replica ended", coordinator_id=name, status=status, restart_in_s=restart_in_s)

    def _on_signal(self, number: signal.Signals) -> None:
        _log.info("leaving", signal=number.name)
        if self._stop.is_set() and self._supervisor is not None:
            self._supervisor.hurry()
        self._stop.set()

    async def _await_start(self) -> None:
        """Until all replicas are registered at the same time."""
        presence = Presence(self._ids, lambda _: None)
        async with connect(EtcdConfig(endpoints=self._config.etcd)) as etcd, asyncio.TaskGroup() as tasks:
            following = tasks.create_task(follow_coordinators(etcd, self._config.cluster, presence))
            await presence.wait_complete()
            following.cancel()
        self._start.is_over = True
        _log.info("all replicas serve", http=self._listen["--http"], grpc=self._listen["--grpc"])

    def _spec(self, replica_id: str) -> ChildSpec:
        own = {**self._listen, "--coordinator-id": replica_id}
        words = [word for option in own.items() for word in option]
        command = [sys.executable, "-m", "kvrelay.cli", *self._config.arguments, *words]
        return ChildSpec(name=replica_id, arguments=command, environment=self._config.environment)

    def _run_id(self) -> str:
        """Below the mark of the supervisor that started this process, if one did."""
        return self._config.environment.get(VARIABLE) or f"coordinator-{os.getpid()}-{secrets.token_hex(4)}"


def _with_port(address: str, port: int) -> str:
    return f"{address.rpartition(':')[0]}:{port}"
