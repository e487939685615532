"""An event loop beside blocking code."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class BackgroundLoop:
    """Runs in a thread of its own until the process ends."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Wait for `work`, done in the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
