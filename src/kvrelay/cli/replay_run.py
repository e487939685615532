"""How does a replay run on a terminal: signals, progress, errors?"""

from __future__ import annotations

import asyncio
import resource
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvrelay.cli.failure import FAILED, UNREACHABLE, WRONG_USAGE, fail
from kvrelay.client.replay.details import details_of, notes
from kvrelay.client.replay.open_loop import OpenLoop, Replayed
from kvrelay.client.replay.planning import Plan
from kvrelay.client.replay.session import Replay, ReplayConfig, open_replay
from kvrelay.errors import KvrelayError, ModelNotFoundError
from kvrelay.workload.outcome import Status
from kvrelay.workload.run_record import RunRecord, record_of
from kvrelay.workload.targets import Targets
from kvrelay.workload.trace import TraceRequest

_REFRESH_S = 0.25
_OTHER_FILES = 100
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A replay that has ended, or was ended."""

    config: ReplayConfig
    model: str
    plan: Plan
    replayed: Replayed

    def report(self, name: str, targets: Targets, load: Mapping[str, Any]) -> tuple[RunRecord, list[str]]:
        """The record, and sentences for people. No header's value is in it."""
        details = details_of(self.replayed, self.plan)
        config = self.config
        record = record_of(
            self.replayed.outcomes,
            targets,
            name=name,
            kind="replay",
            config={
                **load,
                "url": config.origin.url,
                "model": self.model,
                "endpoint": config.api.value,
                "prompt": config.prompt_kind.value,
                "ignore_eos": config.ignore_eos,
                "headers": sorted(config.headers),
                "max_model_len_tokens": config.fit.max_model_len_tokens,
                "too_long": config.fit.too_long.value,
                "vocab_size": config.fit.vocab_size,
                "seed": config.fit.seed,
                "max_connections": config.max_connections,
                "timeout_s": config.timeout_s,
            },
            details=details,
            caching_known=self.replayed.tells_caching,
        )
        return record, notes(details, config.max_connections)


def run(trace: Sequence[TraceRequest], config: ReplayConfig) -> Finished:
    """Leaves with a message when the server cannot be asked at all."""
    _allow_files(config.max_connections + _OTHER_FILES)
    try:
        return uvloop.run(_run(trace, config))
    except ModelNotFoundError as error:
        fail(str(error), WRONG_USAGE)
    except KvrelayError as error:
        fail(str(error), FAILED)
    except OSError as error:
        fail(f"{error}; start a cluster with `kvrelay up`, or name a server with --url http://HOST:PORT", UNREACHABLE)


async def _run(trace: Sequence[TraceRequest], config: ReplayConfig) -> Finished:
    stop = _stop_on_signal()
    async with open_replay(trace, config) as replay:
        if not replay.plan.requests:
            raise KvrelayError(
                f"all {len(trace)} requests are too long for {replay.model.name}; --length-scale makes them shorter"
            )
        async with _progress(replay):
            replayed = await replay.loop.run(replay.plan.requests, stop)
        return Finished(config=config, model=replay.model.name, plan=replay.plan, replayed=replayed)


def _stop_on_signal() -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets; the second one does what it does to every process."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def ask() -> None:
        stop.set()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

    for number in _SIGNALS:
        loop.add_signal_handler(number, ask)
    return stop


@asynccontextmanager
async def _progress(replay: Replay) -> AsyncIterator[None]:
    """Shows how it goes, on a terminal only."""
    console = Console(stderr=True)
    if not console.is_terminal:
        first, last = replay.plan.requests[0], replay.plan.requests[-1]
        print(
            f"kvrelay: replaying {len(replay.plan.requests)} requests in {last.due_s - first.due_s:.0f} s"
            f" on {replay.model.name}",
            file=sys.stderr,
        )
        yield
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(replay.plan.requests))

        def refresh() -> None:
            replayed = replay.loop.replayed
            progress.update(task, completed=len(replayed.outcomes), description=_description(replay.loop), refresh=True)

        async with asyncio.TaskGroup() as tasks:
            showing = tasks.create_task(_every(_REFRESH_S, refresh))
            try:
                yield
            finally:
                showing.cancel()
                refresh()


def _description(loop: OpenLoop) -> str:
    replayed = loop.replayed
    return (
        f"in flight {replayed.num_in_flight}, done {replayed.statuses[Status.COMPLETED]},"
        f" rejected {replayed.statuses[Status.REJECTED]}, failed {replayed.statuses[Status.FAILED]}"
    )


async def _every(period_s: float, action: Any) -> None:
    while True:
        action()
        await asyncio.sleep(period_s)


def _allow_files(wanted: int) -> None:
    """A connection is a file; shells often allow fewer than the system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
