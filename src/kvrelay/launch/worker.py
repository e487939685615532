"""One worker process: engine, store, gRPC server and membership put together, and taken apart in order."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import structlog
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvrelay import __version__, etcd, grpc_options, logs, membership
from kvrelay.decode_worker.runner import DecodeRole
from kvrelay.engine.base import EngineDeadError, EngineInfo
from kvrelay.errors import first_leaf
from kvrelay.heartbeat import DEFAULT_HEARTBEAT, HeartbeatConfig
from kvrelay.kv_transfer import service as kv_service
from kvrelay.kv_transfer.push_server import PushServer
from kvrelay.kv_transfer.service import KvTransferService
from kvrelay.launch.ending import end_at_once
from kvrelay.launch.engines import EngineChoice, make_engine
from kvrelay.prefill_worker.runner import PrefillRole
from kvrelay.signals import StopSignals
from kvrelay.tracing import configure_tracing
from kvrelay.v1 import cluster_pb2, worker_pb2, worker_pb2_grpc
from kvrelay.worker.engine_watch import DEFAULT_WATCH, EngineWatch, WatchConfig
from kvrelay.worker.host import WorkerHost
from kvrelay.worker.leaving import Leaving
from kvrelay.worker.prefix_publisher import PrefixPublisher
from kvrelay.worker.record import Publish, WorkerRecord
from kvrelay.worker.running_host import open_host
from kvrelay.worker.service import WorkerService
from kvrelay.worker.status import worker_status
from kvrelay.worker.store_config import StoreConfig

_log = structlog.get_logger(__name__)

EXIT_ENGINE_DEAD = 3

_SERVICE = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name

_MALLOC_OPTIONS = {-1: 1 << 30, -2: 64 << 20, -3: 1 << 30}
"""mallopt(3): M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD."""
_LEAVE_TIMEOUT_S = 2.0
"""So long may etcd take to learn that this worker drains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Everything one worker process needs to know."""

    role: cluster_pb2.Role.ValueType
    worker_id: str
    etcd: Sequence[str]
    """host:port of every member."""
    cluster: str = "default"
    listen: str = "127.0.0.1:0"
    advertise: str | None = None
    """host:port that others dial; where it listens when None."""
    kv_listen: str | None = None
    """host:port where KV blocks come in, on the host that is advertised; a free port when None."""
    kv_advertise: str | None = None
    """host:port where others send KV blocks; the advertised host and the port of `kv_listen` when None."""
    engine: EngineChoice
    store: StoreConfig = field(default_factory=StoreConfig)
    weight: float = 1.0
    """Its share of the load under the policy "weighted", relative to others."""
    otlp_endpoint: str | None = None
    log_format: str = "console"
    log_level: str = "info"
    heartbeat: HeartbeatConfig = DEFAULT_HEARTBEAT
    """On the streams of coordinators."""
    watch: WatchConfig = DEFAULT_WATCH
    """Of the engine."""
    drain_s: float = 4.0
    """How long requests may go on after SIGTERM, those that are on their way here included."""


def run_worker(config: WorkerConfig) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code.

    While the engine loads the first signal ends the process at once, later the second one; nothing is left either way.
    """
    logs.configure(level=config.log_level, log_format=config.log_format)
    _log.info("configuration", **{name: str(getattr(config, name)) for name in config.__slots__})
    with tempfile.TemporaryDirectory(prefix="kvrelay-worker-") as scratch:
        signals = StopSignals(lambda exit_code: end_at_once(exit_code, Path(scratch)))
        _prepare_process(scratch)
        exit_code = 0
        try:
            uvloop.run(_serve(config, signals))
        except* EngineDeadError as dead:
            _log.error("engine died", error=str(first_leaf(dead)))
            exit_code = EXIT_ENGINE_DEAD
    return exit_code


def _prepare_process(scratch: str) -> None:
    """Settings of libraries that have no other interface than the environment, and of the allocator."""
    # vLLM leaves its sockets where they are, and what its ranks meet over, and torch the folders that it compiles in.
    os.environ["VLLM_RPC_BASE_PATH"] = os.environ["TMPDIR"] = scratch
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", scratch)
    # Forked engines would inherit gRPC's threads.
    os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    # By default glibc maps and unmaps every frame of a megabyte: 1.5 GB/s over loopback instead of 3.7.
    libc = ctypes.CDLL(None)
    for option, value in _MALLOC_OPTIONS.items():
        libc.mallopt(option, value)


async def _serve(config: WorkerConfig, signals: StopSignals) -> None:
    """Ends in this order: leave membership, NOT_SERVING, drain, server, loops, engine, lease, telemetry.

    When the engine is dead or stuck: NOT_SERVING, server, lease, loops, engine, telemetry.
    """
    name = cluster_pb2.Role.Name(config.role).removeprefix("ROLE_").lower() + "-worker"
    tracing = configure_tracing(f"kvrelay-{name}", config.otlp_endpoint, instance_id=config.worker_id)
    started = time.monotonic()
    try:
        async with (
            etcd.connect(etcd.EtcdConfig(endpoints=config.etcd)) as client,
            membership.register(client, membership.worker_key(config.cluster, config.worker_id)) as registration,
            open_host(make_engine(config.engine), config.store, tracing, config.watch) as host,
        ):
            await _check(host.watch)
            leaving = Leaving(signals.ready(), config.drain_s)
            _log.info("engine ready", seconds=round(time.monotonic() - started, 1), slots=host.segment.num_slots)
            publisher = PrefixPublisher(client, config.cluster, config.worker_id, host.held_blocks)
            registration.accompany(publisher.run)
            async with (
                _withdrawn_if_broken(registration),
                open_server(config, host, registration.update, leaving) as served,
            ):
                registration.put(served.record.info)
                _log.info("serving", address=served.record.info.address, worker_id=config.worker_id)
                await leaving.wait()
                await _drain(leaving.drain_s, host, served)
                _log.info("leaving", requests=host.jobs.total())
    finally:
        tracing.shutdown()


async def _check(watch: EngineWatch) -> None:
    """Nobody learns of a worker whose engine generates nothing. Raises `EngineDeadError`."""
    await watch.ask()
    if not watch.is_healthy:
        raise EngineDeadError("the engine has loaded and generates nothing")


@contextlib.asynccontextmanager
async def _withdrawn_if_broken(registration: membership.Registration) -> AsyncIterator[None]:
    """An engine that is dead or stuck takes its time to end; the cluster learns of it before."""
    try:
        yield
    except BaseException:
        await registration.withdraw()
        raise


@dataclass(frozen=True, slots=True)
class Served:
    """What is open to others."""

    record: WorkerRecord
    service: WorkerService
    health: health.aio.HealthServicer


async def _drain(drain_s: float, host: WorkerHost, served: Served) -> None:
    """Take nothing new, and let requests end that are here or on their way here, for `drain_s` at most."""
    _log.info("draining", requests=host.jobs.total())
    deadline = time.monotonic() + drain_s
    try:
        async with asyncio.timeout(min(_LEAVE_TIMEOUT_S, drain_s)):
            await served.record.drain(drain_s)
    except TimeoutError:
        _log.warning("etcd does not answer: coordinators do not know that this worker leaves")
    host.watch.stop_asking()
    await served.health.enter_graceful_shutdown()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(deadline - time.monotonic()):
            await served.service.wait_hung_up()
            await host.wait_idle()


@contextlib.asynccontextmanager
async def open_server(
    config: WorkerConfig, host: WorkerHost, publish: Publish, leaving: Leaving
) -> AsyncIterator[Served]:
    """The worker's two ports, open inside this context. Raises `OSError` when one is taken."""
    server = grpc.aio.server(options=grpc_options.server_options(max_message_bytes=grpc_options.MAX_MESSAGE_BYTES))
    port = grpc_options.listen_at(server, config.listen)
    listening = f"{_host_of(config.listen)}:{port}"
    record = WorkerRecord(_worker_info(config, host.info, config.advertise or listening), publish)
    address = host.borrower.address = record.info.address
    service = WorkerService(
        record,
        lambda: worker_status(host, config.worker_id),
        PrefillRole(host),
        DecodeRole(host),
        leaving.ask,
        config.heartbeat,
    )
    worker_pb2_grpc.add_WorkerServicer_to_server(service, server)
    push_server = PushServer(host.receiver, host.collectives)
    kv_listen = config.kv_listen or f"{_host_of(config.listen)}:0"
    push_port = push_server.start(kv_listen)
    push_address = config.kv_advertise or f"{_host_of(address)}:{push_port}"
    host.collectives.listen(_host_of(kv_listen), _host_of(push_address))
    kv_service.add_to_server(
        KvTransferService(
            host.receiver,
            push_address,
            host.lender.lend,
            maps_memory=host.transport.shares_memory,
            collectives=host.collectives,
        ),
        server,
    )
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    await health_servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    # Not KvTransfer: half of its methods are served at the other port.
    names = (
        _SERVICE,
        health.SERVICE_NAME,
        reflection.SERVICE_NAME,
    )
    reflection.enable_server_reflection(names, server)
    await server.start()
    try:
        async with asyncio.TaskGroup() as tasks:
            publishing = tasks.create_task(_publish_health(host.watch, health_servicer), name="publish health")
            try:
                yield Served(record, service, health_servicer)
            finally:
                publishing.cancel()
    finally:
        await health_servicer.enter_graceful_shutdown()
        await server.stop(None)
        await asyncio.to_thread(host.collectives.close)
        await asyncio.to_thread(push_server.stop)


async def _publish_health(watch: EngineWatch, servicer: health.aio.HealthServicer) -> None:
    """The process serves at once, the Worker service as long as the engine generates."""
    statuses = health_pb2.HealthCheckResponse
    while True:
        watch.changed.clear()
        await servicer.set(_SERVICE, statuses.SERVING if watch.is_healthy else statuses.NOT_SERVING)
        await watch.changed.wait()


def _host_of(address: str) -> str:
    return address.rpartition(":")[0]


def _worker_info(config: WorkerConfig, engine: EngineInfo, address: str) -> cluster_pb2.WorkerInfo:
    return cluster_pb2.WorkerInfo(
        worker_id=config.worker_id,
        role=config.role,
        state=cluster_pb2.WORKER_STATE_READY,
        model=config.engine.served_model_name,
        address=address,
        layout=engine.layout,
        max_model_len_tokens=engine.max_model_len_tokens,
        num_engine_blocks=engine.num_engine_blocks,
        engine=engine.name,
        version=__version__,
        incarnation=secrets.token_hex(8),
        started_unix_ns=time.time_ns(),
        weight=config.weight,
        max_running_requests=engine.max_running_requests,
        max_batched_tokens=engine.max_batched_tokens,
    )
