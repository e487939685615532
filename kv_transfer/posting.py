"""How do threads tell the event loop what they have done?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

Post = Callable[..., None]
"""`post(callback, *args)`: call back in the event loop; from any thread."""


def post_to_running_loop(on_error: Callable[[Exception], object]) -> Post:
    """For the loop that runs now. Once it is closed nothing is called any more: nobody is left to be told.

    What a callback raises goes to `on_error`.
    """
    loop = asyncio.get_running_loop()

    def run(callback: Callable[..., object], *args: object) -> None:
        try:
            callback(*args)
        except Exception as error:
            on_error(error)

    def post(callback: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(run, callback, *args)

    return post


def raise_in_loop(error: Exception) -> None:
    """An `on_error` that leaves it to the loop's exception handler."""
    raise error
