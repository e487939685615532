"""A real cluster by the real command, as a user starts it, with everything it leaves behind counted."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from kvrelay.launch.state import RunningCluster, default_state_dir, running_cluster

START_TIMEOUT_S = 240
STOP_TIMEOUT_S = 15
_TIDY_TIMEOUT_S = 5
PROMISED_STOP_S = 10
"""`kvrelay up` ends within this time after Ctrl-C, whatever is going on."""


@dataclass(frozen=True, slots=True)
class LiveCluster:
    """A running `kvrelay up`."""

    process: subprocess.Popen[bytes]
    state: RunningCluster
    output: Path

    def children(self) -> list[psutil.Process]:
        """Every process below `up`."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def keeper_of(self, command: str) -> psutil.Process:
        """The keeper of the process that has the word `command` in its command line."""
        lines = ((child, child.cmdline()) for child in self.children())
        return next(child for child, line in lines if command in line and _is_keeper(line))

    def process_of(self, command: str) -> psutil.Process:
        """That process itself."""
        (process,) = self.keeper_of(command).children()
        assert not _is_keeper(process.cmdline())
        return process


def _is_keeper(command_line: Sequence[str]) -> bool:
    return any(word.endswith("/keeper.py") for word in command_line)


def free_port_addresses() -> Sequence[str]:
    """Flags that make the cluster take free ports."""
    return ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")


@contextlib.contextmanager
def live_cluster(home: Path, *flags: str, engine_options: Sequence[str] = ()) -> Iterator[LiveCluster]:
    """Start, wait until it is ready, end it by Ctrl-C, and check that nothing is left.

    Prompts are handed over, however short; `flags` may say otherwise.
    """
    environment = {**os.environ, "XDG_STATE_HOME": str(home)}
    output = home / "up.log"
    before = abandoned_shared_memory()
    own = (*free_port_addresses(), "--local-prefill", "never")
    command = [sys.executable, "-m", "kvrelay.cli", "up", *own, *flags, "--", *engine_options]
    with output.open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            state = wait_ready(process, home, output)
            cluster = LiveCluster(process, state, output)
            yield cluster
        finally:
            children = _descendants(process)
            took_s = stop(process)
            survivors = [child for child in children if child.is_running()]
            for child in survivors:
                child.kill()
    assert not survivors, f"left running: {survivors}"
    assert took_s < PROMISED_STOP_S
    _wait_tidy(before)
    assert not Path(state.run_dir).exists()


def wait_ready(process: subprocess.Popen[bytes], home: Path, output: Path) -> RunningCluster:
    """Until the coordinator says that it can serve."""
    deadline = time.monotonic() + START_TIMEOUT_S
    state_dir = default_state_dir({"XDG_STATE_HOME": str(home)})
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"`kvrelay up` ended with {process.returncode}:\n{output.read_text()[-4000:]}")
        state = running_cluster(state_dir)
        if state is not None and "curl" in output.read_text():
            httpx.get(f"{state.http_url}/ready").raise_for_status()
            return state
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    raise AssertionError(f"not ready after {START_TIMEOUT_S} s:\n{output.read_text()[-4000:]}")


def stop(process: subprocess.Popen[bytes]) -> float:
    """Ctrl-C; returns the seconds it took. Kills when it takes too long."""
    began = time.monotonic()
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"still there {STOP_TIMEOUT_S} s after Ctrl-C") from None
    return time.monotonic() - began


def _wait_tidy(before: set[str]) -> None:
    """Until no shared memory is abandoned that was not before: a process that starts elsewhere on the machine has some
    for a moment that it does not map yet."""
    deadline = time.monotonic() + _TIDY_TIMEOUT_S
    while left := abandoned_shared_memory() - before:
        assert time.monotonic() < deadline, f"left in shared memory: {left}"
        time.sleep(0.2)


def abandoned_shared_memory() -> set[str]:
    """Names in the machine's shared memory that no process maps any more."""
    names = set(os.listdir("/dev/shm"))
    mapped = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mapped |= {Path(mapping.path).name for mapping in process.memory_maps()}
    return names - mapped


def _descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
