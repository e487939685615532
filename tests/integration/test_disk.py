"""Prompts that have left the memory of a worker come back from its disk, and a disk that lies changes no token."""

from __future__ import annotations

import asyncio
import os
import random

import pytest

from kvrelay.engine.simulated_model import expected_tokens
from kvrelay.kv_transfer.disk_file import DiskFile
from tests.support.eventually import eventually
from tests.support.worker_link import Answer, over
from tests.support.worker_pair import BLOCK, CONFIG, Node, Pair, open_pair

PROMPT_TOKENS = 9 * BLOCK + 2
PROMPT_BLOCKS = 10
SMALL = {"num_slots": 64, "num_places": 1024}
"""Some six prompts; the disk has room for all that a test can think of."""


def prompt_of(seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, CONFIG.vocab_size), k=PROMPT_TOKENS)


def expected(prompt: list[int], num_tokens: int) -> list[int]:
    return expected_tokens(prompt, num_tokens, CONFIG)


async def written(node: Node) -> None:
    """Until nothing is on its way to the disk."""
    await eventually(node.is_idle)
    await asyncio.sleep(0)
    assert node.host.disk is not None
    disk = node.host.disk
    await eventually(lambda: not disk.num_writing)


async def decode(pair: Pair, name: str, seed: int) -> Answer:
    """By the decode worker alone."""
    prompt = prompt_of(seed)
    answer = await over(pair.decode(name, prompt, 4, kv_wait_ms=0))
    assert answer.token_ids == expected(prompt, 4)
    return answer


async def test_a_prefill_worker_restores_a_prompt_and_hands_it_over() -> None:
    async with open_pair(p=SMALL) as pair:
        for seed in range(15):
            await pair.generate(f"r{seed}", prompt_of(seed), 3)
            await written(pair.p)
        status = pair.p.status()
        assert status.counters["disk_blocks_read"] == 0
        assert 0 < status.store.num_disk_blocks == status.counters["disk_blocks_written"]
        saved = status.counters["blocks_saved"]
        first = await over(pair.prefill("again", prompt_of(0)))
        assert first.token_ids == expected(prompt_of(0), 1)
        # All blocks came from disk, the one that the prompt does not fill, too: nothing was saved.
        assert first.counters["prefill.tokens_restored"] == PROMPT_TOKENS - 1
        assert first.counters["prefill.blocks_loaded"] == PROMPT_BLOCKS
        rest = await over(pair.decode("again", [*prompt_of(0), *first.token_ids], 2))
        assert first.token_ids + rest.token_ids == expected(prompt_of(0), 3)
        await pair.idle()
        counters = pair.p.status().counters
        assert counters["disk_blocks_read"] == PROMPT_BLOCKS
        assert counters["blocks_saved"] == saved
        assert counters["disk_errors"] == 0


async def test_restored_blocks_travel_to_a_decode_worker_that_does_not_have_them() -> None:
    async with open_pair(p=SMALL, d={"num_slots": 32}) as pair:
        for seed in range(15):
            await pair.generate(f"r{seed}", prompt_of(seed), 3)
            await written(pair.p)
        tokens, answer = await pair.generate("again", prompt_of(0), 3)
        assert tokens == expected(prompt_of(0), 3)
        assert answer.counters["decode.tokens_stored"] == PROMPT_TOKENS
        assert answer.counters["kv.received_bytes"]
        await pair.idle()
        assert pair.p.status().counters["disk_blocks_read"] == PROMPT_BLOCKS


async def test_a_decode_worker_restores_what_nobody_sends() -> None:
    async with open_pair(d=SMALL) as pair:
        for seed in range(15):
            assert "decode.tokens_restored" not in (await decode(pair, f"r{seed}", seed)).counters
            await written(pair.d)
        answer = await decode(pair, "again", 0)
        assert answer.counters["decode.tokens_restored"] == answer.counters["decode.tokens_stored"] == 9 * BLOCK
        assert pair.d.status().counters["disk_blocks_read"] == 9


async def test_many_requests_for_one_prompt_read_it_once() -> None:
    async with open_pair(d=SMALL) as pair:
        for seed in range(15):
            await decode(pair, f"r{seed}", seed)
            await written(pair.d)
        await asyncio.gather(*(decode(pair, f"again{i}", 0) for i in range(5)))
        assert pair.d.status().counters["disk_blocks_read"] == 9


async def test_corrupt_blocks_are_computed_again() -> None:
    async with open_pair(d=SMALL) as pair:
        for seed in range(15):
            await decode(pair, f"r{seed}", seed)
            await written(pair.d)
        assert pair.d.host.disk is not None
        file = pair.d.host.disk._file
        for place in range(0, 1024, 2):
            os.pwrite(file._fd, b"rubbish", file._offset(place) + 77)
        for seed in range(15):
            await decode(pair, f"again{seed}", seed)
        counters = pair.d.status().counters
        assert counters["disk_errors"] > 0
        assert counters["disk_blocks_read"] > 0


async def test_a_disk_that_fails_costs_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    async with open_pair(d=SMALL) as pair:
        for seed in range(15):
            await decode(pair, f"r{seed}", seed)
            await written(pair.d)
        assert pair.d.status().store.disk_bytes > 0
        monkeypatch.setattr(DiskFile, "read", fail)
        for seed in range(15):
            await decode(pair, f"again{seed}", seed)
        status = pair.d.status()
        assert status.counters["disk_errors"] >= 3
        assert (status.store.disk_bytes, status.store.num_disk_blocks) == (0, 0)


async def test_requests_cancelled_while_they_wait_for_the_disk_leave_nothing() -> None:
    async with open_pair(p=SMALL, d=SMALL) as pair:
        for seed in range(15):
            await pair.generate(f"r{seed}", prompt_of(seed), 3)
            await written(pair.p)
        for turn in range(20):
            pair.prefill(f"p{turn}", prompt_of(turn % 8))
            pair.decode(f"d{turn}", prompt_of(turn % 8), 3, kv_wait_ms=0)
            await asyncio.sleep(0)
            pair.to_p.cancel(f"p{turn}")
            pair.to_d.cancel(f"d{turn}")
        await pair.idle()
        tokens, _ = await pair.generate("at last", prompt_of(3), 3)
        assert tokens == expected(prompt_of(3), 3)


async def test_a_small_disk_and_much_to_do_changes_no_token() -> None:
    async with open_pair(p={"num_slots": 40, "num_places": 30}, d={"num_slots": 40, "num_places": 30}) as pair:
        for turn in range(4):
            seeds = random.Random(turn).sample(range(12), k=8)
            answers = await asyncio.gather(*(pair.generate(f"{turn}-{seed}", prompt_of(seed), 9) for seed in seeds))
            assert [tokens for tokens, _ in answers] == [expected(prompt_of(seed), 9) for seed in seeds]
        for node in (pair.p, pair.d):
            assert node.status().store.num_disk_blocks <= 30
            assert node.status().counters["disk_errors"] == 0
