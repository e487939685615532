"""How do threads tell the event loop what they have done?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

Post = Callable[..., None]
"""`post(callback, *args)`: call back in the event loop; from any thread."""


def post_to_running_loop() -> Post:
    """For the loop that runs now. Once it is closed nothing is called any more: nobody is left to be told."""
    loop = asyncio.get_running_loop()

    def post(callback: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(callback, *args)

    return post
