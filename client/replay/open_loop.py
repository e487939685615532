"""Requests go out when they are due, whatever became of those before: what becomes of each?"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

import msgspec

from kvrelay.client.http_connection import Answer
from kvrelay.client.http_pool import HttpPool
from kvrelay.client.replay.answer_reader import AnswerReader, error_text
from kvrelay.client.replay.endpoint import Endpoint
from kvrelay.workload.outcome import Outcome, Status

_MOST_READY = 64
"""Requests that are made and not due yet; one of 100,000 tokens takes 600 KB."""
_REJECTIONS = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request of a trace as it is to be sent."""

    index: int
    """In the trace."""
    due_s: float
    """Since the load begins; requests are planned in this order."""
    num_prompt_tokens: int
    max_tokens: int
    token_ids: Callable[[], Sequence[int]]
    """Makes the prompt: no two need to be in memory at a time."""


@dataclass(slots=True)
class Replayed:
    """What has become of a load so far."""

    num_planned: int
    outcomes: list[Outcome] = field(default_factory=list)
    """As requests end."""
    statuses: Counter[Status] = field(default_factory=Counter)
    num_sent: int = 0
    num_in_flight: int = 0
    """Due and not ended: those that wait for a connection, too."""
    num_waited: int = 0
    """Requests that had to wait until one of `max_connections` was free."""
    send_delays_s: array[float] = field(default_factory=lambda: array("d"))
    """How much later than due each request was sent."""
    rejections: Counter[int] = field(default_factory=Counter)
    """HTTP status -> requests."""
    retry_after_s: list[float] = field(default_factory=list)
    """What rejections asked to wait."""
    tells_caching: bool = False
    """Whether the server told of cached tokens at least once."""
    interrupted: bool = False

    @property
    def num_unfinished(self) -> int:
        """Requests without an outcome, because the load was interrupted."""
        return self.num_planned - len(self.outcomes)


class OpenLoop:
    """Sends planned requests to an endpoint, at most `max_connections` at a time."""

    def __init__(self, endpoint: Endpoint, pool: HttpPool, *, max_connections: int, timeout_s: float | None) -> None:
        """A request that has not ended `timeout_s` after it was sent has failed."""
        self._endpoint = endpoint
        self._pool = pool
        self._free = asyncio.Semaphore(max_connections)
        self._timeout_s = timeout_s
        self._began_s = 0.0
        self.replayed = Replayed(num_planned=0)
        """Current while `run` runs."""

    async def run(self, planned: Sequence[PlannedRequest], stop: asyncio.Event) -> Replayed:
        """Returns when all requests have ended, or on `stop`: then those in flight are dropped and have no outcome."""
        self.replayed = Replayed(num_planned=len(planned))
        self._began_s = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            load = tasks.create_task(self._send_all(planned))
            stopped = tasks.create_task(stop.wait())
            await asyncio.wait((load, stopped), return_when=asyncio.FIRST_COMPLETED)
            self.replayed.interrupted = not load.done()
            load.cancel()
            stopped.cancel()
        return self.replayed

    async def _send_all(self, planned: Sequence[PlannedRequest]) -> None:
        contents = (self._endpoint.request(request.token_ids(), request.max_tokens) for request in planned)
        ready: deque[bytes] = deque()
        async with asyncio.TaskGroup() as tasks:
            for request in planned:
                # Many are often due at one time: their prompts are made while there is nothing to send.
                while not ready or (len(ready) < _MOST_READY and self._now_s() < request.due_s):
                    content = next(contents, None)
                    if content is None:
                        break
                    ready.append(content)
                    await asyncio.sleep(0)
                await asyncio.sleep(max(0.0, request.due_s - self._now_s()))
                tasks.create_task(self._send(request, ready.popleft()))

    async def _send(self, request: PlannedRequest, content: bytes) -> None:
        replayed = self.replayed
        replayed.num_in_flight += 1
        replayed.num_waited += self._free.locked()
        try:
            async with self._free:
                replayed.num_sent += 1
                replayed.send_delays_s.append(self._now_s() - request.due_s)
                outcome = await self._outcome(request, content)
        finally:
            replayed.num_in_flight -= 1
        replayed.outcomes.append(outcome)
        replayed.statuses[outcome.status] += 1

    async def _outcome(self, request: PlannedRequest, content: bytes) -> Outcome:
        reader = AnswerReader(self._now_s)
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._pool.exchange(content, reader.on_body)
            status, error = self._judge(answer, reader)
        except TimeoutError:
            status, error = Status.FAILED, f"not finished within {self._timeout_s:g} s"
        except (OSError, ValueError, msgspec.DecodeError) as failure:
            status, error = Status.FAILED, str(failure)
        usage, times_s = reader.usage, reader.token_times_s()
        num_cached_tokens = usage.num_cached_tokens if usage else None
        self.replayed.tells_caching |= num_cached_tokens is not None
        return Outcome(
            index=request.index,
            arrived_s=request.due_s,
            status=status,
            num_prompt_tokens=(usage.prompt_tokens if usage else 0) or request.num_prompt_tokens,
            num_output_tokens=len(times_s),
            num_cached_tokens=num_cached_tokens or 0,
            token_times_s=times_s,
            error=error,
        )

    def _judge(self, answer: Answer, reader: AnswerReader) -> tuple[Status, str]:
        """What a complete answer means, and the error if it is one."""
        if answer.status in _REJECTIONS:
            self._note_rejection(answer)
            return Status.REJECTED, ""
        if answer.status != HTTPStatus.OK:
            return Status.FAILED, f"HTTP {answer.status}: {error_text(answer.body)}"
        if reader.error is not None:
            if reader.error.code in _REJECTIONS and not reader.num_events:
                self.replayed.rejections[int(reader.error.code)] += 1
                return Status.REJECTED, ""
            return Status.FAILED, f"the stream told an error: {reader.error.message}"
        if not reader.is_done:
            return Status.FAILED, "the stream ended early"
        return Status.COMPLETED, ""

    def _note_rejection(self, answer: Answer) -> None:
        self.replayed.rejections[answer.status] += 1
        retry_after = answer.headers.get("retry-after", "")
        if retry_after.isdecimal():
            self.replayed.retry_after_s.append(float(retry_after))

    def _now_s(self) -> float:
        return time.perf_counter() - self._began_s
