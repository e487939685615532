"""What is a replay put together from? The server's model, a plan that fits it, and the loop that sends it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from kvrelay.client.http_pool import HttpPool, Origin
from kvrelay.client.replay.endpoint import Endpoint, ServedModel, find_model
from kvrelay.client.replay.open_loop import OpenLoop
from kvrelay.client.replay.planning import Fit, Plan, plan
from kvrelay.workload.request_form import Api, PromptKind
from kvrelay.workload.trace import TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayConfig:
    """How a trace is put to a server."""

    origin: Origin
    model: str | None = None
    """None takes the first that is served."""
    api: Api = Api.COMPLETIONS
    prompt_kind: PromptKind = PromptKind.TOKENS
    ignore_eos: bool = True
    headers: Mapping[str, str] = field(default_factory=dict)
    """May hold secrets: never logged."""
    fit: Fit = field(default_factory=Fit)
    """A context that is None is what the server tells."""
    max_connections: int = 1000
    timeout_s: float | None = None
    """From when a request is sent to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Ready to run."""

    model: ServedModel
    plan: Plan
    loop: OpenLoop


@asynccontextmanager
async def open_replay(trace: Sequence[TraceRequest], config: ReplayConfig) -> AsyncIterator[Replay]:
    """Asks the server for its model. Raises `KvrelayError` and `OSError`. Connections are closed at the end."""
    async with HttpPool(config.origin) as pool:
        model = await find_model(pool, config.headers, config.model)
        fit = config.fit
        if fit.max_model_len_tokens is None:
            fit = replace(fit, max_model_len_tokens=model.max_model_len_tokens)
        endpoint = Endpoint(
            origin=config.origin,
            model=model.name,
            api=config.api,
            prompt_kind=config.prompt_kind,
            ignore_eos=config.ignore_eos,
            headers=config.headers,
        )
        loop = OpenLoop(endpoint, pool, max_connections=config.max_connections, timeout_s=config.timeout_s)
        yield Replay(model=model, plan=plan(trace, fit), loop=loop)
