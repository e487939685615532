"""The commands that run one worker: prefill-worker, decode-worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

from kvrelay.cli import options as opt
from kvrelay.cli.failure import process_errors
from kvrelay.cli.model_option import find_model
from kvrelay.cli.parsing import Address, Addresses, check_engine_options
from kvrelay.cli.preflight import advertised, check_can_listen, check_dialled, check_disk, check_etcd, check_otlp
from kvrelay.cli.process_id import own_id

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


def worker_command(role: Literal["prefill", "decode"]) -> Callable[..., None]:
    """The command of one role; both take the same options."""

    def run(
        etcd: opt.EtcdOption,
        engine_args: opt.EngineArgsArgument = None,
        cluster: opt.ClusterOption = "default",
        worker_id: opt.WorkerIdOption = None,
        model: opt.ModelOption = "",
        served_model_name: opt.ServedNameOption = None,
        engine: opt.EngineOption = opt.EngineKind.VLLM,
        kv_host_bytes: opt.KvHostBytesOption = opt.KV_HOST_BYTES,
        kv_disk_bytes: opt.KvDiskBytesOption = 0,
        kv_disk_path: opt.KvDiskPathOption = opt.KV_DISK_PATH,
        listen: opt.ListenOption = LOOPBACK,
        kv_listen: opt.KvListenOption = None,
        advertise: opt.AdvertiseOption = None,
        kv_advertise: opt.KvAdvertiseOption = None,
        otlp: opt.OtlpOption = None,
        log_format: opt.LogFormatOption = opt.LogFormat.CONSOLE,
        log_level: opt.LogLevelOption = opt.LogLevel.INFO,
    ) -> None:
        flags = _WorkerFlags(
            etcd=etcd,
            cluster=cluster,
            worker_id=worker_id or own_id(role),
            model=model,
            served_model_name=served_model_name,
            engine=engine,
            kv_host_bytes=kv_host_bytes,
            kv_disk_bytes=kv_disk_bytes,
            kv_disk_path=kv_disk_path,
            listen=listen,
            kv_listen=kv_listen,
            advertise=advertised(listen, advertise),
            kv_advertise=check_dialled("--kv-advertise", kv_advertise),
            engine_args=check_engine_options(engine_args),
            otlp=otlp,
            log_format=log_format,
            log_level=log_level,
        )
        _run_worker(role, flags)

    return run


@dataclass(frozen=True, slots=True, kw_only=True)
class _WorkerFlags:
    etcd: Addresses
    cluster: str
    worker_id: str
    model: str
    served_model_name: str | None
    engine: opt.EngineKind
    kv_host_bytes: int
    kv_disk_bytes: int
    kv_disk_path: Path
    listen: Address
    kv_listen: Address | None
    advertise: Address | None
    kv_advertise: Address | None
    engine_args: tuple[str, ...]
    otlp: str | None
    log_format: opt.LogFormat
    log_level: opt.LogLevel


def _run_worker(role: Literal["prefill", "decode"], flags: _WorkerFlags) -> None:
    check_otlp(flags.otlp)
    check_can_listen("--listen", flags.listen)
    if flags.kv_listen:
        check_can_listen("--kv-listen", flags.kv_listen)
    check_disk(flags.kv_disk_path, flags.kv_disk_bytes)
    check_etcd(flags.etcd)
    found = find_model(flags.model, flags.served_model_name, flags.engine)
    with process_errors(flags.log_level.value):
        from kvrelay.launch.engines import EngineChoice
        from kvrelay.launch.worker import WorkerConfig, run_worker
        from kvrelay.v1 import cluster_pb2
        from kvrelay.worker.host import StoreConfig

        config = WorkerConfig(
            role=cluster_pb2.ROLE_PREFILL if role == "prefill" else cluster_pb2.ROLE_DECODE,
            worker_id=flags.worker_id,
            etcd=[str(address) for address in flags.etcd],
            cluster=flags.cluster,
            listen=str(flags.listen),
            kv_listen=str(flags.kv_listen) if flags.kv_listen else None,
            advertise=str(flags.advertise) if flags.advertise else None,
            kv_advertise=str(flags.kv_advertise) if flags.kv_advertise else None,
            engine=EngineChoice(
                kind=flags.engine.value,
                model=found.path,
                served_model_name=found.served_name,
                options=flags.engine_args,
            ),
            store=StoreConfig(
                size_bytes=flags.kv_host_bytes, disk_bytes=flags.kv_disk_bytes, disk_path=flags.kv_disk_path
            ),
            otlp_endpoint=flags.otlp,
            log_format=flags.log_format.value,
            log_level=flags.log_level.value,
        )
        exit_code = run_worker(config)
    raise typer.Exit(exit_code)
