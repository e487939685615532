"""Does the engine still work? Watched by what it does, and by a token that it is asked for when it does nothing."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import structlog

from kvrelay.engine.base import EngineDeadError, EngineRequest, KvPlan, KvReport, KvReportKind
from kvrelay.heartbeat import Silence
from kvrelay.v1 import common_pb2, worker_pb2
from kvrelay.worker.engine_calls import EngineCalls

_log = structlog.get_logger(__name__)
_MAX_TICK_S = 1.0


class EngineStuckError(EngineDeadError):
    """The engine has work and does none of it: the worker process must end, its engine cannot be trusted again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchConfig:
    """When is an engine stuck, and how often is it asked whether it works?"""

    stuck_s: float = 60.0
    """With work, and without the end of a step. One step of a long prompt on a CPU takes some ten seconds."""
    health_interval_s: float = 30.0
    """After the latest token, an engine without requests is asked for one."""
    probe_timeout_s: float | None = None
    """A token that takes longer says that the engine is not healthy; `stuck_s` when None."""

    @property
    def tick_s(self) -> float:
        """How often the watch looks."""
        return min(_MAX_TICK_S, self.stuck_s / 8, self.health_interval_s / 4)


DEFAULT_WATCH = WatchConfig()


class Verdict(enum.Enum):
    """What a look at the engine says."""

    FINE = enum.auto()
    ASK = enum.auto()
    """It has done nothing for a while: nobody knows whether it could."""
    SLOW = enum.auto()
    """The token that it was asked for takes too long."""
    STUCK = enum.auto()


class Progress:
    """What the engine has done of late. No I/O; `clock` is in seconds and never goes back."""

    def __init__(self, config: WatchConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._silence = Silence(config.stuck_s, tick_s=config.tick_s, clock=clock)
        self._probe_timeout_s = config.stuck_s if config.probe_timeout_s is None else config.probe_timeout_s
        self._token_s = clock()
        self._asked_s: float | None = None

    def saw_step(self) -> None:
        """A step has ended, or KV was moved."""
        self._silence.heard()

    def saw_token(self) -> None:
        """Somebody got a token."""
        self._token_s = self._clock()

    def asked(self) -> None:
        """It is asked for a token; `answered` follows."""
        self._asked_s = self._clock()

    def answered(self) -> None:
        """The question is over, whatever came of it. The next one has time."""
        self._asked_s = None
        self._token_s = self._clock()

    def look(self, *, has_requests: bool) -> Verdict:
        """Once every `tick_s`; time in which this event loop did not run is not held against the engine."""
        if not has_requests and self._asked_s is None:
            self._silence.heard()
        if self._silence.tick():
            return Verdict.STUCK
        now_s = self._clock()
        if self._asked_s is not None:
            return Verdict.SLOW if now_s - self._asked_s >= self._probe_timeout_s else Verdict.FINE
        is_due = not has_requests and now_s - self._token_s >= self._config.health_interval_s
        return Verdict.ASK if is_due else Verdict.FINE


class EngineWatch:
    """Runs beside the engine. What it asks the engine is in no account of requests, in no cache and in no fit."""

    def __init__(
        self,
        calls: EngineCalls,
        tickets: Iterator[int],
        has_requests: Callable[[], bool],
        config: WatchConfig = DEFAULT_WATCH,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tickets`: those of the requests; `has_requests`: whether the engine has any."""
        self.is_healthy = False
        """Whether the latest token that somebody wanted came, in time."""
        self.changed = asyncio.Event()
        """Set whenever `is_healthy` changes; whoever waits for it clears it."""
        self._calls = calls
        self._tickets = tickets
        self._has_requests = has_requests
        self._config = config
        self._progress = Progress(config, clock)
        self._open: set[int] = set()
        """Tickets of questions that the engine has not closed."""
        self._answer: asyncio.Future[bool] | None = None
        self._asked_id = ""
        self._asking: asyncio.Task[None] | None = None
        self._is_over = False

    def saw_step(self, *, has_tokens: bool) -> None:
        """The engine has ended a step."""
        self._progress.saw_step()
        if has_tokens:
            self._progress.saw_token()
            self._set_healthy(True)

    def take(self, delta: worker_pb2.TokenDelta) -> None:
        """Of nobody's request: what the engine was asked for, perhaps."""
        if delta.request_id == self._asked_id and self._answer is not None and not self._answer.done():
            self._answer.set_result(bool(delta.token_ids))

    def takes(self, report: KvReport) -> bool:
        """Whether the engine reports of a question. A slot, as of a block of one token, is the caller's to release."""
        self._progress.saw_step()
        if report.ticket not in self._open:
            return False
        if report.kind is KvReportKind.CLOSED:
            self._open.remove(report.ticket)
        return True

    async def run(self) -> None:
        """Look again and again. Raises `EngineStuckError`, and what the engine raises that is dead."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await asyncio.sleep(self._config.tick_s)
                match self._progress.look(has_requests=self._has_requests()):
                    case Verdict.STUCK:
                        self._set_healthy(False)
                        raise EngineStuckError(f"the engine has work and ended no step for {self._config.stuck_s:g} s")
                    case Verdict.SLOW:
                        self._set_healthy(False)
                    case Verdict.ASK if not self._is_over:
                        self._asking = tasks.create_task(self.ask(), name="engine-health")

    async def ask(self) -> None:
        """Have the engine generate a token; `is_healthy` says whether it did. Cancellation ends it in the engine too.

        `run` goes on meanwhile and bounds it. Raises `EngineDeadError`.
        """
        self._progress.asked()
        ticket = next(self._tickets)
        self._asked_id = f"health.{ticket}"
        self._answer = asyncio.get_running_loop().create_future()
        self._open.add(ticket)
        try:
            await self._calls.submit(_question(self._asked_id, ticket), lambda: self._open.discard(ticket))
            self._set_healthy(await self._answer)
        except asyncio.CancelledError:
            self._calls.abort(self._asked_id)
            raise
        except EngineDeadError:
            raise
        except Exception:  # The boundary: whatever an engine has against the question, it does not generate.
            _log.exception("the engine takes no health check")
            self._set_healthy(False)
        finally:
            self._answer = None
            self._progress.answered()

    def stop_asking(self) -> None:
        """The worker leaves: no question is begun any more, and one that is open ends."""
        self._is_over = True
        if self._asking is not None:
            self._asking.cancel()

    def _set_healthy(self, is_healthy: bool) -> None:
        if is_healthy != self.is_healthy:
            self.is_healthy = is_healthy
            self.changed.set()
            (_log.info if is_healthy else _log.error)("engine health", generates=is_healthy)


def _question(request_id: str, ticket: int) -> EngineRequest:
    """One token after one token. No block becomes full, and no other request could find it."""
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=[0],
        sampling=common_pb2.SamplingParams(max_tokens=1, ignore_eos=True),
        kv=KvPlan(ticket=ticket),
        cache_salt=request_id,
    )
