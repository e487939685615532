"""How many requests a second does a coordinator carry, and how much later does their first token come?

Everything on this machine: etcd, 16 prefill and 16 decode workers that answer by the clock (`bench.timed_workers`),
coordinators as `kvrelay coordinator --replicas N` starts them, and the load generator `wrk`, which keeps a fixed number
of requests in flight. Every request is streamed over both its workers. Beside that load a second client sends a few
requests a second and measures their time to first token; what is above the time that its prefill worker took for that
request, by the worker's own clock, counts as added. Before the load, the same is measured with one request at a time.

Needs `wrk` (Debian: apt install wrk).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec
import psutil
import uvloop

from bench.report import Report, parser
from bench.timed_workers import PROBE
from kvrelay.client.http_pool import HttpPool, Origin
from kvrelay.client.replay.answer_reader import AnswerReader
from kvrelay.etcd.server import run_etcd
from kvrelay.launch.places import with_port
from kvrelay.models import default_cache_dir, resolve_model

MODEL = "model"
PREFILL_S = STEP_S = 0.02
ROUTES = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
_LEAN_GRPC = "-event_engine_client,-event_engine_listener,-event_engine_callback_cq"
"""Workers send small messages at a high rate here, for which this is cheaper; coordinators set it themselves."""
_LUA = Path(__file__).with_suffix(".lua")
_START_TIMEOUT_S = 120
_WORDS = ["sky", "blue", "child", "tell", "water", "light", "river", "stone", "green", "cloud", "north", "bird"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one arm does."""

    route: str
    num_tokens: int
    num_words: int
    connections: int
    duration_s: float
    probes_per_s: float
    num_single: int


class Program:
    """A child process with those it starts."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    def cpu_s(self) -> float:
        """User and system time so far, of the whole tree."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            times = [process.cpu_times() for process in [top, *top.children(recursive=True)]]
            return sum(float(time.user + time.system) for time in times)
        return 0.0


@contextlib.asynccontextmanager
async def program(*arguments: str, log: Path) -> AsyncIterator[Program]:
    """Run one of this project's programs inside this context; its standard input stays open as long."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=output,
            env={"GRPC_EXPERIMENTS": _LEAN_GRPC, **os.environ},
        )
    try:
        yield Program(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        async with asyncio.timeout(20):
            await process.wait()


@dataclass(frozen=True, slots=True)
class Rig:
    """Everything that runs but the load."""

    url: str
    coordinators: Program
    workers: Program
    engine_s: Mapping[str, float]
    """What probes' prompts took, by their ids; grows."""


@contextlib.asynccontextmanager
async def rig(model_path: str, num_replicas: int, coordinator_options: Sequence[str]) -> AsyncIterator[Rig]:
    """Etcd, workers and coordinators, ready to serve. Raises `RuntimeError` with the log of what does not start."""
    http = with_port("127.0.0.1:0")
    with tempfile.TemporaryDirectory(prefix="kvrelay-bench-") as folder:
        logs = Path(folder)
        workers_log, coordinator_log = logs / "workers.log", logs / "coordinator.log"
        coordinator = [
            *("kvrelay.cli", "coordinator", "--model", model_path, "--served-model-name", MODEL),
            *("--http", http, "--grpc", "127.0.0.1:0", "--replicas", str(num_replicas)),
            *("--local-prefill", "never"),  # All requests go through two workers.
            *coordinator_options,
        ]
        timing = ["--prefill-s", str(PREFILL_S), "--step-s", str(STEP_S)]
        async with (
            run_etcd() as etcd,
            program(
                *("bench.timed_workers", "--etcd", etcd.endpoint, "--model", MODEL), *timing, log=workers_log
            ) as workers,
            program(*coordinator, "--etcd", etcd.endpoint, log=coordinator_log) as coordinators,
        ):
            try:
                await _wait_ready(f"http://{http}", workers)
            except TimeoutError:
                texts = "\n".join(log.read_text()[-4000:] for log in (workers_log, coordinator_log))
                raise RuntimeError(f"the cluster did not start:\n{texts}") from None
            engine_s: dict[str, float] = {}
            reading = asyncio.create_task(_read_times(workers, engine_s))
            try:
                yield Rig(f"http://{http}", coordinators, workers, engine_s)
            finally:
                reading.cancel()


async def _wait_ready(url: str, workers: Program) -> None:
    assert workers.process.stdout is not None
    async with asyncio.timeout(_START_TIMEOUT_S):
        await workers.process.stdout.readline()
        origin = Origin.parse(url)
        num_ready = 0
        while num_ready < 20:  # Each time on a new connection: the replicas take turns at random.
            await asyncio.sleep(0.1)
            with contextlib.suppress(ConnectionError, OSError):
                async with HttpPool(origin) as pool:
                    answer = await pool.exchange(origin.request("GET", "/ready", {}))
                    num_ready = num_ready + 1 if answer.status == HTTPStatus.OK else 0


async def _read_times(workers: Program, engine_s: dict[str, float]) -> None:
    assert workers.process.stdout is not None
    async for line in workers.process.stdout:  # Logs among them.
        request_id, _, took_s = line.decode().rpartition(" ")
        if PROBE in request_id:
            engine_s[PROBE + request_id.rpartition(PROBE)[2].partition("-")[0]] = float(took_s)


class Probe:
    """Measures the time to first token of requests of its own."""

    _numbers = itertools.count()

    def __init__(self, rig: Rig, load: Load) -> None:
        self._rig = rig
        self._origin = Origin.parse(rig.url)
        self._load = load
        self._ttft_s: dict[str, float] = {}
        self.num_failed = 0

    @property
    def num_done(self) -> int:
        return len(self._ttft_s)

    def added_ms(self, percent: int) -> float:
        """A percentile of what was added to the prefill worker's own time."""
        added_s = [ttft_s - self._rig.engine_s[request_id] for request_id, ttft_s in self._ttft_s.items()]
        if len(added_s) < 2:
            return float("nan")
        return statistics.quantiles(added_s, n=100, method="inclusive")[percent - 1] * 1e3

    async def one_at_a_time(self, num_requests: int) -> None:
        async with HttpPool(self._origin) as pool:
            for _ in range(num_requests):
                await self._request(pool)

    async def steadily(self, duration_s: float) -> None:
        """Each on a connection of its own now and then, so that all replicas get some."""
        began_s, num_sent = time.perf_counter(), 0
        async with HttpPool(self._origin) as pool, asyncio.TaskGroup() as tasks:
            while (due_s := num_sent / self._load.probes_per_s) < duration_s:
                await asyncio.sleep(max(0.0, began_s + due_s - time.perf_counter()))
                tasks.create_task(self._request(pool))
                num_sent += 1

    async def _request(self, pool: HttpPool) -> None:
        number = next(self._numbers)
        request_id = f"{PROBE}{number}"
        reader = AnswerReader(time.perf_counter)
        headers = {"x-request-id": request_id}
        request = self._origin.request("POST", ROUTES[self._load.route], headers, self._body(number))
        sent_s = time.perf_counter()
        try:
            answer = await pool.exchange(request, reader.on_body)
        except ConnectionError:
            self.num_failed += 1
            return
        tokens = reader.tokens_since(0)
        if answer.status != HTTPStatus.OK or not reader.is_done or not tokens:
            self.num_failed += 1
            return
        self._ttft_s[request_id] = tokens[0][0] - sent_s

    def _body(self, number: int) -> bytes:
        words = (_WORDS[(number * 17 + word * word) % len(_WORDS)] for word in range(self._load.num_words))
        content = f"probe {number} {' '.join(words)}"
        prompt = (
            {"messages": [{"role": "user", "content": content}]} if self._load.route == "chat" else {"prompt": content}
        )
        fields = {"model": MODEL, "stream": True, "max_tokens": self._load.num_tokens, "temperature": 0}
        return msgspec.json.encode({**fields, **prompt, "ignore_eos": True})


async def wrk(url: str, load: Load) -> dict[str, Any]:
    """Returns what the script prints at the end. Raises `RuntimeError` when wrk fails."""
    arguments = [ROUTES[load.route], MODEL, str(load.num_tokens), str(load.num_words)]
    process = await asyncio.create_subprocess_exec(
        *("wrk", "--threads", "1", "--connections", str(load.connections), "--duration", f"{round(load.duration_s)}s"),
        *("--timeout", "30s", "--script", str(_LUA), url, "--", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    last = output.decode().strip().splitlines()[-1]
    if process.returncode or not last.startswith("{"):
        raise RuntimeError(f"wrk failed:\n{output.decode()}")
    summary: dict[str, Any] = json.loads(last)
    return summary


async def measure(model_path: str, num_replicas: int, load: Load, options: Sequence[str]) -> dict[str, Any]:
    """One row: first one request at a time, then the load."""
    async with rig(model_path, num_replicas, options) as running:
        warm_up, single, probe = (Probe(running, load) for _ in range(3))
        await warm_up.one_at_a_time(20)
        await single.one_at_a_time(load.num_single)
        before = _cpu(running)
        children_before = os.times()
        summary, _ = await asyncio.gather(wrk(running.url, load), probe.steadily(load.duration_s))
        used = {name: seconds - before[name] for name, seconds in _cpu(running).items()}
        children = os.times()
    used["wrk"] = children.children_user + children.children_system
    used["wrk"] -= children_before.children_user + children_before.children_system
    used["probe"] = children.user + children.system - children_before.user - children_before.system
    num_requests = summary["requests"] + probe.num_done
    num_errors = sum(summary["errors"].values()) + probe.num_failed + single.num_failed
    return {
        "replicas": num_replicas,
        "requests_per_s": num_requests / summary["duration_s"],
        "errors": num_errors,
        "added_ttft_p50_ms": probe.added_ms(50),
        "added_ttft_p99_ms": probe.added_ms(99),
        "single_added_ttft_p50_ms": single.added_ms(50),
        "cpu_ms_per_request": used["coordinators"] * 1e3 / num_requests,
        "latency_p50_ms": summary["latency_p50_s"] * 1e3,
        "latency_p99_ms": summary["latency_p99_s"] * 1e3,
        **{f"{name}_cores": seconds / summary["duration_s"] for name, seconds in used.items()},
    }


def _cpu(running: Rig) -> dict[str, float]:
    return {"coordinators": running.coordinators.cpu_s(), "workers": running.workers.cpu_s()}


def _median_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several rounds of one arm; errors add up."""
    rounds = list(rows)
    merged = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    return {**merged, "replicas": rounds[0]["replicas"], "errors": sum(row["errors"] for row in rounds)}


def _options() -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--replicas", type=int, nargs="+", default=[1, 2], metavar="N", help="arms")
    options.add_argument("--route", choices=ROUTES, default="chat")
    options.add_argument("--tokens", type=int, default=16, help="streamed tokens of an answer")
    options.add_argument("--words", type=int, default=64, help="words of a prompt")
    options.add_argument("--connections", type=int, default=360, help="requests in flight")
    options.add_argument("--seconds", type=float, default=60, help="of load, per round")
    options.add_argument(
        "--probes", type=float, default=20, metavar="PER_S", help="requests whose first token is timed"
    )
    options.add_argument("--single", type=int, default=100, help="requests one at a time")
    options.add_argument("--rounds", type=int, default=1, help="of every arm, in turns")
    options.add_argument(
        "--model", default="", help="folder or hub id of the tokenizer; the default model when not given"
    )
    options.add_argument("coordinator_options", nargs="*", help="after --: further options of `kvrelay coordinator`")
    return options.parse_args()


def main() -> None:
    given = _options()
    if shutil.which("wrk") is None:
        sys.exit("bench.coordinator needs wrk; install it, for example with: apt install wrk")
    model = resolve_model(given.model, default_cache_dir(dict(os.environ)))
    load = Load(
        route=given.route,
        num_tokens=given.tokens,
        num_words=given.words,
        connections=given.connections,
        duration_s=given.seconds,
        probes_per_s=given.probes,
        num_single=given.single,
    )
    rounds: dict[int, list[dict[str, Any]]] = {number: [] for number in given.replicas}
    for _ in range(given.rounds):
        for number, rows in rounds.items():
            rows.append(uvloop.run(measure(str(model.path), number, load, given.coordinator_options)))
    config = {name: value for name, value in vars(given).items() if name != "json"}
    report = Report("coordinator", {**config, "prefill_s": PREFILL_S, "step_s": STEP_S})
    report.rows = [_median_rows(rows) for rows in rounds.values()]
    report.figures = dict(report.rows[-1])
    report.notes.append(
        "Everything shares the machine's cores. Added: TTFT less what its prefill worker took for that request."
    )
    report.finish(given.json)


if __name__ == "__main__":
    main()
