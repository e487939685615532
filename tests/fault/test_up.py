"""`kvrelay up` outlives its children, never the other way round. Engines are simulated, everything else is real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import httpx
import psutil
import pytest

from tests.support.live_cluster import PROMISED_STOP_S, LiveCluster, free_port_addresses, live_cluster, stop, wait_ready
from tests.support.processes import gone

pytestmark = pytest.mark.timeout(300)

MODEL = "SmolLM2-135M-Instruct"
WAIT_S = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    with live_cluster(tmp_path_factory.mktemp("up"), "--engine", "simulated") as cluster:
        yield cluster


def test_a_second_one_says_where_the_first_is(cluster: LiveCluster) -> None:
    second = _up(cluster.output.parent, *free_port_addresses())
    output, _ = second.communicate(timeout=WAIT_S)
    assert second.returncode == 1
    assert f"a cluster runs already at {cluster.state.http_url} (process {cluster.process.pid})" in output.decode()


@pytest.mark.parametrize(
    ("command", "name", "back"),
    [
        ("prefill-worker", "prefill-0", "prefill-0 is back."),
        ("decode-worker", "decode-0", "decode-0 is back."),
        ("coordinator", "coordinator", "coordinator is back."),
        ("--name=throw-away", "etcd", "etcd runs again."),
    ],
)
@pytest.mark.parametrize("victim", ["process", "keeper"])
def test_a_killed_child_is_started_again(cluster: LiveCluster, command: str, name: str, back: str, victim: str) -> None:
    seen = len(cluster.output.read_text())
    keeper = cluster.keeper_of(command)
    (child,) = keeper.children()
    os.kill(keeper.pid if victim == "keeper" else child.pid, signal.SIGKILL)
    text = _wait_output(cluster, back, seen)
    assert f"{name} was ended by SIGKILL; starting it again in" in text
    assert gone([keeper.pid, child.pid])
    _wait_answer(cluster)


def test_requests_go_on_without_etcd(cluster: LiveCluster) -> None:
    keeper = cluster.keeper_of("--name=throw-away")
    (etcd,) = keeper.children()
    etcd.suspend()
    try:
        assert _ask(cluster).status_code == 200
    finally:
        etcd.resume()


def test_it_ends_in_time_although_a_request_goes_on(tmp_path: Path) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 4000, "stream": True}
    with (
        live_cluster(tmp_path, "--engine", "simulated") as cluster,
        httpx.stream("POST", f"{cluster.state.http_url}/v1/completions", json=body, timeout=30) as answer,
    ):
        assert next(answer.iter_lines()).startswith("data: ")
        assert stop(cluster.process) < PROMISED_STOP_S


def test_when_up_is_killed_nothing_survives_and_the_next_one_tidies_up(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with output.open("wb") as log:
        process = _up(tmp_path, "--engine", "simulated", *free_port_addresses(), stdout=log)
    try:
        state = wait_ready(process, tmp_path, output)
        children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    finally:
        process.kill()
        process.wait()
    assert gone(children)
    assert Path(state.run_dir).exists()

    wrong = _up(tmp_path, "--engine", "simulated", *free_port_addresses(), "--", "--no-such-option", "1")
    text = wrong.communicate(timeout=WAIT_S)[0].decode()

    assert wrong.returncode == 1
    assert "Cleaned up after an earlier run that was killed." in text
    assert not Path(state.run_dir).exists()
    assert "--no-such-option" in text, "the end of the failed worker's log"
    assert "The cluster did not start" in text


def _up(home: Path, *flags: str, stdout: int | BinaryIO = subprocess.PIPE) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvrelay.cli", "up", *flags],
        env={**os.environ, "XDG_STATE_HOME": str(home)},
        stdout=stdout,
        stderr=subprocess.STDOUT,
    )


def _wait_output(cluster: LiveCluster, wanted: str, begin: int) -> str:
    """What was printed from `begin` on, once `wanted` is in it."""
    for _ in range(int(WAIT_S / 0.2)):
        text = cluster.output.read_text()[begin:]
        if wanted in text:
            return text
        with suppress(subprocess.TimeoutExpired):
            cluster.process.wait(0.2)
    raise AssertionError(f"{wanted!r} was not printed within {WAIT_S:g} s")


def _wait_answer(cluster: LiveCluster) -> None:
    for _ in range(int(WAIT_S / 0.2)):
        with suppress(httpx.HTTPError):
            if _ask(cluster).status_code == 200:
                return
        with suppress(subprocess.TimeoutExpired):
            cluster.process.wait(0.2)
    raise AssertionError(f"no answer within {WAIT_S:g} s")


def _ask(cluster: LiveCluster) -> httpx.Response:
    body = {"model": MODEL, "prompt": "lighthouse " * 50, "max_tokens": 4}
    return httpx.post(f"{cluster.state.http_url}/v1/completions", json=body, timeout=30)
