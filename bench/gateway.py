"""What does vLLM's OpenAI front end cost per request and per streamed token?

Every arm answers the same request over an engine without latency, called as an ASGI application without a socket.
`vllm` is the gateway as it is; `plain` streams the same chunks, encoded by msgspec, through Starlette's
StreamingResponse; `plain+render` also renders the prompt (chat template, tokenizer) as every front end has to.
Measured is the CPU time of the process, all threads. The cost per chunk is the slope between a short and a long answer.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import uvloop
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.renderers.params import ChatParams
from vllm.sampling_params import RequestOutputKind, SamplingParams

from bench.report import Report, parser, spread
from bench.scripted_engine import ScriptedEngine
from kvrelay.coordinator.front_end import FrontEnd, FrontEndConfig, build_front_end
from kvrelay.coordinator.http_app import build_app
from kvrelay.coordinator.http_routes import Probes
from kvrelay.models import default_cache_dir, resolve_model

MODEL = "model"
SHORT_TOKENS = 16
LONG_TOKENS = 272
PROMPT = "Why is the sky blue? Explain it to a child, please. " * 8
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
    "completion": ("/v1/completions", {"prompt": PROMPT}),
}


class Delta(msgspec.Struct):
    content: str


class Choice(msgspec.Struct):
    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: None = None


class Chunk(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[Choice]
    object: str = "chat.completion.chunk"


Render = Callable[[dict[str, Any]], Awaitable[Any]]


def plain_app(engine: ScriptedEngine, render: Render) -> ASGIApp:
    """A front end that does nothing but stream: no validation, no parsers, no usage."""
    encoder = msgspec.json.Encoder()

    async def events(body: dict[str, Any]) -> AsyncIterator[bytes]:
        params = SamplingParams(max_tokens=body["max_tokens"], output_kind=RequestOutputKind.DELTA)
        async for output in engine.generate(await render(body), params, "plain"):
            part = output.outputs[0]
            choice = Choice(0, Delta(part.text), part.finish_reason)
            yield b"data: " + encoder.encode(Chunk("chatcmpl-plain", 1, MODEL, [choice])) + b"\n\n"
        yield b"data: [DONE]\n\n"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = msgspec.json.decode(await Request(scope, receive).body())
        await StreamingResponse(events(body), media_type="text/event-stream")(scope, receive, send)

    return app


async def no_render(_: dict[str, Any]) -> Any:
    return {"prompt_token_ids": [1]}


def renderer_of(front_end: FrontEnd) -> Render:
    async def render(body: dict[str, Any]) -> Any:
        renderer = front_end.renderer
        if "messages" not in body:
            (rendered,) = await renderer.render_cmpl_async([{"prompt": body["prompt"]}])
            return rendered
        params = ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tools": None, "tokenize": False})
        _, (rendered,) = await renderer.render_chat_async([body["messages"]], params)
        return rendered

    return render


async def call(app: ASGIApp, path: str, body: bytes) -> int:
    """One request from a client that stays; returns the number of messages sent to it."""
    received = iter([{"type": "http.request", "body": body, "more_body": False}])
    num_sent = 0

    async def receive() -> Any:
        for message in received:
            return message
        return await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        nonlocal num_sent
        if message.get("status", 200) != 200:
            raise RuntimeError(f"{path} answered {message['status']}")
        num_sent += 1

    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    await app(scope, receive, send)
    return num_sent


async def cpu_ms_per_request(app: ASGIApp, path: str, body: dict[str, Any], num_requests: int) -> float:
    encoded = json.dumps(body).encode()
    started = time.process_time()
    for _ in range(num_requests):
        await call(app, path, encoded)
    return (time.process_time() - started) * 1e3 / num_requests


async def measure(front_end: FrontEnd, num_rounds: int, num_requests: int) -> list[dict[str, Any]]:
    engine = ScriptedEngine(front_end)
    arms = {
        "plain": plain_app(engine, no_render),
        "plain+render": plain_app(engine, renderer_of(front_end)),
        "vllm": build_app(engine, served_model_name=MODEL, probes=Probes(ready=lambda: True)),
    }
    lengths = (SHORT_TOKENS, LONG_TOKENS)
    cases = [(route, arm, length) for route in BODIES for length in lengths for arm in arms]
    times: dict[tuple[str, str, int], list[float]] = {case: [] for case in cases}
    for number in range(num_rounds + 1):
        for route, arm, length in cases:
            path, content = BODIES[route]
            body = {"model": MODEL, **content, "stream": True, "max_tokens": length}
            gc.collect()
            cost = await cpu_ms_per_request(arms[arm], path, body, num_requests if length == SHORT_TOKENS else 4)
            if number > 0:  # The first round warms up.
                times[route, arm, length].append(cost)
    return [_row(route, arm, times) for route in BODIES for arm in arms]


def _row(route: str, arm: str, times: dict[tuple[str, str, int], list[float]]) -> dict[str, Any]:
    short, long = times[route, arm, SHORT_TOKENS], times[route, arm, LONG_TOKENS]
    slopes = [(b - a) * 1e3 / (LONG_TOKENS - SHORT_TOKENS) for a, b in zip(short, long, strict=True)]
    return {
        "route": route,
        "arm": arm,
        f"cpu_ms_at_{SHORT_TOKENS}_tokens": spread(short),
        "cpu_us_per_chunk": spread(slopes),
        "max_chunks_per_s_per_core": round(1e6 / spread(slopes).median),
    }


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--rounds", type=int, default=9, help="rounds, in which the arms take turns")
    options.add_argument("--requests", type=int, default=32, help="requests with a short answer per round and arm")
    options.add_argument("--model", default="", help="folder or hub id; the default model when not given")
    given = options.parse_args()
    logging.disable(logging.INFO)
    model = resolve_model(given.model, default_cache_dir(dict(os.environ)))
    front_end = build_front_end(FrontEndConfig(model=model.path, served_model_name=MODEL))
    gc.freeze()
    config = {
        "model": model.served_name,
        "rounds": given.rounds,
        "requests": given.requests,
        "prompt_tokens": len(front_end.renderer.get_tokenizer().encode(PROMPT)),
        "long_tokens": LONG_TOKENS,
    }
    report = Report("gateway", config)
    try:
        report.rows = uvloop.run(measure(front_end, given.rounds, given.requests))
    finally:
        front_end.close()
    report.notes.append("CPU time of all threads; median (quartiles) of the rounds. No socket, no engine.")
    report.finish(given.json)


if __name__ == "__main__":
    main()
