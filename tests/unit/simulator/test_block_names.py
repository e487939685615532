"""Blocks have names in common exactly where prompts have everything before in common; what an oracle makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvrelay.simulator.block_names import BlockNamer
from kvrelay.simulator.oracle import cachable_tokens
from tests.support.simulation import request


def test_blocks_of_the_trace_are_divided() -> None:
    namer = BlockNamer(5)
    first, second = namer.prompt(request(0, 0.0, 28, 1, 7, 8, 9)), namer.prompt(request(1, 0.0, 20, 1, 7, 5))
    assert (len(first), len(second)) == (6, 4)
    assert first[:2] == second[:2]
    assert not set(first[2:]) & set(second[2:])
    assert len(set(first)) == 6


def test_a_trace_without_blocks_shares_nothing() -> None:
    namer = BlockNamer(10)
    first, second = namer.prompt(request(0, 0.0, 25, 1)), namer.prompt(request(1, 0.0, 25, 1))
    assert len(first) == len(second) == 3
    assert not set(first) & set(second)


def test_answers_are_blocks_of_their_own() -> None:
    namer = BlockNamer(10)
    assert len(namer.answer(request(0, 0.0, 25, 4, 1, 2, 3))) == 0
    # The one that the prompt began, and one more.
    answer = namer.answer(request(0, 0.0, 25, 16, 1, 2, 3))
    assert len(answer) == 2
    assert not set(answer) & set(namer.prompt(request(0, 0.0, 25, 16, 1, 2, 3)))


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of the trace have 10 tokens, which is no multiple of 4"):
        BlockNamer(4).prompt(request(0, 0.0, 25, 1, 1, 2, 3))


def test_an_oracle_finds_what_any_request_before_had() -> None:
    load = [
        request(0, 0.0, 25, 1, 1, 2, 3),
        request(1, 1.0, 40, 1, 1, 2, 3, 4),
        request(2, 2.0, 20, 1, 9, 2),
        request(3, 3.0, 20, 1, 1, 2),
    ]
    assert cachable_tokens(load, 10) == {0: 0, 1: 30, 2: 0, 3: 19}
    assert cachable_tokens([replace(each, block_ids=()) for each in load], 10) == dict.fromkeys(range(4), 0)
