"""What does a person see while a cluster starts and runs?"""

from __future__ import annotations

import re
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

_ERROR = re.compile(r"\b[A-Z]\w*(Error|Exception): .+")
_TAIL_LINES = 20


@dataclass(slots=True)
class _Row:
    state: str
    since: float
    done: bool = False


class Display:
    """A table of processes that moves while they start, then one line per event.

    Where the output is no terminal, a line per change instead.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: dict[str, _Row] = {}
        self._began = time.monotonic()
        self._table_shown = False
        self._spinner = Spinner("dots")

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Show the table inside this context."""
        if not self._console.is_terminal:
            yield
            return
        self._table_shown = True
        try:
            with Live(self, console=self._console, refresh_per_second=8, transient=True):
                yield
        finally:
            self._table_shown = False

    def state(self, name: str, state: str, *, done: bool = False) -> None:
        """A process has come to another state; `done` when there is nothing more to wait for."""
        row = self._rows.get(name)
        if row is not None and row.state == state:
            return
        began = row.since if row is not None and not row.done else time.monotonic()
        self._rows[name] = _Row(state, began, done)
        if done:
            state = f"{state} after {time.monotonic() - began:.0f} s"
            self._rows[name].state = state
        if not self._table_shown:
            self.say(f"{name}: {state}")

    def say(self, line: str) -> None:
        """One line, as it is: never wrapped, so that it can be copied. Nobody has to read it."""
        with suppress(OSError):
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __rich__(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        now = time.monotonic()
        for name, row in self._rows.items():
            mark: RenderableType = "[green]✓[/]" if row.done else self._spinner
            table.add_row(mark, name, row.state, "" if row.done else f"{now - row.since:.0f} s")
        return Group(table, f"[dim]{now - self._began:.0f} s, Ctrl-C stops[/]")


def how_ended(status: int) -> str:
    """An exit status in words."""
    if status > 128:
        try:
            return f"was ended by {signal.Signals(status - 128).name}"
        except ValueError:
            pass
    return f"ended with exit code {status}"


def log_tail(path: Path) -> str:
    """The last lines of a log file, and before them the first error in it: what ends a process is often its echo."""
    try:
        with path.open(errors="replace") as log:
            error = next((match.group() for line in log if (match := _ERROR.search(line))), "")
            log.seek(0)
            tail = "".join(deque(log, _TAIL_LINES)).rstrip()
    except OSError:
        return ""
    return tail if not error or error in tail else f"{error}\n[...]\n{tail}"
