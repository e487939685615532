"""A worker gets from another one's store what it lacks of a prompt's prefix; whatever fails costs time only."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest

from kvrelay.block_hash import layout_fingerprint
from kvrelay.engine.simulated_model import expected_tokens
from kvrelay.kv_transfer import borrowing, lending, sender
from kvrelay.kv_transfer.borrowing import PrefixSource
from kvrelay.kv_transfer.frame_order import LocalOrder
from kvrelay.kv_transfer.peer import Peer
from kvrelay.v1 import common_pb2
from tests.support.eventually import eventually
from tests.support.worker_link import open_link, over
from tests.support.worker_pair import BLOCK, CONFIG, Pair, open_node, open_pair


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, CONFIG.vocab_size), k=num_tokens)


async def first_turn(pair: Pair) -> list[int]:
    """A prompt and its answer; D has generated, so its store holds more than P's."""
    prompt = prompt_of(8 * BLOCK)
    tokens, _ = await pair.generate("turn-1", prompt, 4 * BLOCK)
    return [*prompt, *tokens]


async def test_the_next_turn_hits_on_both_roles_without_any_fetch() -> None:
    async with open_pair() as pair:
        turn = [*await first_turn(pair), *prompt_of(2 * BLOCK, seed=1)]
        first = await over(pair.prefill("turn-2", turn))
        answer = await over(pair.decode("turn-2", [*turn, *first.token_ids], 5))
        assert first.token_ids + answer.token_ids == expected_tokens(turn, 6, CONFIG, None)
        assert first.counters["prefill.blocks_loaded"] == 8, "of the first prompt"
        assert answer.counters["decode.tokens_stored"] == len(turn)
        # D holds the first answer's blocks already, so they do not travel.
        assert answer.counters["kv.received_bytes"] == 3 * CONFIG.block_bytes


async def test_prefill_fetches_the_answer_that_the_decode_worker_has() -> None:
    async with open_pair() as pair:
        turn = [*await first_turn(pair), *prompt_of(2 * BLOCK, seed=1)]
        first = await over(pair.prefill("turn-2", turn, prefix_address=pair.d.address))
        answer = await over(pair.decode("turn-2", [*turn, *first.token_ids], 5))
        assert first.token_ids + answer.token_ids == expected_tokens(turn, 6, CONFIG, None)
        assert first.counters["prefill.blocks_loaded"] == 11
        assert pair.p.status().counters["blocks_fetched"] == 3
        assert pair.d.status().counters["blocks_lent"] == 3


async def test_decode_fetches_when_it_has_no_prefill_worker() -> None:
    async with open_pair() as pair:
        prompt = prompt_of(8 * BLOCK)
        await over(pair.prefill("r", prompt))
        await eventually(lambda: pair.d.status().num_incoming_transfers)
        pair.d.host.receiver.let_go("r")
        async with open_node("other") as other, open_link(other.address) as link:
            pair.to_d, to_d = link, pair.to_d
            answer = await over(pair.decode("again", prompt, 5, kv_wait_ms=0, prefix_address=pair.p.address))
            pair.to_d = to_d
            assert answer.token_ids == expected_tokens(prompt, 5, CONFIG, None)
            assert other.status().counters["blocks_fetched"] == 8


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:1"])
async def test_a_source_that_is_not_there_costs_nothing_but_time(address: str) -> None:
    async with open_pair() as pair:
        prompt = prompt_of(3 * BLOCK)
        first = await over(pair.prefill("r", prompt, prefix_address=address))
        assert first.token_ids == expected_tokens(prompt, 1, CONFIG, None)
        await over(pair.decode("r", [*prompt, *first.token_ids], 2))


async def test_a_source_with_another_layout_lends_nothing() -> None:
    other = replace(CONFIG, num_layers=4)
    async with open_pair() as pair, open_node("other", config=other) as source:
        assert layout_fingerprint(source.host.info.layout) != layout_fingerprint(pair.p.host.info.layout)
        prompt = prompt_of(3 * BLOCK)
        first = await over(pair.prefill("r", prompt, prefix_address=source.address))
        assert first.token_ids == expected_tokens(prompt, 1, CONFIG, None)
        await over(pair.decode("r", [*prompt, *first.token_ids], 2))


async def test_a_source_lends_to_so_many_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "MAX_LOANS", 0)
    async with open_pair() as pair:
        turn = await first_turn(pair)
        first = await over(pair.prefill("turn-2", turn, prefix_address=pair.d.address))
        await over(pair.decode("turn-2", [*turn, *first.token_ids], 2))
        assert pair.d.status().counters["blocks_lent"] == 0


async def borrow(pair: Pair, tokens: Sequence[int]) -> None:
    source = PrefixSource(request_id="r", address=pair.d.address, trace=common_pb2.TraceContext())
    _, stored = await pair.p.host.look_up("", tokens, source)
    pair.p.host.store.unpin(stored.load)


async def test_who_stops_waiting_leaves_nothing_behind() -> None:
    async with open_pair() as pair:
        turn = await first_turn(pair)
        pair.p.kv.frames.shut()
        waiting = asyncio.create_task(borrow(pair, turn))
        await eventually(lambda: pair.p.kv.frames.num_arrived)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert pair.p.status().store.num_reserved == 0
        pair.p.kv.frames.open()


class Source:
    """Holds back what a worker sends, from the run with the number `num_free` on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_free: int) -> None:
        self.num_runs = 0
        self.go_on = threading.Event()
        encode = LocalOrder.encode

        def held(order: LocalOrder, *, ack_now: bool) -> bytes | None:
            self.num_runs += 1
            if self.num_runs > num_free:
                self.go_on.wait()
            return encode(order, ack_now=ack_now)

        monkeypatch.setattr(LocalOrder, "encode", held)
        monkeypatch.setattr(sender, "_LOCAL_RUN_BYTES", 1)  # A run for each block.
        monkeypatch.setattr(borrowing, "_WAIT_S", 60.0)


async def test_a_source_that_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_pair() as pair:
        turn = await first_turn(pair)
        source = Source(monkeypatch, num_free=0)
        try:
            waiting = asyncio.create_task(borrow(pair, turn))
            await eventually(lambda: source.num_runs and pair.p.status().store.num_reserved, "a block would be sent")
            pair.d.host.lender.close()
            async with asyncio.timeout(5):
                await waiting
            assert pair.p.status().store.num_reserved == 0
        finally:
            source.go_on.set()


async def test_a_source_that_dies_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its streams break, and it says nothing any more."""
    async with open_pair() as pair:
        turn = await first_turn(pair)
        source = Source(monkeypatch, num_free=1)
        try:
            waiting = asyncio.create_task(borrow(pair, turn))
            await eventually(lambda: pair.p.kv.frames.num_arrived and source.num_runs > 1, "one block has come")

            async def unsaid(_peer: Peer, _transfer_id: int) -> int:
                return 0

            monkeypatch.setattr(Peer, "commit", unsaid)
            await pair.d.host.peers.close()
            async with asyncio.timeout(5):
                await waiting
            assert pair.p.status().store.num_reserved == 0
        finally:
            source.go_on.set()
