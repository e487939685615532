"""When was a task cancelled although nothing says so?"""

from __future__ import annotations

import asyncio


def raise_if_cancelled() -> None:
    """Before Python 3.13 a TaskGroup that ends by an error forgets a cancellation that comes while it ends.

    Call it where the error was caught and the task would go on.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
