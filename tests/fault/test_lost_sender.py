"""A sender leaves between its offer and its first frame: the receiver has its slots back, and waits for nothing."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.support.eventually import eventually
from tests.support.kv_child import kv_child
from tests.support.kv_pair import kv_server, side

pytestmark = pytest.mark.timeout(60)

NUM_OFFERS = 10
NUM_BLOCKS = 5
FREED_S = 1.0
STALLED_S = 15.0
"""gRPC asks a connection on which nothing comes whether it lives: after 5 s, and waits for 10 s."""


@pytest.mark.parametrize("signal_name", ["kill", "stop"])
async def test_slots_of_a_sender_that_is_gone_are_free_again(signal_name: str) -> None:
    with side() as receiver:
        async with kv_server(receiver.receiver) as server, kv_child("sender", NUM_OFFERS * NUM_BLOCKS) as sender:
            await sender.ask("offer", address=server.address, first=0, num_blocks=NUM_BLOCKS, repeat=NUM_OFFERS)
            assert receiver.store.usage().num_reserved == NUM_OFFERS * NUM_BLOCKS
            waiting = asyncio.create_task(receiver.receiver.wait_settled("r1", 60))
            began_s = time.monotonic()
            if signal_name == "kill":
                await sender.kill()
                limit_s = FREED_S
            else:
                sender.stop()
                limit_s = STALLED_S + FREED_S
            await eventually(lambda: not receiver.store.usage().num_reserved, "slots are free", timeout_s=limit_s)
            print(f"free after {time.monotonic() - began_s:.2f} s")
            transfer = await waiting
            assert transfer is not None
            assert transfer.received_blocks == 0
            assert receiver.receiver.num_transfers == 1, "one is still of somebody who has waited"
            receiver.receiver.let_go("r1")
            receiver.assert_idle()
            if signal_name == "stop":
                sender.go_on()
                await sender.ask("feed", address=server.address, first=0, num_blocks=NUM_BLOCKS, repeat=0)
                results = await sender.ask("results")
                assert {num_blocks for num_blocks, _ in results} == {0}
                assert all(error for _, error in results), results
