"""Calls go to one coordinator until it is lost, and then to the next."""

from __future__ import annotations

import pytest

from kvrelay.client import AsyncClient, Client
from kvrelay.client.connection import UnreachableError
from kvrelay.client.coordinators import Coordinators
from tests.support.scripted_inference import ScriptedInference, scripted_inference

NOBODY = "127.0.0.1:1"


def test_they_take_turns_when_they_are_lost() -> None:
    coordinators = Coordinators("a:1, b:2,c:3", str.upper)
    first = coordinators.choose()
    assert (first.address, first.stub, coordinators.addresses) == ("a:1", "A:1", "a:1,b:2,c:3")
    for _ in range(3):
        coordinators.lost(first)
    assert coordinators.choose().address == "b:2"
    coordinators.lost(coordinators.choose())
    coordinators.lost(coordinators.choose())
    assert coordinators.choose() is first


def test_there_must_be_one() -> None:
    with pytest.raises(ValueError, match="needs the address"):
        Coordinators([], str)


@pytest.fixture
def served() -> object:
    with scripted_inference() as service:
        service.say("one ", "two")
        yield service


def test_the_blocking_client_asks_the_next_where_nobody_answers(served: ScriptedInference) -> None:
    with Client([NOBODY, served.address]) as client:
        assert client.generate("x").text == "one two"
    with Client(f"{NOBODY},{served.address}") as client:
        assert client.models()[0].name == "tiny"


async def test_the_asyncio_client_as_well(served: ScriptedInference) -> None:
    async with AsyncClient([NOBODY, served.address]) as client:
        assert (await client.generate("x")).text == "one two"
    async with AsyncClient([NOBODY, served.address]) as client:
        assert (await client.models())[0].name == "tiny"


async def test_where_nobody_answers_at_all_that_is_told() -> None:
    async with AsyncClient([NOBODY, "127.0.0.1:2"]) as client:
        with pytest.raises(UnreachableError, match=r"no coordinator answers at 127\.0\.0\.1:2"):
            await client.generate("x")
        with pytest.raises(UnreachableError):
            await client.models()
