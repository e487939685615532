"""Who asks? A steady load of clients, each of which keeps all that it gets and when."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from kvrelay.client import AsyncClient, KvrelayError
from kvrelay.client.options import GenerateOptions
from tests.chaos.cluster import Cluster
from tests.chaos.members import COORDINATORS
from tests.chaos.plans import RequestPlan
from tests.chaos.verdict import HttpStatusError

MODEL = "SmolLM2-135M-Instruct"
TIMEOUT_S = 90.0
"""Longer than a request may wait for workers: what takes this long has been forgotten."""


@dataclass(slots=True)
class Answer:
    """What one client got. Times are those of `time.monotonic`."""

    plan: RequestPlan
    coordinator: str
    """Which was asked: another one than planned while that one was not there."""
    began_s: float
    ended_s: float | None = None
    tokens: list[list[int]] = field(default_factory=list)
    """Of each completion."""
    token_times_s: list[float] = field(default_factory=list)
    """Of every chunk with tokens."""
    error: Exception | None = None
    cancelled: bool = False
    abandoned: bool = False
    """It had not ended when the run had."""

    def take(self, index: int, token_ids: tuple[int, ...]) -> None:
        """The next tokens of a completion."""
        self.tokens[index].extend(token_ids)
        if token_ids:
            self.token_times_s.append(time.monotonic())

    @property
    def is_open(self) -> bool:
        return self.ended_s is None


class Load:
    """All requests of a run. Made by `open_load`."""

    def __init__(
        self, cluster: Cluster, clients: Mapping[str, AsyncClient], http: httpx.AsyncClient, tasks: asyncio.TaskGroup
    ) -> None:
        self.answers: list[Answer] = []
        self._cluster = cluster
        self._clients = clients
        self._http = http
        self._tasks = tasks
        self._running: dict[int, asyncio.Task[None]] = {}

    @property
    def open_answers(self) -> list[Answer]:
        """Of the requests that run now, the oldest first."""
        return [answer for answer in self.answers if answer.is_open]

    async def run(self, plans: Iterator[RequestPlan], seconds: float) -> None:
        """Send requests when they are due, for so long, whether earlier ones have ended or not."""
        began_s = time.monotonic()
        for plan in plans:
            if plan.at_s > seconds:
                return
            await asyncio.sleep(max(0.0, began_s + plan.at_s - time.monotonic()))
            self.start(plan)

    def start(self, plan: RequestPlan, client: AsyncClient | None = None, *, pause_s: float = 0.0) -> Answer:
        """Send one now, by a client of its own if given, that waits for so long after every chunk."""
        answer = Answer(plan, self._asked(plan), time.monotonic(), tokens=[[] for _ in range(plan.n)])
        self.answers.append(answer)
        work = {"http": self._over_http, "events": self._by_events}.get(plan.way)
        asking = work(answer) if work else self._stream(answer, client, pause_s)
        task = self._tasks.create_task(self._note_end(answer, asking), name=plan.request_id)
        self._running[plan.index] = task
        task.add_done_callback(lambda _: self._running.pop(plan.index))
        return answer

    def cancel(self, answer: Answer) -> None:
        """Its client wants no more of it."""
        if task := self._running.get(answer.plan.index):
            answer.cancelled = True
            task.cancel()

    async def wait_ended(self) -> None:
        """Until no request runs any more."""
        while self._running:
            await asyncio.wait(list(self._running.values()))

    def abandon(self) -> None:
        """End what does not end by itself; it counts as never ended."""
        for answer in self.open_answers:
            answer.abandoned = True
        for task in self._running.values():
            task.cancel()

    def _asked(self, plan: RequestPlan) -> str:
        serving = self._cluster.serving
        if plan.coordinator in serving or not serving:
            return plan.coordinator
        return next(name for name in COORDINATORS if name in serving)

    async def _note_end(self, answer: Answer, work: Any) -> None:
        try:
            await work
        except (KvrelayError, HttpStatusError, httpx.TransportError) as error:
            answer.error = error
        except asyncio.CancelledError:
            if not (answer.cancelled or answer.abandoned):
                raise
        finally:
            answer.ended_s = time.monotonic()

    async def _stream(self, answer: Answer, client: AsyncClient | None, pause_s: float) -> None:
        plan = answer.plan
        options: GenerateOptions = {
            "request_id": plan.request_id,
            "max_tokens": plan.num_tokens,
            "n": plan.n,
            "temperature": plan.temperature,
            "ignore_eos": True,
            "timeout_s": TIMEOUT_S,
        }
        if plan.seed is not None:
            options["seed"] = plan.seed
        async with (client or self._clients[answer.coordinator]).stream(plan.prompt, **options) as chunks:
            async for chunk in chunks:
                answer.take(chunk.index, chunk.token_ids)
                await asyncio.sleep(pause_s)

    async def _over_http(self, answer: Answer) -> None:
        url, body, headers = self._http_request(answer)
        reply = await self._http.post(url, json={**body, "return_token_ids": True}, headers=headers)
        _raise_for(reply)
        for choice in reply.json()["choices"]:
            answer.tokens[choice["index"]] = choice["token_ids"]

    async def _by_events(self, answer: Answer) -> None:
        url, body, headers = self._http_request(answer)
        async with self._http.stream("POST", url, json={**body, "stream": True}, headers=headers) as reply:
            if reply.status_code != 200:
                await reply.aread()
            _raise_for(reply)
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    return
                if line:
                    event = json.loads(line.removeprefix("data: "))
                    if error := event.get("error"):
                        raise HttpStatusError(error["code"], error["message"])
                    answer.take(0, tuple(map(ord, event["choices"][0]["text"])))
        raise HttpStatusError(200, "the events ended without an end")

    def _http_request(self, answer: Answer) -> tuple[str, dict[str, Any], dict[str, str]]:
        plan = answer.plan
        body: dict[str, Any] = {"model": MODEL, "prompt": plan.prompt, "max_tokens": plan.num_tokens, "n": plan.n}
        body |= {"temperature": plan.temperature, "ignore_eos": True}
        if plan.seed is not None:
            body["seed"] = plan.seed
        address = self._cluster.links[f"{answer.coordinator}.http"].address
        return f"http://{address}/v1/completions", body, {"X-Request-Id": plan.request_id}


def _raise_for(reply: httpx.Response) -> None:
    if reply.status_code != 200:
        raise HttpStatusError(reply.status_code, reply.json()["error"]["message"])


@contextlib.asynccontextmanager
async def open_load(cluster: Cluster) -> AsyncIterator[Load]:
    """A load that has not begun. What still runs at the end is waited for."""
    async with contextlib.AsyncExitStack() as stack:
        clients = {}
        addresses = [cluster.links[f"{name}.grpc"].address for name in COORDINATORS]
        for index, name in enumerate(COORDINATORS):
            in_turn = addresses[index:] + addresses[:index]
            clients[name] = await stack.enter_async_context(AsyncClient(in_turn))
        http = await stack.enter_async_context(httpx.AsyncClient(timeout=TIMEOUT_S))
        async with asyncio.TaskGroup() as tasks:
            yield Load(cluster, clients, http, tasks)
