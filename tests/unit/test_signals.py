"""The first signal asks once the process is ready; every other one ends it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from typing import NoReturn

import pytest

from kvrelay.signals import ASKING, StopSignals


class EndedError(Exception):
    """In place of the process."""


def end(exit_code: int) -> NoReturn:
    raise EndedError(exit_code)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The test run keeps its own."""
    before = {number: signal.getsignal(number) for number in ASKING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ASKING)
async def test_while_it_starts_the_first_one_ends_it_in_good_order(number: signal.Signals) -> None:
    StopSignals(end)
    with pytest.raises(EndedError, match=r"^0$"):
        signal.raise_signal(number)


@pytest.mark.parametrize("number", ASKING)
async def test_once_it_is_ready_the_first_one_asks_and_the_second_one_ends_it(number: signal.Signals) -> None:
    asked = StopSignals(end).ready()
    signal.raise_signal(number)
    async with asyncio.timeout(10):
        await asked.wait()
    with pytest.raises(EndedError, match=rf"^{128 + number}$"):
        signal.raise_signal(number)
