"""Which processes make up a cluster on one machine, and with which command lines?"""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvrelay import default_addresses
from kvrelay.kv_transfer.compression import Compression
from kvrelay.kv_transfer.transport import KvTransport
from kvrelay.launch.devices import Devices, Share, shares
from kvrelay.launch.places import Places
from kvrelay.launch.replicas import replica_ids
from kvrelay.launch.supervisor import ChildSpec

ETCD = "etcd"

_FRONT_END_OPTIONS = ("--max-model-len", "--tokenizer")

MALLOC_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483648",
    "MALLOC_TOP_PAD_": "67108864",
}
"""Large messages stay in the heap instead of being mapped and unmapped one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpConfig:
    """Everything `kvrelay up` needs to know."""

    prefill: int = 1
    decode: int = 1
    """Numbers of workers."""
    replicas: int = 1
    """Coordinator processes that share the ports."""
    etcd: Sequence[str] = ()
    """host:port of an existing cluster's members; one is started when empty."""
    etcd_binary: Path | None = None
    cluster: str = "default"
    model: str
    """A folder or a hub's id."""
    served_model_name: str
    engine: str = "vllm"
    engine_options: Sequence[str] = ()
    """For the engines of all workers; the coordinator is told those that concern it, too."""
    prefill_options: Sequence[str] = ()
    decode_options: Sequence[str] = ()
    """More for the engines of one role, after the others."""
    coordinator_options: Sequence[str] = ()
    """More of `kvrelay coordinator`'s own."""
    worker_options: Sequence[str] = ()
    """More of the worker commands' own."""
    kv_host_bytes: int = 2 << 30
    """Host memory for KV blocks, of each worker."""
    kv_disk_bytes: int = 0
    kv_disk_path: Path = Path("/var/tmp")  # noqa: S108 - the file there has no name
    """Room on disk for blocks that leave that memory, of each worker; 0 for none."""
    kv_compression: Compression = Compression.NONE
    kv_transport: KvTransport = KvTransport.AUTO
    kv_cache_gib: int = 1
    """Memory of each CPU engine's own KV cache."""
    http: str = default_addresses.HTTP
    grpc: str = default_addresses.GRPC
    """Port 0 takes a free one."""
    otlp: str | None = None
    log_level: str = "info"
    state_dir: Path
    """Keeps the lock, the state and the log files."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What the children inherit."""


def worker_ids(config: UpConfig) -> list[str]:
    numbers = {"prefill": config.prefill, "decode": config.decode}
    suffix = _id_suffix(config)
    return [f"{role}-{index}{suffix}" for role, number in numbers.items() for index in range(number)]


def coordinator_id(config: UpConfig) -> str:
    return f"coordinator{_id_suffix(config)}"


def member_ids(name: str, config: UpConfig) -> list[str]:
    """Under which ids a child of this name is in etcd: one, unless it is a coordinator with replicas."""
    return replica_ids(name, config.replicas) if name == coordinator_id(config) else [name]


def etcd_spec(arguments: Sequence[str], config: UpConfig, places: Places) -> ChildSpec:
    """etcd is the last to be ended: the others take their leave from it."""
    return ChildSpec(
        name=ETCD,
        arguments=arguments,
        environment=_environment(config, places),
        log_path=places.log_dir / f"{ETCD}.log",
        stage=0,
    )


def cluster_specs(config: UpConfig, places: Places, devices: Devices) -> list[ChildSpec]:
    """The coordinator and all workers."""
    names = worker_ids(config)
    given = shares(devices, [_engine_options(name, config) for name in names], config.kv_cache_gib)
    workers = [_worker_spec(name, config, places, share) for name, share in zip(names, given, strict=True)]
    return [_coordinator_spec(config, places), *workers]


def _role_of(worker_id: str) -> str:
    return worker_id.partition("-")[0]


def _engine_options(worker_id: str, config: UpConfig) -> list[str]:
    own = config.prefill_options if _role_of(worker_id) == "prefill" else config.decode_options
    return [*config.engine_options, *own]


def _id_suffix(config: UpConfig) -> str:
    """In an etcd that others use as well, ids carry the host's name."""
    return "-" + socket.gethostname().partition(".")[0] if config.etcd else ""


def _coordinator_spec(config: UpConfig, places: Places) -> ChildSpec:
    name = coordinator_id(config)
    own = ["--http", places.http, "--grpc", places.grpc, "--coordinator-id", name]
    own += ["--replicas", str(config.replicas)] if config.replicas > 1 else []
    own += [*_front_end_options(config.engine_options), *config.coordinator_options]
    return _spec(name, ["coordinator", *_shared_options(config, places), *own], config, places, Share())


def _front_end_options(engine_options: Sequence[str]) -> list[str]:
    """Those engine options that tokenizing and limits depend on, where the engine is vLLM."""
    chosen: list[str] = []
    words = [part for word in engine_options for part in word.split("=", 1)]
    for index, word in enumerate(words):
        if word in _FRONT_END_OPTIONS:
            chosen += words[index : index + 2]
        elif word == "--trust-remote-code":
            chosen.append(word)
    return chosen


def _worker_spec(name: str, config: UpConfig, places: Places, share: Share) -> ChildSpec:
    arguments = [f"{_role_of(name)}-worker", *_shared_options(config, places)]
    arguments += ["--worker-id", name, "--listen", "127.0.0.1:0"]
    arguments += ["--engine", config.engine, "--kv-host-bytes", str(config.kv_host_bytes)]
    if config.kv_transport is not KvTransport.AUTO:
        arguments += ["--kv-transport", config.kv_transport.value]
    if config.kv_compression is not Compression.NONE:
        arguments += ["--kv-compression", config.kv_compression.value]
    if config.kv_disk_bytes:
        arguments += ["--kv-disk-bytes", str(config.kv_disk_bytes), "--kv-disk-path", str(config.kv_disk_path)]
    arguments += config.worker_options
    if options := [*share.options, *_engine_options(name, config)]:
        arguments += ["--", *options]
    return _spec(name, arguments, config, places, share)


def _shared_options(config: UpConfig, places: Places) -> list[str]:
    options = {
        "--etcd": ",".join(places.etcd),
        "--cluster": config.cluster,
        "--model": config.model,
        "--served-model-name": config.served_model_name,
        "--log-level": config.log_level,
    }
    words = [word for option in options.items() for word in option]
    return [*words, "--otlp", config.otlp] if config.otlp else words


def _spec(name: str, arguments: Sequence[str], config: UpConfig, places: Places, share: Share) -> ChildSpec:
    return ChildSpec(
        name=name,
        arguments=[sys.executable, "-m", "kvrelay.cli", *arguments],
        environment={**_environment(config, places), **share.environment},
        log_path=places.log_dir / f"{name}.log",
        stage=1,
    )


def _environment(config: UpConfig, places: Places) -> dict[str, str]:
    """The user's own settings win over defaults, not over what keeps this run's files together."""
    defaults = dict(MALLOC_ENVIRONMENT)
    if Path(config.model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    run = {
        "TMPDIR": str(places.run_dir),
        "VLLM_RPC_BASE_PATH": str(places.run_dir),
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
        "PYTHONUNBUFFERED": "1",
    }
    return {**defaults, **config.environment, **run}
