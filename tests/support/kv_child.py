"""Starts a sender or a receiver as a process, tells it what to do and looks at its memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from kvrelay.launch.plan import MALLOC_ENVIRONMENT

_ROOT = Path(__file__).parents[2]
_END_S = 20.0


class KvChild:
    """One process; one command at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, command: str, **arguments: Any) -> Any:
        """Have a command carried out; returns its answer."""
        await self.tell(command, **arguments)
        return await self.answer()

    async def tell(self, command: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
        await self._process.stdin.drain()

    async def answer(self) -> Any:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        assert line, "the process has ended"
        return json.loads(line)

    async def release(self) -> None:
        """After `hold`."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        await self.answer()

    def stop(self) -> None:
        """SIGSTOP: all its connections stay, and nobody answers."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        """SIGKILL; it is gone when this returns."""
        self._process.kill()
        await self._process.wait()

    def private_bytes(self) -> int:
        """Memory of its own: the shared segment is not in it."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
        assert found
        return int(found[1]) << 10

    async def end(self) -> None:
        """Close its input; it ends in order."""
        self.go_on()
        assert self._process.stdin is not None
        self._process.stdin.close()
        async with asyncio.timeout(_END_S):
            assert await self._process.wait() == 0


@contextlib.asynccontextmanager
async def kv_child(kind: str, num_blocks: int) -> AsyncIterator[KvChild]:
    """A "sender" or a "receiver" with room for so many blocks. Unless it is killed, it must end in order, with nothing
    in flight."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.kv_process", kind, str(num_blocks)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **MALLOC_ENVIRONMENT},
        cwd=_ROOT,
    )
    child = KvChild(process)
    try:
        yield child
        if process.returncode is None:
            await child.end()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
