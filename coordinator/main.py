"""One coordinator process: front end, worker pool, gRPC and HTTP put together, and taken apart in order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple
from zlib import crc32

import grpc.aio
import structlog
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvrelay import __version__, logs
from kvrelay.coordinator.chores import Chores
from kvrelay.coordinator.cluster_engine import ClusterEngine
from kvrelay.coordinator.config import CoordinatorConfig
from kvrelay.coordinator.connection_limits import ConnectionLimits, connections_within, raise_open_files
from kvrelay.coordinator.front_end import build_front_end
from kvrelay.coordinator.http_app import build_app
from kvrelay.coordinator.http_routes import Probes
from kvrelay.coordinator.http_server import HttpServer, http_server, split_address, with_free_port
from kvrelay.coordinator.inference_service import InferenceService
from kvrelay.coordinator.metrics.collector import CoordinatorCollector
from kvrelay.coordinator.metrics.exposition import Exposition
from kvrelay.coordinator.metrics.requests import RequestMetrics
from kvrelay.coordinator.metrics.sources import Sources
from kvrelay.coordinator.prefix_index.follow import PrefixReplica
from kvrelay.coordinator.prefix_index.index import PrefixIndex
from kvrelay.coordinator.prompt_rendering import ChatTemplate
from kvrelay.coordinator.scheduler.policies import make_scheduler
from kvrelay.coordinator.worker_pool import WorkerPool
from kvrelay.etcd import EtcdConfig, connect
from kvrelay.grpc_options import listen_at, server_options
from kvrelay.membership import coordinator_key, follow_workers, list_coordinators, register
from kvrelay.signals import StopSignals
from kvrelay.tracing import Tracing, configure_tracing
from kvrelay.tracing_grpc import TracingServerInterceptor
from kvrelay.v1 import cluster_pb2, inference_pb2, inference_pb2_grpc

_log = structlog.get_logger(__name__)

_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

MEET_WORKERS_TIMEOUT_S = 3.0
"""Without etcd, or with a worker that does not answer, the ports open then."""


def run_coordinator(config: CoordinatorConfig) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    logs.configure(level=config.log_level, log_format=config.log_format)
    if config.shares_ports:  # and the log with other replicas
        structlog.contextvars.bind_contextvars(coordinator_id=config.coordinator_id)
    _log.info("configuration", **{name: str(getattr(config, name)) for name in config.__slots__})
    uvloop.run(serve(config))
    return 0


async def serve(config: CoordinatorConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    While it starts a signal ends the process at once. Later it ends in this order: not ready, leave membership,
    NOT_SERVING, drain HTTP and gRPC at the same time, links to the workers, telemetry. Raises what makes starting
    impossible, `OSError` for an address that is taken.
    """
    signals = StopSignals(os._exit)
    tracing = configure_tracing("kvrelay-coordinator", config.otlp_endpoint, instance_id=config.coordinator_id)
    try:
        async with running(config, tracing) as info:
            stop = signals.ready()
            _log.info("serving", http_url=info.http_url, grpc_address=info.grpc_address)
            await stop.wait()
            _log.info("leaving")
    finally:
        tracing.shutdown()


@contextlib.asynccontextmanager
async def running(config: CoordinatorConfig, tracing: Tracing) -> AsyncIterator[cluster_pb2.CoordinatorInfo]:
    """A registered coordinator; yields its record once its ports are open."""
    pool = WorkerPool(config.coordinator_id, max_queued_messages=config.max_queued_messages, heartbeat=config.heartbeat)
    chores = Chores(config.cluster, config.coordinator_id, etcd_history_s=config.etcd_history_s)
    replica = PrefixReplica(PrefixIndex())
    stopping = _Stopping(config.drain_s)
    with _cluster_engine(config, pool, replica.index, tracing) as engine:
        async with (
            pool.running(engine),
            connect(EtcdConfig(endpoints=config.etcd)) as etcd,
            asyncio.TaskGroup() as tasks,
        ):
            sources = Sources(
                workers=pool.reports,
                is_leader=lambda: chores.is_leading,
                queue_depth=lambda: engine.num_queued,
                index=replica.figures,
            )
            probes = Probes(
                ready=lambda: engine.is_ready and not stopping.has_begun,
                metrics=_exposition(config, engine.metrics, sources),
                decision=engine.decision,
                coordinators=partial(list_coordinators, etcd, config.cluster),
            )
            app = build_app(
                engine,
                streams=engine,
                served_model_name=engine.served_model_name,
                probes=probes,
                limits=config.limits,
                options=config.serving,
            )
            listed = asyncio.Event()
            following = follow_workers(etcd, config.cluster, pool, on_connected=lambda _: listed.set())
            loops = [
                tasks.create_task(following, name="follow workers"),
                tasks.create_task(replica.follow(etcd, config.cluster), name="follow prefixes"),
            ]
            await _meet_workers(pool, listed)
            standing = tasks.create_task(chores.run(etcd), name="chores of the cluster")
            try:
                async with (
                    http_server(
                        app,
                        config.http_listen,
                        drain_s=config.drain_s,
                        shares_port=config.shares_ports,
                        limits=_connections(config),
                    ) as http,
                    _grpc_server(config, engine, tracing, stopping) as grpc_ports,
                ):
                    info = _info(config, http, grpc_ports)
                    try:
                        async with register(etcd, coordinator_key(config.cluster, config.coordinator_id), info):
                            try:
                                yield info
                            finally:
                                stopping.begin()
                                standing.cancel()
                    finally:
                        http.begin_drain(stopping.left_s())
            finally:
                for loop in (*loops, standing):
                    loop.cancel()


async def _meet_workers(pool: WorkerPool, listed: asyncio.Event) -> None:
    """Whoever asks at once is served: a replica that starts would refuse what others have workers for."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(MEET_WORKERS_TIMEOUT_S):
            await listed.wait()
            await pool.tried()


def _connections(config: CoordinatorConfig) -> ConnectionLimits:
    """As many as this process may have."""
    limits = config.connections
    return replace(limits, max_connections=connections_within(limits, raise_open_files()))


def _exposition(config: CoordinatorConfig, requests: RequestMetrics, sources: Sources) -> Exposition:
    return Exposition([CoordinatorCollector(config.coordinator_id, requests, sources)])


class _Stopping:
    """Whether this process stops, and what is left of the time that leaving and draining share."""

    def __init__(self, budget_s: float) -> None:
        self._budget_s = budget_s
        self._deadline: float | None = None

    def begin(self) -> None:
        self._deadline = time.monotonic() + self._budget_s

    @property
    def has_begun(self) -> bool:
        return self._deadline is not None

    def left_s(self) -> float:
        """All of it before it has begun."""
        return self._budget_s if self._deadline is None else max(0.0, self._deadline - time.monotonic())


@contextlib.contextmanager
def _cluster_engine(
    config: CoordinatorConfig, pool: WorkerPool, index: PrefixIndex, tracing: Tracing
) -> Iterator[ClusterEngine]:
    """vLLM's front end takes seconds to build and makes many objects that live for ever."""
    started = time.monotonic()
    front_end = build_front_end(config.front_end)
    _log.info("front end ready", seconds=round(time.monotonic() - started, 1), model=config.front_end.model)
    gc.collect()
    gc.freeze()
    scheduler = make_scheduler(config.policy, crc32(config.coordinator_id.encode()), config.cost)
    engine = ClusterEngine(front_end, pool, scheduler=scheduler, index=index, tracing=tracing, config=config.engine)
    try:
        yield engine
    finally:
        engine.shutdown()


class _GrpcPorts(NamedTuple):
    shared: int
    own: int


@contextlib.asynccontextmanager
async def _grpc_server(
    config: CoordinatorConfig, engine: ClusterEngine, tracing: Tracing, stopping: _Stopping
) -> AsyncIterator[_GrpcPorts]:
    """Inference, health and reflection; yields the ports. Leaving it drains as long as there is time."""
    server = grpc.aio.server(
        options=server_options(max_message_bytes=config.limits.max_body_bytes, shares_port=config.shares_ports),
        interceptors=[TracingServerInterceptor(tracing, _SERVICE)],
    )
    template = ChatTemplate(text=config.serving.chat_template, arguments=config.serving.chat_template_kwargs)
    inference_pb2_grpc.add_InferenceServicer_to_server(
        InferenceService(
            engine,
            template=template,
            limits=config.limits,
            stall_timeout_s=config.connections.stall_timeout_s,
        ),
        server,
    )
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = listen_at(server, config.grpc_listen)
    own_port = listen_at(server, with_free_port(config.grpc_listen)) if config.shares_ports else port
    await server.start()
    async with asyncio.TaskGroup() as tasks:
        publishing = tasks.create_task(_publish_health(engine, servicer), name="publish health")
        try:
            yield _GrpcPorts(port, own_port)
        finally:
            publishing.cancel()
            await servicer.enter_graceful_shutdown()
            await server.stop(stopping.left_s())


async def _publish_health(engine: ClusterEngine, servicer: health.aio.HealthServicer) -> None:
    """The process serves at once, the Inference service as long as a worker can."""
    await servicer.set("", _SERVING)
    async for is_ready in engine.watch_ready():
        await servicer.set(_SERVICE, _SERVING if is_ready else _NOT_SERVING)


def _info(config: CoordinatorConfig, http: HttpServer, grpc_ports: _GrpcPorts) -> cluster_pb2.CoordinatorInfo:
    http_host = config.advertise_host or _reachable(split_address(config.http_listen)[0])
    grpc_host = config.advertise_host or _reachable(split_address(config.grpc_listen)[0])
    return cluster_pb2.CoordinatorInfo(
        coordinator_id=config.coordinator_id,
        http_url=f"http://{http_host}:{http.port}",
        grpc_address=f"{grpc_host}:{grpc_ports.shared}",
        own_http_url=f"http://{http_host}:{http.own_port}",
        own_grpc_address=f"{grpc_host}:{grpc_ports.own}",
        model=config.front_end.served_model_name,
        version=__version__,
    )


def _reachable(host: str) -> str:
    """What others call a host that listens everywhere."""
    if host in ("", "0.0.0.0", "::"):  # noqa: S104
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
