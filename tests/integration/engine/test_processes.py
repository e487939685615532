"""An engine's processes end, and the shared memory of those that were killed goes, but nobody else's."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvrelay.engine.processes import EngineProcesses

_MAP = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
print("mapped", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    path = Path(f"/dev/shm/kvrelay-test-{tmp_path.name}")
    path.write_bytes(bytes(4096))
    yield path
    path.unlink(missing_ok=True)


@contextmanager
def mapping(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A child that has the file mapped until it is killed."""
    command = [sys.executable, "-c", _MAP, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "mapped\n"
        yield child
        child.kill()


def test_what_a_killed_child_had_is_removed(shared: Path) -> None:
    processes = EngineProcesses()
    with mapping(shared):
        processes.note()
    processes.note()
    assert shared.exists()
    processes.end()
    assert not shared.exists()
    processes.end()


def test_what_still_runs_is_killed_first(shared: Path) -> None:
    processes = EngineProcesses()
    with mapping(shared) as child:
        processes.note()
        processes.end()
        assert not shared.exists()
        assert child.wait(5) == -signal.SIGKILL


def test_what_a_stranger_uses_too_stays(shared: Path) -> None:
    processes = EngineProcesses()
    with mapping(shared):
        processes.note()
        with mapping(shared) as stranger:
            processes.end()
            assert shared.exists()
            assert stranger.poll() is None


def test_what_no_child_had_stays(shared: Path) -> None:
    processes = EngineProcesses()
    processes.note()
    processes.end()
    assert shared.exists()


def test_a_resource_tracker_is_left_to_clean_up() -> None:
    code = "from multiprocessing.resource_tracker import main; import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tracker:
        assert tracker.stdout is not None
        tracker.stdout.readline()
        processes = EngineProcesses()
        processes.note()
        processes.end()
        tracker.communicate()
    assert tracker.returncode == 0
