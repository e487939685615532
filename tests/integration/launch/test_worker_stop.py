"""A worker that is told to end leaves no process, file or shared memory, whatever it was doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.processes import gone

_WORKER = """
import asyncio, subprocess, sys, threading
from kvrelay.engine.simulated import SimulatedEngine
from kvrelay.engine.simulated_model import SimulatedConfig
from kvrelay.launch import worker
from kvrelay.launch.engines import EngineChoice
from kvrelay.v1 import cluster_pb2
from kvrelay.worker.store_config import StoreConfig

moment, core = sys.argv[1:]

class StuckEngine(SimulatedEngine):
    async def start(self, segment, on_kv_reports):
        process = subprocess.Popen([sys.executable, "-c", core], stdout=subprocess.PIPE, text=True)
        print(process.stdout.readline(), end="", flush=True)
        if moment == "blocks":
            threading.Event().wait()
        if moment == "loads":
            await asyncio.to_thread(threading.Event().wait)
        return await super().start(segment, on_kv_reports)

    async def close(self):
        print("closing", flush=True)
        await asyncio.to_thread(threading.Event().wait)

worker.make_engine = lambda choice: StuckEngine(SimulatedConfig())
config = worker.WorkerConfig(
    role=cluster_pb2.ROLE_DECODE, worker_id="w", etcd=["127.0.0.1:1"], drain_s=0.1,
    engine=EngineChoice(model="m", served_model_name="m"), store=StoreConfig(size_bytes=1 << 20),
)
sys.exit(worker.run_worker(config))
"""
_CORE = """
import os, signal, subprocess, sys
from multiprocessing.shared_memory import SharedMemory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
rank = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
segment = SharedMemory(create=True, size=4096)
print("engine", os.getpid(), rank.pid, segment.name, flush=True)
while True:
    signal.pause()
"""
"""What an engine starts: a process that ignores SIGTERM, has one of its own, and holds shared memory."""


@dataclass(frozen=True, slots=True)
class Worker:
    process: subprocess.Popen[str]
    temporary: Path
    children: tuple[int, int]
    segment: Path

    def wait_for(self, text: str) -> None:
        """Until it has said so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return
        raise AssertionError(f"it ended without saying {text!r}")

    def is_gone(self) -> bool:
        return gone(self.children) and not self.segment.exists() and not list(self.temporary.iterdir())


@contextmanager
def worker(moment: str, temporary: Path) -> Iterator[Worker]:
    """Its engine has begun to load."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WORKER, moment, _CORE],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout:
        told = next(line for line in process.stdout if line.startswith("engine "))
        _, core, rank, segment = told.split()
        try:
            yield Worker(process, temporary, (int(core), int(rank)), Path("/dev/shm") / segment)
        finally:
            process.kill()
            for pid in (int(core), int(rank)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["loads", "blocks"])
def test_the_first_signal_ends_a_worker_whose_engine_loads(moment: str, number: signal.Signals, tmp_path: Path) -> None:
    with worker(moment, tmp_path) as loading:
        assert list(tmp_path.iterdir()), "a directory for the engine's files"
        began = time.monotonic()
        loading.process.send_signal(number)
        assert loading.process.wait(10) == 0
        assert time.monotonic() - began < 2.0
        assert loading.is_gone()


def test_a_second_signal_ends_a_worker_at_once(tmp_path: Path) -> None:
    with worker("serves", tmp_path) as serving:
        serving.wait_for("serving")
        serving.process.send_signal(signal.SIGTERM)
        serving.wait_for("closing")
        began = time.monotonic()
        serving.process.send_signal(signal.SIGINT)
        assert serving.process.wait(10) == 128 + signal.SIGINT
        assert time.monotonic() - began < 2.0
        assert serving.is_gone()
