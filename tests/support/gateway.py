"""The HTTP gateway over fake workers, on a real socket."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from starlette.types import ASGIApp

from kvrelay.coordinator.cluster_engine import ClusterEngineConfig
from kvrelay.coordinator.front_end import FrontEnd
from kvrelay.coordinator.http_app import build_app
from kvrelay.coordinator.http_routes import Probes
from kvrelay.coordinator.http_server import HttpServer, http_server
from kvrelay.coordinator.http_serving import ServingOptions
from kvrelay.coordinator.metrics.collector import CoordinatorCollector
from kvrelay.coordinator.metrics.exposition import Exposition
from kvrelay.coordinator.metrics.sources import Sources
from kvrelay.coordinator.request_limits import RequestLimits
from kvrelay.tracing import Tracing
from kvrelay.v1 import common_pb2
from tests.support.fake_cluster import FakeCluster, fake_cluster


@dataclass(slots=True)
class GatewayUnderTest:
    cluster: FakeCluster
    server: HttpServer
    port: int
    http: httpx.AsyncClient
    """Knows the base URL; tests of bad input speak through it."""
    openai: openai.AsyncOpenAI

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return await self.http.post(path, json=body, headers=headers)

    async def decode_sampling(self, count: int = 1) -> common_pb2.SamplingParams:
        """The sampling parameters that the decode worker got last, after `count` requests."""
        return (await self.cluster.decode.wait_for("decode", count))[-1].sampling


def exposition(cluster: FakeCluster) -> Exposition:
    return Exposition([CoordinatorCollector("c1", cluster.engine.metrics, Sources(workers=cluster.pool.reports))])


def gateway_app(
    cluster: FakeCluster,
    *,
    limits: RequestLimits | None = None,
    options: ServingOptions | None = None,
    ready: Callable[[], bool] | None = None,
    with_plain_streams: bool = True,
) -> ASGIApp:
    """See `gateway`."""
    return build_app(
        cluster.engine,
        streams=cluster.engine if with_plain_streams else None,
        served_model_name=cluster.engine.served_model_name,
        probes=Probes(
            ready=ready or (lambda: cluster.engine.is_ready),
            metrics=exposition(cluster),
            decision=cluster.engine.decision,
        ),
        limits=limits,
        options=options,
    )


@contextlib.asynccontextmanager
async def gateway(
    front_end: FrontEnd,
    tokens: Sequence[int] | None = None,
    *,
    limits: RequestLimits | None = None,
    options: ServingOptions | None = None,
    ready: Callable[[], bool] | None = None,
    with_prefill: bool = True,
    with_plain_streams: bool = True,
    tracing: Tracing | None = None,
    config: ClusterEngineConfig | None = None,
) -> AsyncIterator[GatewayUnderTest]:
    """With `tokens` the workers generate these; without, the test speaks for them.

    Without plain streams, vLLM's serving classes answer everything.
    """
    async with fake_cluster(front_end, tokens, with_prefill=with_prefill, tracing=tracing, config=config) as cluster:
        app = gateway_app(cluster, limits=limits, options=options, ready=ready, with_plain_streams=with_plain_streams)
        async with http_server(app, "127.0.0.1:0", drain_s=1) as server:
            url = f"http://127.0.0.1:{server.port}"
            async with (
                httpx.AsyncClient(base_url=url, timeout=20) as http,
                openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client,
            ):
                yield GatewayUnderTest(cluster, server, server.port, http, client)
