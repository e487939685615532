"""The commands that run one worker: prefill-worker, decode-worker."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import typer

from kvrelay.cli import options as opt
from kvrelay.cli.detection_options import DetectionOptions
from kvrelay.cli.failure import process_errors
from kvrelay.cli.model_option import FoundModel, find_model
from kvrelay.cli.option_groups import EngineOptions, ModelOptions, ObserveOptions, grouped
from kvrelay.cli.parsing import Address, check_engine_options
from kvrelay.cli.preflight import check_advertised, check_can_listen, check_dialled, check_disk, check_etcd, check_otlp
from kvrelay.cli.process_id import own_id

if TYPE_CHECKING:
    from kvrelay.launch.worker import WorkerConfig

LOOPBACK = Address("127.0.0.1", 0)


PREFILL_HELP = """Run one prefill worker: it computes the KV blocks of prompts and streams them to decode workers.

It leaves on SIGTERM or Ctrl-C, after the requests it has; a second signal ends it at once.

Example: kvrelay prefill-worker --etcd 10.0.0.1:2379 --listen 0.0.0.0:7001 --advertise 10.0.0.2:7001

Example: kvrelay prefill-worker --etcd localhost:2379 --model ./my-model -- --dtype float32 --max-model-len 4096
"""
DECODE_HELP = """Run one decode worker: it generates after prompts whose KV blocks it is sent, or computes them itself.

It leaves on SIGTERM or Ctrl-C, after the requests it has; a second signal ends it at once.

Example: kvrelay decode-worker --etcd 10.0.0.1:2379 --listen 0.0.0.0:7002 --advertise 10.0.0.3:7002

Example: kvrelay decode-worker --etcd localhost:2379 --kv-host-bytes 16GiB -- --max-num-seqs 64
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Which worker of which cluster it is."""

    etcd: opt.EtcdOption
    cluster: opt.ClusterOption = "default"
    worker_id: opt.WorkerIdOption = None
    weight: opt.WeightOption = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOptions:
    """Where it listens, and where others find it."""

    listen: opt.ListenOption = LOOPBACK
    kv_listen: opt.KvListenOption = None
    advertise: opt.AdvertiseOption = None
    kv_advertise: opt.KvAdvertiseOption = None

    def check(self) -> None:
        """Leaves with a message when something of it cannot be."""
        check_advertised(self.listen, self.advertise)
        check_dialled("--kv-advertise", self.kv_advertise)
        check_can_listen("--listen", self.listen)
        if self.kv_listen:
            check_can_listen("--kv-listen", self.kv_listen)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flags:
    worker: WorkerOptions
    model: ModelOptions
    engine: EngineOptions
    network: NetworkOptions
    observe: ObserveOptions
    detection: DetectionOptions
    engine_options: tuple[str, ...]


def worker_command(role: Literal["prefill", "decode"]) -> Callable[..., None]:
    """The command of one role; both take the same options."""

    def run(
        worker: WorkerOptions,
        model: ModelOptions,
        engine: EngineOptions,
        network: NetworkOptions,
        observe: ObserveOptions,
        detection: DetectionOptions,
        engine_args: opt.EngineArgsArgument = None,
    ) -> None:
        flags = _Flags(
            worker=worker,
            model=model,
            engine=engine,
            network=network,
            observe=observe,
            detection=detection,
            engine_options=check_engine_options(engine_args),
        )
        _run_worker(role, flags)

    return grouped(run)


def _run_worker(role: Literal["prefill", "decode"], flags: _Flags) -> None:
    flags.network.check()
    check_otlp(flags.observe.otlp)
    check_disk(flags.engine.kv_disk_path, flags.engine.kv_disk_bytes)
    check_etcd(flags.worker.etcd)
    found = find_model(flags.model.model, flags.model.served_model_name, flags.engine.engine)
    with process_errors(flags.observe.log_level.value):
        from kvrelay.launch.worker import run_worker

        exit_code = run_worker(_config(role, flags, found))
    raise typer.Exit(exit_code)


def _config(role: Literal["prefill", "decode"], flags: _Flags, found: FoundModel) -> WorkerConfig:
    from kvrelay.kv_transfer.collective_group import CollectiveConfig
    from kvrelay.launch.engines import EngineChoice
    from kvrelay.launch.worker import WorkerConfig
    from kvrelay.v1 import cluster_pb2
    from kvrelay.worker.store_config import StoreConfig

    network, engine = flags.network, flags.engine
    return WorkerConfig(
        role=cluster_pb2.ROLE_PREFILL if role == "prefill" else cluster_pb2.ROLE_DECODE,
        worker_id=flags.worker.worker_id or own_id(role),
        etcd=[str(address) for address in flags.worker.etcd],
        cluster=flags.worker.cluster,
        weight=flags.worker.weight,
        listen=str(network.listen),
        kv_listen=str(network.kv_listen) if network.kv_listen else None,
        advertise=str(network.advertise) if network.advertise else None,
        kv_advertise=str(network.kv_advertise) if network.kv_advertise else None,
        engine=EngineChoice(
            kind=engine.engine.value,
            model=found.path,
            served_model_name=found.served_name,
            options=flags.engine_options,
        ),
        store=StoreConfig(
            size_bytes=engine.kv_host_bytes,
            transport=engine.kv_transport,
            collective=CollectiveConfig(interface=os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]),
            disk_bytes=engine.kv_disk_bytes,
            disk_path=engine.kv_disk_path,
            compression=engine.kv_compression,
        ),
        heartbeat=flags.detection.heartbeat(),
        watch=flags.detection.watch(),
        otlp_endpoint=flags.observe.otlp,
        log_format=flags.observe.log_format.value,
        log_level=flags.observe.log_level.value,
    )
