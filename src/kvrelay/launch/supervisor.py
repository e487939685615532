"""How are child processes kept running, and ended together?"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kvrelay import keeper
from kvrelay.launch.marked_processes import VARIABLE, end_marked, mark

_KEEPER_OVERTIME_S = 1.0
"""What a keeper may take beyond the grace before it is killed itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """One child process."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    """All of it; nothing is inherited."""
    log_path: Path | None = None
    """Gets stdout and stderr, appended; None for where this process writes its own."""
    stage: int = 0
    """Children of a higher stage are ended, and gone, before those of a lower one are told to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorConfig:
    run_id: str
    """Marks all processes of this supervisor; unique on this machine."""
    grace_s: float = 7.0
    """Between SIGTERM and SIGKILL, for each stage."""
    first_delay_s: float = 1.0
    max_delay_s: float = 30.0
    healthy_s: float = 60.0
    """A child that ran for this long is started again without the delays collected before."""


class ChildListener(Protocol):
    """Who hears about children, in the event loop. Must not block."""

    def on_started(self, name: str, pid: int) -> None:
        """`pid` is the keeper's."""

    def on_ended(self, name: str, status: int, restart_in_s: float) -> None:
        """Not called for children that were told to end. `status` is an exit code, or 128 + a signal's number."""


class RestartDelay:
    """How long to wait before a child is started again: twice as long each time. No I/O."""

    def __init__(self, config: SupervisorConfig) -> None:
        self._config = config
        self._next_s = config.first_delay_s

    def after(self, ran_s: float) -> float:
        """The delay after a run of so many seconds."""
        if ran_s >= self._config.healthy_s:
            self._next_s = self._config.first_delay_s
        delay_s = self._next_s
        self._next_s = min(self._config.max_delay_s, 2 * delay_s)
        return delay_s


@dataclass(slots=True)
class _Child:
    spec: ChildSpec
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    process: asyncio.subprocess.Process | None = None

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


class Supervisor:
    """Starts children and starts them again when they end. Made by `supervise`.

    Every child runs under a keeper in a session of its own: a Ctrl-C at the terminal does not reach it, it ends
    with this process, and nothing that it started outlives it. A child that is started again finds no process of
    its predecessor.
    """

    def __init__(self, config: SupervisorConfig, listener: ChildListener, tasks: asyncio.TaskGroup) -> None:
        self._config = config
        self._listener = listener
        self._tasks = tasks
        self._children: list[_Child] = []
        self._hurry = asyncio.Event()
        self._stopping = asyncio.Lock()

    def start(self, spec: ChildSpec) -> None:
        """Start a child and keep it running until `stop`."""
        child = _Child(spec)
        self._children.append(child)
        self._tasks.create_task(self._keep(child), name=f"keep {spec.name}")

    def hurry(self) -> None:
        """Make a `stop` that is going on, or to come, kill at once."""
        self._hurry.set()

    async def stop(self) -> None:
        """End all children, stage by stage, and what is left of them; takes the grace and 2 s per stage at most."""
        async with self._stopping:
            for stage in sorted({child.spec.stage for child in self._children}, reverse=True):
                await self._stop_all([child for child in self._children if child.spec.stage == stage])
            await end_marked(mark(self._config.run_id), whole=False)

    async def _stop_all(self, children: Sequence[_Child]) -> None:
        for child in children:
            child.stopping.set()
            child.signal(signal.SIGTERM)
        gone: asyncio.Future[Any] = asyncio.gather(*(child.gone.wait() for child in children))
        hurry: asyncio.Future[Any] = asyncio.create_task(self._hurry.wait())
        try:
            limit_s = self._config.grace_s + _KEEPER_OVERTIME_S
            await asyncio.wait([gone, hurry], timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if not gone.done():
                for child in children:
                    child.signal(signal.SIGTERM)
                await asyncio.wait([gone], timeout=_KEEPER_OVERTIME_S)
            for child in children:
                child.signal(signal.SIGKILL)
            await gone
        finally:
            hurry.cancel()
            gone.cancel()

    async def _keep(self, child: _Child) -> None:
        delay = RestartDelay(self._config)
        loop = asyncio.get_running_loop()
        try:
            while not child.stopping.is_set():
                started = loop.time()
                status = await self._run_once(child)
                if child.stopping.is_set():
                    return
                delay_s = delay.after(loop.time() - started)
                self._listener.on_ended(child.spec.name, status, delay_s)
                with suppress(TimeoutError):
                    await asyncio.wait_for(child.stopping.wait(), delay_s)
        finally:
            child.gone.set()

    async def _run_once(self, child: _Child) -> int:
        """Until the child and all that it started are gone; the keeper's exit status."""
        spec, own_mark = child.spec, mark(self._config.run_id, child.spec.name)
        with spec.log_path.open("ab") if spec.log_path else nullcontext() as log:
            child.process = await asyncio.create_subprocess_exec(
                *keeper.command(spec.arguments, grace_s=self._config.grace_s),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**spec.environment, VARIABLE: own_mark},
                start_new_session=True,
            )
        if child.stopping.is_set():
            child.signal(signal.SIGTERM)
        self._listener.on_started(spec.name, child.process.pid)
        status = await child.process.wait()
        await end_marked(own_mark, whole=True)
        return status if status >= 0 else 128 - status


@asynccontextmanager
async def supervise(config: SupervisorConfig, listener: ChildListener) -> AsyncIterator[Supervisor]:
    """A supervisor whose children are all gone when this context is left, whichever way."""
    async with asyncio.TaskGroup() as tasks:
        supervisor = Supervisor(config, listener, tasks)
        try:
            yield supervisor
        finally:
            await asyncio.shield(supervisor.stop())
