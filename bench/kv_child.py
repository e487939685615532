"""The process that runs one side of a transport: `python -m bench.kv_child MODULE CLASS`.

It does what the parent says, a JSON line on standard input for each command, answered by one on standard output. The
end of the input ends the process, whatever its transport is waiting for.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import sys
import threading
import traceback
from typing import Any, TextIO

import numpy as np
import xxhash

from bench.kv_side import Job, Receiver, Sender, Side


class _Commands:
    """Carries out the parent's commands."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._cpu_s = 0.0
        self._job: Job | None = None

    def run(self, command: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer."""
        if "connect" in command:
            self._side.connect(command["connect"])
            return {"contact": self._side.contact()}
        if "send" in command:
            return self._send(Job(**command["send"]))
        if "expect" in command:
            return self._expect(Job(**command["expect"]))
        if "settle" in command:
            return self._settle()
        return {"contact": self._side.contact()}

    def _send(self, job: Job) -> dict[str, Any]:
        assert isinstance(self._side, Sender)
        self._side.prepare(job)
        for number, block in enumerate(self._side.blocks(job)):
            block[:16].view(np.uint64)[:] = job.stamp, number
        began_s = _cpu_s()
        seconds = self._side.send(job)
        cpu_s = _cpu_s() - began_s
        self._side.check(job)
        return {"seconds": seconds, "cpu_s": cpu_s, "digest": _digest(self._side, job)}

    def _expect(self, job: Job) -> dict[str, Any]:
        self._job = job
        self._side.prepare(job)
        running = threading.Event()
        self._thread = threading.Thread(target=self._receive, args=(job, running), daemon=True)
        self._cpu_s = _cpu_s()
        self._thread.start()
        running.wait()
        return {}

    def _receive(self, job: Job, running: threading.Event) -> None:
        assert isinstance(self._side, Receiver)
        running.set()
        try:
            self._side.receive(job)
        except BaseException as error:
            self._failure = error
            raise

    def _settle(self) -> dict[str, Any]:
        assert self._thread is not None
        assert self._job is not None
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return {"cpu_s": _cpu_s() - self._cpu_s, "digest": _digest(self._side, self._job)}


def _digest(side: Side, job: Job) -> str:
    digest = xxhash.xxh3_128()
    for block in side.blocks(job):
        digest.update(block.data)
    return digest.hexdigest()


def _cpu_s() -> float:
    """Of this process with all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Run one side."""
    options = argparse.ArgumentParser(description="One side of a transport, for bench.kv")
    options.add_argument("module")
    options.add_argument("name", help="the class in it")
    options.add_argument("--bytes", type=int, required=True, help="most that a job moves")
    options.add_argument("--core", type=int)
    options.add_argument("--arguments", type=json.loads, default={}, help="more arguments of the class, as JSON")
    args = options.parse_args()
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Libraries print.
    status = 1
    try:
        side: Side = getattr(importlib.import_module(args.module), args.name)(args.bytes, **args.arguments)
        try:
            _serve(_Commands(side), answers)
        finally:
            side.close()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # The threads of a broken transfer would keep it.


def _serve(commands: _Commands, answers: TextIO) -> None:
    for line in sys.stdin:
        print(json.dumps(commands.run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
