"""Which processes belong to a run, whoever their parents are by now?"""

from __future__ import annotations

import asyncio
from pathlib import Path

from kvrelay import keeper

VARIABLE = "KVRELAY_CHILD"
"""Holds `<run>/<child>` in the environment of a child and of all that descend from it.

A child that supervises children itself takes its own mark for their run.
"""

_POLL_S = 0.02


def mark(run_id: str, child: str = "") -> str:
    """The variable's value for a child; without one, what the values of all children begin with."""
    return f"{run_id}/{child}"


def marked(value: str, *, whole: bool) -> list[int]:
    """Live processes of this user whose mark is `value` or lies below it; without `whole`, begins with it."""
    wanted = f"{VARIABLE}={value}".encode()
    return [
        int(process.name)
        for process in Path("/proc").iterdir()
        if process.name.isdecimal() and _has(process, wanted, whole=whole)
    ]


async def end_marked(value: str, *, whole: bool) -> int:
    """SIGKILL such processes and wait until they are gone; returns how many there were.

    Shared memory that only they had is removed.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + keeper.KILL_TIMEOUT_S
    last_words = keeper.LastWords()
    found: set[int] = set()
    files: set[Path] = set()
    while (pids := marked(value, whole=whole)) and loop.time() < deadline_s:
        found.update(pids)
        files |= keeper.shared_memory(pids)
        keeper.kill(last_words.over(pids))
        await asyncio.sleep(_POLL_S)
    keeper.remove_unused(files)
    return len(found)


def _has(process: Path, wanted: bytes, *, whole: bool) -> bool:
    try:
        variables = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(variable.startswith(wanted) and (not whole or _ends(variable, wanted)) for variable in variables)


def _ends(variable: bytes, wanted: bytes) -> bool:
    """Whether a level of marks is over behind `wanted`."""
    return variable[len(wanted) :][:1] in (b"", b"/")
