"""What is fuzzed? Bytes go in; what must not happen is an exception, whatever they are."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, MutableMapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn

import structlog

Check = Callable[[bytes], None]
"""Raises, `AssertionError` or whatever comes out, when an input breaks something or leaves something behind."""
AsyncCheck = Callable[[bytes], Awaitable[None]]

BETWEEN = b"|~\n"
"""Between the messages of an input that has several."""
_INPUT_S = 20.0
"""For one input; one that takes longer hangs."""


@dataclass(frozen=True, slots=True)
class Target:
    """Something that reads what others send."""

    name: str
    what: str
    """Which bytes these are."""
    open: Callable[[], AbstractContextManager[Check]]
    """One for many inputs; what must not be left at the end is checked at its end."""
    seeds: Callable[[], Iterable[bytes]]
    """Inputs to begin with."""
    words: tuple[bytes, ...] = ()
    """What mutations may put in."""


def pieces(data: bytes) -> list[bytes]:
    """The messages of an input."""
    return data.split(BETWEEN)


def joined(messages: Iterable[bytes]) -> bytes:
    """The input with these messages."""
    return BETWEEN.join(messages)


@contextlib.contextmanager
def in_loop(
    make: Callable[[], AbstractAsyncContextManager[AsyncCheck]], known: Collection[str] = ()
) -> Iterator[Check]:
    """A check in an event loop of its own, in which nothing may fail unseen between two inputs either.

    What is logged as an exception that nobody foresaw is a failure, but for the events `known`.
    """
    failures: list[BaseException] = []

    def note(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        failures.append(context.get("exception") or AssertionError(context["message"]))

    async def checked(data: bytes) -> None:
        async with asyncio.timeout(_INPUT_S):
            await check(data)
        if failures:
            raise failures[0]

    with _unforeseen(failures, known), asyncio.Runner() as runner:
        loop = runner.get_loop()
        loop.set_exception_handler(note)
        opened: asyncio.Future[AsyncCheck] = loop.create_future()
        done = asyncio.Event()
        owner = loop.create_task(_own(make, opened, done))
        check = loop.run_until_complete(opened)
        try:
            yield lambda data: loop.run_until_complete(checked(data))
        finally:
            done.set()
            loop.run_until_complete(owner)
        if failures:
            raise failures[0]


@contextlib.contextmanager
def _unforeseen(failures: list[BaseException], known: Collection[str]) -> Iterator[None]:
    """Logs go nowhere; those of exceptions become failures."""

    def note(_logger: Any, _method: str, entry: MutableMapping[str, Any]) -> NoReturn:
        if entry.get("exc_info") and entry["event"] not in known:
            given = entry["exc_info"]
            error = given if isinstance(given, BaseException) else sys.exception()
            failures.append(error or AssertionError(entry["event"]))
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[note], cache_logger_on_first_use=False)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        structlog.configure(**before)
        logging.disable(logging.NOTSET)


async def _own(
    make: Callable[[], AbstractAsyncContextManager[AsyncCheck]], opened: asyncio.Future[AsyncCheck], done: asyncio.Event
) -> None:
    """Enter and leave in one task, as task groups want it."""
    try:
        async with make() as check:
            opened.set_result(check)
            await done.wait()
    except BaseException as error:
        if opened.done():
            raise
        opened.set_exception(error)


@contextlib.contextmanager
def plain(check: Check) -> Iterator[Check]:
    """For a check that needs nothing."""
    yield check
