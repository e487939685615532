"""Which processes make up the cluster under test, where does each listen, and with which command line?"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from kvrelay.launch.places import with_port
from kvrelay.launch.plan import MALLOC_ENVIRONMENT
from kvrelay.launch.supervisor import ChildSpec
from tests.chaos.engines import TestedEngine

CLUSTER = "chaos"
ETCD = "etcd"
PREFILL = ("prefill-0", "prefill-1")
DECODE = ("decode-0", "decode-1")
COORDINATORS = ("coordinator-0", "coordinator-1")
WORKERS = (*PREFILL, *DECODE)
OVER_GRPC = "decode-1"
"""Its KV blocks come as frames, those of the others out of their senders' memory."""
_LOCAL_PREFILL = {"coordinator-0": "never", "coordinator-1": "when-cheaper"}
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Addresses:
    """host:port of everybody's ports, by member and purpose; the same through all restarts."""

    listen: dict[tuple[str, str], str] = field(default_factory=dict)
    advertised: dict[tuple[str, str], str] = field(default_factory=dict)
    """Of the links in front of them."""
    etcd: dict[str, str] = field(default_factory=dict)
    """Where each member reaches etcd."""


PORTS: Sequence[tuple[str, str]] = (
    (ETCD, "client"),
    *((coordinator, kind) for coordinator in COORDINATORS for kind in ("grpc", "http")),
    *((worker, kind) for worker in WORKERS for kind in ("grpc", "kv")),
)


def free_addresses() -> dict[tuple[str, str], str]:
    """For `PORTS`, each another one."""
    chosen: list[str] = []
    while len(chosen) < len(PORTS):
        address = with_port("127.0.0.1:0")
        if address not in chosen:
            chosen.append(address)
    return dict(zip(PORTS, chosen, strict=True))


def etcd_spec(directory: Path, addresses: Addresses) -> ChildSpec:
    """Ends last."""
    port = addresses.listen[ETCD, "client"].rpartition(":")[2]
    return _spec(ETCD, directory, ["-m", "tests.chaos.etcd_member", str(directory / ETCD), port], stage=0)


def member_specs(directory: Path, addresses: Addresses, engine: TestedEngine) -> list[ChildSpec]:
    """The coordinators and workers."""
    coordinators = [_coordinator(name, directory, addresses, engine) for name in COORDINATORS]
    return [*coordinators, *(_worker(name, directory, addresses, engine) for name in WORKERS)]


def _coordinator(name: str, directory: Path, addresses: Addresses, engine: TestedEngine) -> ChildSpec:
    command = ["coordinator", *_shared(name, addresses, engine), "--coordinator-id", name]
    command += ["--local-prefill", _LOCAL_PREFILL[name]]
    for kind in ("grpc", "http"):
        command += [f"--{kind}", addresses.listen[name, kind]]
    return _spec(name, directory, ["-m", "kvrelay.cli", *command])


def _worker(name: str, directory: Path, addresses: Addresses, engine: TestedEngine) -> ChildSpec:
    role = name.partition("-")[0]
    command = [f"{role}-worker", *_shared(name, addresses, engine), "--worker-id", name]
    command += engine.worker_options
    command += ["--listen", addresses.listen[name, "grpc"], "--advertise", addresses.advertised[name, "grpc"]]
    command += ["--kv-listen", addresses.listen[name, "kv"], "--kv-advertise", addresses.advertised[name, "kv"]]
    if name == OVER_GRPC:
        command += ["--kv-transport", "grpc"]
    armed = ["-m", "tests.chaos.armed_worker", str(directory / "points"), name]
    environment = engine.environment(WORKERS.index(name))
    return _spec(name, directory, [*armed, *command, "--", *engine.engine_options], environment)


def _shared(name: str, addresses: Addresses, engine: TestedEngine) -> list[str]:
    own = ["--etcd", addresses.etcd[name], "--cluster", CLUSTER]
    return [*own, "--heartbeat-timeout-s", str(engine.heartbeat_timeout_s)]


def _spec(
    name: str,
    directory: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str] = MappingProxyType({}),
    stage: int = 1,
) -> ChildSpec:
    path = os.pathsep.join([str(_ROOT), str(_ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = {"PYTHONPATH": path, "TMPDIR": str(directory / "tmp"), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return ChildSpec(
        name=name,
        arguments=[sys.executable, *arguments],
        environment={**MALLOC_ENVIRONMENT, **os.environ, **run, **environment},
        log_path=directory / "logs" / f"{name}.log",
        stage=stage,
    )
