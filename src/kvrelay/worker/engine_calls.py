"""How do requests and aborts reach the engine in order, whoever is cancelled meanwhile?"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from kvrelay.engine.base import Engine, EngineRequest


class EngineCalls:
    """Makes the calls one after the other, in a task of their own (`run`).

    So a request that is cancelled on its way arrives first and is aborted then, however often and in whatever moment
    its task is cancelled.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._calls: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()

    async def submit(self, request: EngineRequest, refused: Callable[[], None]) -> None:
        """Until the engine has the request; raises what the engine raises.

        `refused` is called when the engine does not take it, even if nobody waits any more.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def call() -> None:
            try:
                await self._engine.submit(request)
            except Exception as error:
                refused()
                if not done.done():
                    done.set_exception(error)
            else:
                if not done.done():
                    done.set_result(None)

        self._calls.put_nowait(call)
        await done

    def abort(self, request_id: str) -> None:
        """End a request early, after everything that was called before."""
        self._calls.put_nowait(lambda: self._engine.abort([request_id]))

    async def run(self) -> None:
        """Make the calls; ends by cancellation, or by an abort that fails: the engine is dead then."""
        while True:
            call = await self._calls.get()
            await call()
