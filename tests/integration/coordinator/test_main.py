"""Does a coordinator process appear in the cluster, serve on both ports, and leave without a trace?"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvrelay.coordinator import main
from kvrelay.coordinator.config import CoordinatorConfig
from kvrelay.coordinator.front_end import FrontEndConfig
from kvrelay.coordinator.main import running
from kvrelay.etcd import EtcdClient, EtcdConfig, connect
from kvrelay.etcd.server import run_etcd
from kvrelay.grpc_options import open_channel
from kvrelay.membership import chores_key, coordinators_prefix, list_coordinators, register, worker_key
from kvrelay.tracing import Tracing
from kvrelay.v1 import cluster_pb2, common_pb2, inference_pb2, inference_pb2_grpc
from tests.support.fake_worker import MODEL, FakeWorker, ScriptedModel

SERVICE = "kvrelay.v1.Inference"


@contextlib.asynccontextmanager
async def etcd_client() -> AsyncIterator[tuple[str, EtcdClient]]:
    async with run_etcd() as etcd, connect(EtcdConfig(endpoints=[etcd.endpoint])) as client:
        yield etcd.endpoint, client


def config_of(endpoint: str, model_folder: Path, **values: Any) -> CoordinatorConfig:
    return CoordinatorConfig(
        coordinator_id="c1",
        etcd=[endpoint],
        http_listen="127.0.0.1:0",
        grpc_listen="127.0.0.1:0",
        front_end=FrontEndConfig(model=str(model_folder), served_model_name=MODEL),
        **{"drain_s": 1.0, **values},
    )


@contextlib.asynccontextmanager
async def worker(client: EtcdClient, worker_id: str, role: cluster_pb2.Role, respond: Any) -> AsyncIterator[FakeWorker]:
    """A fake worker that is in the cluster's list."""
    fake = FakeWorker(worker_id, role, respond)
    await fake.start()
    try:
        async with register(client, worker_key("default", worker_id), fake.info):
            async with asyncio.timeout(10):
                while await client.get(worker_key("default", worker_id)) is None:
                    pass
            yield fake
    finally:
        await fake.stop()


async def wait_health(channel: grpc.aio.Channel, service: str, wanted: int) -> None:
    """Watch the health service until it says so."""
    call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service))
    async with asyncio.timeout(10):
        async for response in call:
            if response.status == wanted:
                call.cancel()
                return


async def test_serves_workers_as_they_come_and_go(model_folder: Path) -> None:
    script = ScriptedModel([1000, 1001, 1002])
    async with (
        etcd_client() as (endpoint, client),
        running(config_of(endpoint, model_folder), Tracing()) as info,
        httpx.AsyncClient(base_url=info.http_url) as http,
        open_channel(info.grpc_address) as channel,
    ):
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/ready")).status_code == 503
        await wait_health(channel, "", health_pb2.HealthCheckResponse.SERVING)
        await wait_health(channel, SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        async with (
            worker(client, "p1", cluster_pb2.ROLE_PREFILL, script.prefill),
            worker(client, "d1", cluster_pb2.ROLE_DECODE, script.decode),
        ):
            await wait_health(channel, SERVICE, health_pb2.HealthCheckResponse.SERVING)
            assert (await http.get("/ready")).status_code == 200
            body = {"model": MODEL, "prompt": [5, 6, 7, 8, 9], "max_tokens": 2, "temperature": 0}
            answer = (await http.post("/v1/completions", json=body)).json()
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["completion_tokens"] == 2
            stub = inference_pb2_grpc.InferenceStub(channel)
            request = inference_pb2.GenerateRequest(
                token_ids=common_pb2.TokenIds(ids=[5]), sampling=common_pb2.SamplingParams(max_tokens=2)
            )
            tokens = [token async for response in stub.Generate(request) for token in response.token_ids]
            assert tokens == [1000, 1001]
            assert 'kvrelay_requests_total{coordinator="c1",outcome="ok"} 2.0' in (await http.get("/metrics")).text
        await wait_health(channel, SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        assert (await http.get("/ready")).status_code == 503


async def test_workers_that_were_there_before_serve_its_first_request(model_folder: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        endpoint, client = await stack.enter_async_context(etcd_client())
        script = ScriptedModel([1000, 1001, 1002])
        await stack.enter_async_context(worker(client, "d1", cluster_pb2.ROLE_DECODE, script.decode))
        info = await stack.enter_async_context(running(config_of(endpoint, model_folder), Tracing()))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=info.http_url))
        assert (await http.get("/ready")).status_code == 200


async def test_worker_that_says_nothing_does_not_keep_the_ports_closed(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "MEET_WORKERS_TIMEOUT_S", 0.2)
    async with contextlib.AsyncExitStack() as stack:
        endpoint, client = await stack.enter_async_context(etcd_client())
        port = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        record = cluster_pb2.WorkerInfo(
            worker_id="d1", role=cluster_pb2.ROLE_DECODE, model=MODEL, address=f"127.0.0.1:{port}"
        )
        await stack.enter_async_context(register(client, worker_key("default", "d1"), record))
        async with asyncio.timeout(4):  # A worker has longer to say hello.
            info = await stack.enter_async_context(running(config_of(endpoint, model_folder), Tracing()))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=info.http_url))
        assert (await http.get("/ready")).status_code == 503


async def test_is_listed_in_etcd_as_long_as_it_runs(model_folder: Path) -> None:
    async with etcd_client() as (endpoint, client):
        async with running(config_of(endpoint, model_folder, advertise_host="localhost"), Tracing()) as info:
            async with asyncio.timeout(10):
                while not (listed := await list_coordinators(client, "default")):
                    pass
            assert listed == [info]
            async with httpx.AsyncClient(base_url=info.http_url) as http:
                targets = (await http.get("/metrics/targets")).json()
                while 'kvrelay_is_leader{coordinator="c1"} 1.0' not in (await http.get("/metrics")).text:
                    pass
            assert targets == [{"targets": [info.own_http_url.removeprefix("http://")]}]
            assert info.http_url.startswith("http://localhost:")
            assert info.model == MODEL
        assert not (await client.list_prefix(coordinators_prefix("default"))).entries
        assert await client.get(chores_key("default")) is None


async def test_where_metrics_are_cannot_be_told_while_etcd_is_away(model_folder: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        etcd_stack = contextlib.AsyncExitStack()
        endpoint, _ = await etcd_stack.enter_async_context(etcd_client())
        info = await stack.enter_async_context(running(config_of(endpoint, model_folder), Tracing()))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=info.http_url, timeout=30))
        await etcd_stack.aclose()
        answer = await http.get("/metrics/targets")
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
        assert (await http.get("/metrics")).status_code == 200


async def test_http_and_grpc_drain_at_the_same_time(model_folder: Path) -> None:
    """One request of each that never ends."""
    drain_s = 1.5
    async with contextlib.AsyncExitStack() as stack:
        endpoint, client = await stack.enter_async_context(etcd_client())
        fake = await stack.enter_async_context(worker(client, "d1", cluster_pb2.ROLE_DECODE, None))
        coordinator = await stack.enter_async_context(contextlib.AsyncExitStack())
        config = config_of(endpoint, model_folder, drain_s=drain_s)
        info = await coordinator.enter_async_context(running(config, Tracing()))
        channel = await stack.enter_async_context(open_channel(info.grpc_address))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=info.http_url, timeout=20))
        await wait_health(channel, SERVICE, health_pb2.HealthCheckResponse.SERVING)
        request = inference_pb2.GenerateRequest(token_ids=common_pb2.TokenIds(ids=[5]))
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request)
        body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 2}
        asking = asyncio.create_task(http.post("/v1/completions", json=body))
        await fake.wait_for("decode", 2)

        began = time.monotonic()
        await coordinator.aclose()
        assert drain_s * 0.9 < time.monotonic() - began < drain_s * 1.8
        with contextlib.suppress(httpx.HTTPError):
            await asking
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()


async def test_it_is_not_ready_any_more_as_soon_as_it_stops(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving, may_leave = asyncio.Event(), asyncio.Event()

    @contextlib.asynccontextmanager
    async def slow_register(*_: object) -> AsyncIterator[None]:
        yield
        leaving.set()
        await may_leave.wait()

    monkeypatch.setattr("kvrelay.coordinator.main.register", slow_register)
    stop = asyncio.Event()
    started: asyncio.Queue[cluster_pb2.CoordinatorInfo] = asyncio.Queue()

    async def serve(endpoint: str) -> None:
        async with running(config_of(endpoint, model_folder), Tracing()) as info:
            started.put_nowait(info)
            await stop.wait()

    async with (
        etcd_client() as (endpoint, client),
        worker(client, "d1", cluster_pb2.ROLE_DECODE, None),
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(serve(endpoint))
        info = await started.get()
        async with httpx.AsyncClient(base_url=info.http_url) as http, open_channel(info.grpc_address) as channel:
            await wait_health(channel, SERVICE, health_pb2.HealthCheckResponse.SERVING)
            assert (await http.get("/ready")).status_code == 200
            stop.set()
            await leaving.wait()
            assert (await http.get("/ready")).status_code == 503
            may_leave.set()


async def test_services_can_be_reflected(model_folder: Path) -> None:
    async with etcd_client() as (endpoint, _), running(config_of(endpoint, model_folder), Tracing()) as info:
        async with open_channel(info.grpc_address) as channel:
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            names = {service.name for service in (await call.read()).list_services_response.service}
            call.cancel()
        assert {SERVICE, "grpc.health.v1.Health"} <= names


@pytest.mark.parametrize("kind", ["http", "grpc"])
async def test_taken_port_is_an_error_that_leaves_nothing(model_folder: Path, kind: str) -> None:
    async with etcd_client() as (endpoint, client):
        async with running(config_of(endpoint, model_folder), Tracing()) as info:
            taken = {"http": info.http_url.removeprefix("http://"), "grpc": info.grpc_address}[kind]
            listen = {"http": "127.0.0.1:0", "grpc": "127.0.0.1:0", kind: taken}
            with pytest.raises(BaseExceptionGroup) as raised:
                async with running(
                    CoordinatorConfig(
                        coordinator_id="c2",
                        etcd=[endpoint],
                        front_end=FrontEndConfig(model=str(model_folder), served_model_name=MODEL),
                        http_listen=listen["http"],
                        grpc_listen=listen["grpc"],
                    ),
                    Tracing(),
                ):
                    pytest.fail("it must not start")
            assert raised.group_contains(OSError, match=f"{re.escape(taken)}|in use")
        assert not (await client.list_prefix(coordinators_prefix("default"))).entries


PROGRAM = """
import sys
from kvrelay.coordinator import main
from kvrelay.coordinator.config import CoordinatorConfig
from kvrelay.coordinator.front_end import FrontEndConfig
from kvrelay.coordinator.main import run_coordinator

sys.exit(run_coordinator(CoordinatorConfig(
    coordinator_id="c1", etcd=[sys.argv[1]], http_listen="127.0.0.1:0", grpc_listen="127.0.0.1:0",
    front_end=FrontEndConfig(model=sys.argv[2], served_model_name="m"), drain_s=1.0,
)))
"""


async def test_sigterm_ends_the_process_in_order(model_folder: Path) -> None:
    async with etcd_client() as (endpoint, client):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            PROGRAM,
            endpoint,
            str(model_folder),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(60):
                assert process.stdout is not None
                async for line in process.stdout:
                    if b"grpc_address" in line:
                        break
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                output = await process.stdout.read()
                assert await process.wait() == 0
            assert b"leaving" in output
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert not (await client.list_prefix(coordinators_prefix("default"))).entries
