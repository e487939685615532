"""`kvrelay replay` as a person or a script runs it: a process of its own, against a server of the test."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.eventually import eventually
from tests.support.scripted_http import Exchange, ScriptedHttp, scripted_http

MODELS = b'{"data": [{"id": "first", "max_model_len": 2000}, {"id": "second"}]}'


@dataclass(frozen=True, slots=True)
class Ran:
    code: int
    out: str
    err: str


@dataclass(slots=True)
class Server:
    http: ScriptedHttp
    hanging: set[int]
    """Which completions, by their order, get a token and no end."""

    @property
    def bodies(self) -> list[Any]:
        return [json.loads(each.body) for each in self.http.exchanges if each.path.endswith("completions")]


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async def answer(exchange: Exchange) -> None:
        if exchange.path == "/v1/models":
            await exchange.answer(200, MODELS)
            return
        number = len(served.bodies) - 1
        body = json.loads(exchange.body)
        await exchange.begin_stream()
        await exchange.tokens(*(["x"] if number in served.hanging else ["x"] * body["max_tokens"]))
        if number in served.hanging:
            await exchange.client_gone()
            exchange.writer.close()
        else:
            await exchange.end_stream()

    async with scripted_http(answer) as http:
        served = Server(http, set())
        yield served
        await eventually(lambda: http.num_open == 0, "connections are left open")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Four requests within 60 ms; the first two share a block."""
    lines = [
        {"timestamp": 20 * number, "input_length": 700, "output_length": 3, "hash_ids": ids}
        for number, ids in enumerate(([1, 2], [1, 3], [4, 5], [6, 7]))
    ]
    path = tmp_path / "tiny.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@asynccontextmanager
async def started(*arguments: object, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A test that fails leaves no process."""
    variables: Mapping[str, str] = {**os.environ, "XDG_STATE_HOME": "/nonexistent", **environment}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvrelay.cli"),
        *map(str, arguments),
        env=variables,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def run(*arguments: object, **environment: str) -> Ran:
    async with started(*arguments, **environment) as process:
        return await ended(process)


async def ended(process: asyncio.subprocess.Process) -> Ran:
    out, err = await process.communicate()
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


async def test_a_trace_is_replayed_and_reported(server: Server, trace: Path, tmp_path: Path) -> None:
    files = tmp_path / "a.json", tmp_path / "plots"
    ran = await run(
        *("replay", trace, "--url", server.http.url, "--json", files[0], "--plots", files[1]),
        *("--header", "x-kvrelay-tenant: t1", "--targets", "ttft=9", "--speed", "2", "--name", "mine"),
        KVRELAY_API_KEY="key-that-nobody-may-see",
    )
    assert ran.code == 0, ran.err
    assert "ttft <= 9 s" in ran.out
    bodies = sorted(server.bodies, key=lambda body: body["prompt"])
    assert {(body["model"], len(body["prompt"]), body["max_tokens"]) for body in bodies} == {("first", 700, 3)}
    assert len({tuple(body["prompt"][:512]) for body in bodies}) == 3
    assert len({tuple(body["prompt"]) for body in bodies}) == 4
    headers = server.http.exchanges[-1].headers
    assert (headers["x-kvrelay-tenant"], headers["authorization"]) == ("t1", "Bearer key-that-nobody-may-see")
    written = files[0].read_text()
    record = json.loads(written)
    assert record["name"] == "mine"
    assert (record["summary"]["num_completed"], record["summary"]["num_output_tokens"]) == (4, 12)
    assert record["summary"]["offered_requests_per_s"] == pytest.approx(100)
    assert record["summary"]["prefix_hit_rate"] is None
    assert record["details"]["num_clipped"] == 0
    assert record["config"]["headers"] == ["Authorization", "x-kvrelay-tenant"]
    assert "nobody-may-see" not in written + ran.out + ran.err
    assert {path.name for path in files[1].iterdir()} == {"load.png", "load.html"}


async def test_a_chat_with_text_and_shorter_requests(server: Server, trace: Path) -> None:
    ran = await run(
        *("replay", trace, "--url", f"{server.http.url}/v1", "--model", "second", "--endpoint", "chat"),
        *("--length-scale", "3", "--no-ignore-eos", "--limit", "1"),
    )
    assert ran.code == 0, ran.err
    (body,) = server.bodies
    assert body["model"] == "second"
    assert len(body["messages"][0]["content"].split()) == 171 + 63
    assert body["max_tokens"] == 1
    assert "ignore_eos" not in body


async def test_requests_longer_than_the_context_are_cut_or_skipped_and_counted(server: Server, trace: Path) -> None:
    cut = await run("replay", trace, "--url", server.http.url, "--max-model-len", "600")
    assert cut.code == 0, cut.err
    assert {len(body["prompt"]) for body in server.bodies} == {597}
    assert "4 requests were cut to fit" in cut.out
    skipped = await run("replay", trace, "--url", server.http.url, "--max-model-len", "600", "--too-long", "skip")
    assert (skipped.code, len(server.bodies)) == (1, 4)
    assert "all 4 requests are too long for first; --length-scale" in skipped.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_control_c_ends_the_load_and_reports_what_was_done(
    server: Server, trace: Path, tmp_path: Path, number: signal.Signals
) -> None:
    server.hanging = {1, 2, 3}
    arguments = ("replay", trace, "--url", server.http.url, "--json", tmp_path / "a.json", "--max-connections", 3)
    async with started(*arguments) as process:
        # The fourth request goes out once the first one has ended.
        await eventually(lambda: len(server.bodies) == 4, timeout_s=30)
        process.send_signal(number)
        ran = await ended(process)
    assert ran.code == 130, ran.err
    assert "Traceback" not in ran.err
    assert "3 of 4 requests are left out" in ran.out
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["summary"]["num_requests"] == record["summary"]["num_completed"] == 1
    assert record["details"]["num_unfinished"] == 3


async def test_a_request_that_fails_is_told_with_its_error_and_the_rest_goes_on(server: Server, trace: Path) -> None:
    server.hanging = {0}
    ran = await run("replay", trace, "--url", server.http.url, "--timeout", "1")
    assert ran.code == 0, ran.err
    assert "1 failed: not finished within 1 s" in ran.out


async def test_a_load_of_which_nothing_was_completed_is_a_failure(server: Server, trace: Path) -> None:
    server.hanging = {0, 1, 2, 3}
    ran = await run("replay", trace, "--url", server.http.url, "--timeout", "0.2")
    assert (ran.code, "no request was completed" in ran.err) == (1, True)


async def test_mistakes_are_one_line_that_says_what_to_do(server: Server, trace: Path, tmp_path: Path) -> None:
    url = server.http.url
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"timestamp": 0}\n')
    cases: list[tuple[list[object], int, str]] = [
        ([trace, "--url", "http://127.0.0.1:1"], 4, "nobody answers at http://127.0.0.1:1"),
        ([trace, "--url", "localhost:8000"], 2, "write http://HOST:PORT"),
        ([trace, "--url", url, "--model", "third"], 2, "does not serve third; its models: first, second"),
        ([tmp_path / "none.jsonl", "--url", url], 2, "cannot be read: No such file"),
        ([bad, "--url", url], 2, "bad.jsonl, line 1: 'input_length' is missing"),
        ([trace, "--url", url, "--endpoint", "chat", "--prompt", "tokens"], 2, "messages of a chat are text"),
        ([trace, "--url", url, "--json", tmp_path / "no" / "a.json"], 2, "there is no folder"),
        ([trace, "--url", url, "--plots", bad], 2, "File exists"),
    ]
    for arguments, code, said in cases:
        ran = await run("replay", *arguments)
        assert (ran.code, said in ran.err) == (code, True), ran
        assert len(ran.err.splitlines()) == 1
    assert server.bodies == []


async def test_loads_are_compared_in_one_table_and_one_picture(server: Server, trace: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        await run("replay", trace, "--url", server.http.url, "--json", tmp_path / f"{name}.json", "--name", "same")
    paths = tmp_path / "one.json", tmp_path / "two.json"
    ran = await run("compare", *paths, "--plots", tmp_path / "plots")
    assert ran.code == 0, ran.err
    assert all(f"same ({name})" in ran.out for name in ("one", "two"))
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"comparison.png", "comparison.html"}
    refused = await run("compare", trace)
    assert (refused.code, "is not what --json writes" in refused.err) == (2, True)
