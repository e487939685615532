"""How are the two processes of a transport run, and what do they measure?"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from bench.kv_side import Job

_ANSWER_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 10.0

# As `kvrelay up` sets it for its processes: large messages stay in the heap.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483648",
    "MALLOC_TOP_PAD_": "67108864",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One transport that is measured. Without a `receiver` the sender's process does it all."""

    name: str
    module: str
    sender: str
    receiver: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of both classes."""
    environment: Mapping[str, str] = field(default_factory=dict)
    block_bytes: Sequence[int]
    """Sizes of the blocks, or of the messages where a transport cuts the bytes as it likes."""
    optional: bool = False
    """Whether the benchmark goes on without it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One job."""

    seconds: Sequence[float]
    """Of each repetition."""
    sender_cpu_s: float
    receiver_cpu_s: float | None


class ArmError(RuntimeError):
    """A side failed, or the receiver has got other bytes than the sender has; the message has what it printed."""


class Pair:
    """A sender and its receiver, connected."""

    def __init__(self, sender: _Child, receiver: _Child | None) -> None:
        self._sender = sender
        self._receiver = receiver

    def measure(self, job: Job) -> Measured:
        """Raises `ArmError`."""
        if self._receiver is not None:
            self._receiver.ask({"expect": asdict(job)})
        sent = self._sender.ask({"send": asdict(job)})
        if self._receiver is None:
            return Measured(sent["seconds"], sent["cpu_s"], None)
        received = self._receiver.ask({"settle": True})
        if received["digest"] != sent["digest"]:
            raise ArmError(f"{self._receiver.name} holds other bytes than {self._sender.name} sent")
        return Measured(sent["seconds"], sent["cpu_s"], received["cpu_s"])


@contextlib.contextmanager
def open_pair(arm: Arm, num_bytes: int, cores: Sequence[int]) -> Iterator[Pair]:
    """Processes for jobs of up to `num_bytes`; they are gone afterwards. Raises `ArmError`."""
    with contextlib.ExitStack() as stack:
        sender = stack.enter_context(_child(arm, arm.sender, num_bytes, cores[:1]))
        receiver = None
        if arm.receiver:
            receiver = stack.enter_context(_child(arm, arm.receiver, num_bytes, cores[1:2]))
            contact = receiver.ask({"contact": True})["contact"]
            receiver.ask({"connect": sender.ask({"connect": contact})["contact"]})
        yield Pair(sender, receiver)


class _Child:
    def __init__(self, name: str, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self.name = name
        self._process = process
        self._errors = errors

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], _ANSWER_TIMEOUT_S)[0]:
            raise ArmError(f"{self.name} did not answer within {_ANSWER_TIMEOUT_S:.0f} s: {self._printed()}")
        line = self._process.stdout.readline()
        if not line:
            raise ArmError(f"{self.name} has ended: {self._printed()}")
        return dict(json.loads(line))

    def _printed(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-4000:].decode(errors="replace")


@contextlib.contextmanager
def _child(arm: Arm, class_name: str, num_bytes: int, core: Sequence[int]) -> Iterator[_Child]:
    command = [sys.executable, "-m", "bench.kv_child", arm.module, class_name, "--bytes", str(num_bytes)]
    command += [f"--core={number}" for number in core]
    command += ["--arguments", json.dumps(dict(arm.arguments))]
    environment = {**os.environ, **_MALLOC, "OMP_NUM_THREADS": "1", **arm.environment}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
        try:
            yield _Child(f"{arm.name}'s {class_name}", process, errors)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        process.stdout.close()
