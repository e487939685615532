"""Children are kept running, and nothing of them is left, however they or their supervisor end."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvrelay.launch.marked_processes import mark, marked
from kvrelay.launch.run_directory import remove_leftovers, run_directory
from kvrelay.launch.supervisor import ChildSpec, SupervisorConfig, supervise
from tests.support.processes import gone

_FAMILY = """
import os, signal, subprocess, sys
from multiprocessing.shared_memory import SharedMemory
signal.signal(signal.SIGTERM, getattr(signal, sys.argv[2]))
segment = SharedMemory(create=True, size=4096)
grandchild = subprocess.Popen([sys.executable, "-c", '''
import signal, sys
from multiprocessing.shared_memory import SharedMemory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
segment = SharedMemory(sys.argv[1])
print(flush=True)
while True:
    signal.pause()
''', segment.name], start_new_session=True, stdout=subprocess.PIPE)
grandchild.stdout.readline()
with open(sys.argv[1], "w") as told:
    told.write(f"{os.getpid()} {grandchild.pid} {segment.name}")
while True:
    signal.pause()
"""
"""Says who it is in a pipe, and has a grandchild in another session that ignores SIGTERM and shares memory with it."""


class Family:
    """What one incarnation of `_FAMILY` says about itself."""

    def __init__(self, told: str) -> None:
        child, grandchild, segment = told.split()
        self.child, self.grandchild = int(child), int(grandchild)
        self.segment = Path("/dev/shm") / segment

    def is_gone(self) -> bool:
        """Both processes, and their shared memory."""
        return gone([self.child, self.grandchild]) and not self.segment.exists()


class Listener:
    """Queues what it hears."""

    def __init__(self) -> None:
        self.started: asyncio.Queue[int] = asyncio.Queue()
        self.ended: asyncio.Queue[tuple[int, float]] = asyncio.Queue()

    def on_started(self, name: str, pid: int) -> None:
        self.started.put_nowait(pid)

    def on_ended(self, name: str, status: int, restart_in_s: float) -> None:
        self.ended.put_nowait((status, restart_in_s))


@pytest.fixture
def config() -> Iterator[SupervisorConfig]:
    run_id = f"test-{secrets.token_hex(4)}"
    yield SupervisorConfig(run_id=run_id, grace_s=0.5, first_delay_s=0.05, max_delay_s=0.2)
    assert marked(mark(run_id), whole=False) == []


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def _spec(tmp_path: Path, code: str, *arguments: str, name: str = "child", stage: int = 0) -> ChildSpec:
    return ChildSpec(
        name=name,
        arguments=[sys.executable, "-c", code, *arguments],
        environment=dict(os.environ),
        log_path=tmp_path / f"{name}.log",
        stage=stage,
    )


async def _read(pipe: Path) -> Family:
    return Family(await asyncio.to_thread(pipe.read_text))


async def test_a_child_that_ends_is_started_again_ever_more_slowly(tmp_path: Path, config: SupervisorConfig) -> None:
    listener = Listener()
    async with supervise(config, listener) as supervisor:
        supervisor.start(_spec(tmp_path, "import sys; print('hello', flush=True); sys.exit(3)"))
        ends = [await listener.ended.get() for _ in range(4)]
    assert ends == [(3, 0.05), (3, 0.1), (3, 0.2), (3, 0.2)]
    assert (tmp_path / "child.log").read_text().startswith("hello\nhello\nhello\nhello\n")


@pytest.mark.parametrize("victim", ["child", "keeper", "grandchild and child"])
async def test_nothing_of_a_killed_child_is_left_when_it_is_started_again(
    tmp_path: Path, config: SupervisorConfig, pipe: Path, victim: str
) -> None:
    listener = Listener()
    async with supervise(config, listener) as supervisor:
        supervisor.start(_spec(tmp_path, _FAMILY, str(pipe), "SIG_IGN"))
        its_keeper = await listener.started.get()
        first = await _read(pipe)
        for pid in {"child": [first.child], "keeper": [its_keeper]}.get(victim, [first.grandchild, first.child]):
            os.kill(pid, signal.SIGKILL)
        assert (await listener.ended.get())[0] == 128 + signal.SIGKILL
        assert first.is_gone()
        second = await _read(pipe)
        assert second.child != first.child
    assert second.is_gone()


@pytest.mark.parametrize("attitude", ["SIG_DFL", "SIG_IGN"])
async def test_stopping_ends_the_willing_and_the_unwilling(
    tmp_path: Path, config: SupervisorConfig, pipe: Path, attitude: str
) -> None:
    listener = Listener()
    async with supervise(config, listener) as supervisor:
        supervisor.start(_spec(tmp_path, _FAMILY, str(pipe), attitude))
        family = await _read(pipe)
        async with asyncio.timeout(5):
            await supervisor.stop()
        assert family.is_gone()
        assert listener.ended.empty()


async def test_in_a_hurry_nobody_has_grace(tmp_path: Path, pipe: Path) -> None:
    config = SupervisorConfig(run_id=f"test-{secrets.token_hex(4)}", grace_s=300)
    async with supervise(config, Listener()) as supervisor:
        supervisor.start(_spec(tmp_path, _FAMILY, str(pipe), "SIG_IGN"))
        family = await _read(pipe)
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            tasks.create_task(supervisor.stop())
            supervisor.hurry()
    assert family.is_gone()


async def test_higher_stages_are_gone_before_lower_ones_are_told(tmp_path: Path, config: SupervisorConfig) -> None:
    order = tmp_path / "order"
    code = """
import os, signal, sys, time
def end(*_):
    with open(sys.argv[1], "a") as order:
        order.write(sys.argv[2])
    os._exit(0)
signal.signal(signal.SIGTERM, end)
os.kill(os.getppid(), 0)
open(sys.argv[1] + sys.argv[2], "w").close()
while True:
    signal.pause()
"""
    for name in "ab":
        os.mkfifo(f"{order}{name}")
    async with supervise(config, Listener()) as supervisor:
        supervisor.start(_spec(tmp_path, code, str(order), "a", name="a", stage=0))
        supervisor.start(_spec(tmp_path, code, str(order), "b", name="b", stage=1))
        for name in "ab":
            await asyncio.to_thread(Path(f"{order}{name}").read_text)
    assert order.read_text() == "ba"


async def test_a_command_that_does_not_exist_is_named_in_the_log(tmp_path: Path, config: SupervisorConfig) -> None:
    listener = Listener()
    missing = ChildSpec(
        name="missing", arguments=["/nowhere/program"], environment={}, log_path=tmp_path / "missing.log"
    )
    async with supervise(config, listener) as supervisor:
        supervisor.start(missing)
        assert (await listener.ended.get())[0] == 127
    assert "cannot run /nowhere/program" in missing.log_path.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_nothing_outlives_the_supervisor(
    tmp_path: Path, pipe: Path, config: SupervisorConfig, number: signal.Signals
) -> None:
    with _supervisor_process(config.run_id, tmp_path, pipe) as supervisor:
        family = await _read(pipe)
        everybody = marked(mark(config.run_id, "child"), whole=True)
        assert {family.child, family.grandchild} < set(everybody)
        supervisor.send_signal(number)
        assert supervisor.wait(10) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        assert gone(everybody)
        assert family.is_gone()


async def test_leftovers_of_a_run_that_was_killed_are_removed(tmp_path: Path, pipe: Path) -> None:
    with run_directory() as run_dir, _supervisor_process(run_dir.name, tmp_path, pipe) as supervisor:
        family = await _read(pipe)
        supervisor.kill()
        supervisor.wait(10)
        assert await asyncio.to_thread(remove_leftovers, run_dir)
        assert family.is_gone()
        assert not run_dir.exists()
        assert not await asyncio.to_thread(remove_leftovers, run_dir)


def test_a_run_directory_is_private_and_goes() -> None:
    with run_directory() as path:
        assert path.stat().st_mode & 0o777 == 0o700
        (path / "socket").touch()
    assert not path.exists()


@contextmanager
def _supervisor_process(run_id: str, log_dir: Path, pipe: Path) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [run_id, str(log_dir), sys.executable, "-c", _FAMILY, str(pipe), "SIG_IGN"]
    with subprocess.Popen([sys.executable, "-m", "tests.support.supervised", *arguments]) as process:
        try:
            yield process
        finally:
            process.kill()
