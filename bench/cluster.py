"""A cluster to measure: the one that `kvrelay up` starts, on free ports, with a state directory of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from kvrelay.launch.state import RunningCluster, default_state_dir, running_cluster

_START_TIMEOUT_S = 300


@contextlib.contextmanager
def measured_cluster(*flags: str, engine_options: Sequence[str] = ()) -> Iterator[RunningCluster]:
    """Start it, wait until it can serve, and end it by Ctrl-C. Every prompt that can be is handed over.

    Raises `RuntimeError` when it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="kvrelay-bench-") as home:
        environment = {**os.environ, "XDG_STATE_HOME": home}
        own = ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--local-prefill", "never")
        command = [sys.executable, "-m", "kvrelay.cli", "up", *own, *flags]
        with (Path(home) / "up.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, "--", *engine_options], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            yield _wait_ready(process, Path(home))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def _wait_ready(process: subprocess.Popen[bytes], home: Path) -> RunningCluster:
    state_dir = default_state_dir({"XDG_STATE_HOME": str(home)})
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        state = running_cluster(state_dir)
        with contextlib.suppress(httpx.TransportError):
            if state is not None and httpx.get(f"{state.http_url}/ready").is_success and "curl" in _output(home):
                return state
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    raise RuntimeError(f"the cluster did not start:\n{_output(home)[-4000:]}")


def _output(home: Path) -> str:
    return (home / "up.log").read_text()
