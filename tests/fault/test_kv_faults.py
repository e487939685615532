"""Whatever happens to KV blocks between two workers, every token is right and nothing is left behind.

The engines are simulated: they compare each KV block that they load with what its tokens would have computed, and die
where a byte differs.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.kv_transfer import sender
from kvrelay.kv_transfer.compression import Compression
from tests.support.fault_proxy import Cut, Reset, Stall, TcpFault, frame_proxy, tcp_proxy
from tests.support.faulty_pair import faulty_pair
from tests.support.frame_faults import Chain, Delay, Disorder, Flip, FrameFault, Loss, Truncate

NUM_HAND_OFFS = 500
NUM_AT_ONCE = 32
MB = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fault, and what must be seen of it."""

    fault: Callable[[random.Random], FrameFault | TcpFault]
    counter: str = ""
    """Of the prefill worker, that tells it; empty when nothing need be sent again and nothing fails."""
    least_whole: float
    """Share of the hand-offs that must be whole nevertheless: far less than was seen, and more than by chance."""


CASES: Mapping[str, Case] = {
    "delay": Case(fault=Delay, least_whole=0.8),
    "loss": Case(fault=partial(Loss, rate=0.01), counter="frames_resent", least_whole=0.8),
    "flip": Case(fault=partial(Flip, rate=0.02), counter="frames_resent", least_whole=0.5),
    "truncation": Case(fault=partial(Truncate, rate=0.02), counter="pushes_failed", least_whole=0.1),
    "disorder": Case(fault=partial(Disorder, rate=0.2), least_whole=0.8),
    "stall": Case(
        fault=partial(Stall, bytes_between=(5 * MB, 50 * MB), most_s=2.5), counter="frames_resent", least_whole=0.2
    ),
    "reset": Case(fault=partial(Reset, bytes_between=(MB, 40 * MB)), counter="pushes_failed", least_whole=0.5),
    "cut": Case(fault=partial(Cut, bytes_between=(MB, 40 * MB)), counter="pushes_failed", least_whole=0.5),
}


@pytest.fixture(autouse=True, scope="module")
def impatient() -> Any:
    """What takes seconds between machines takes parts of them here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sender, "_RESEND_S", 0.5)
        patch.setattr(sender, "_GIVE_UP_S", 2.0)
        yield


@pytest.mark.parametrize("name", CASES)
async def test_no_fault_changes_a_token(name: str) -> None:
    case = CASES[name]
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = random.Random(seed)
    fault = case.fault(random.Random(rng.random()))
    async with faulty_pair(partial(proxy_of, fault)) as pair:
        sums = await pair.run(NUM_HAND_OFFS, rng, num_at_once=NUM_AT_ONCE)
        counters = dict(pair.p.status().counters)
    print(name, fault.num_injected, sums, counters, "fetched", pair.d.host.counters["blocks_fetched"])
    assert fault.num_injected > 0
    assert sums.num_right == NUM_HAND_OFFS
    assert sums.num_whole >= case.least_whole * NUM_HAND_OFFS
    assert not case.counter or counters[case.counter] > 0


RATES = st.sampled_from([0.0, 0.005, 0.05])


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rates=st.tuples(RATES, RATES, RATES, RATES, RATES),
    bytes_between=st.sampled_from([(MB // 10, 4 * MB), (MB, 40 * MB)]),
    kv_wait_ms=st.sampled_from([1, 100, 5_000]),
    compression=st.sampled_from([Compression.NONE, Compression.LOSSLESS]),
)
def test_no_mixture_of_faults_changes_a_token(
    seed: int, rates: tuple[float, ...], bytes_between: tuple[int, int], kv_wait_ms: int, compression: Compression
) -> None:
    """Also with a decode worker that waits too short a time, so that frames come while it computes."""
    rng = random.Random(seed)
    kinds = (Delay, Loss, Flip, Truncate, Disorder)
    chain = Chain([kind(random.Random(rng.random()), rate) for kind, rate in zip(kinds, rates, strict=True)])
    reset = Reset(random.Random(rng.random()), bytes_between)

    @asynccontextmanager
    async def both(address: str) -> AsyncIterator[str]:
        async with tcp_proxy(address, reset) as behind, frame_proxy(behind, chain) as front:
            yield front

    async def run() -> None:
        async with faulty_pair(both, kv_wait_ms=kv_wait_ms, compression=compression) as pair:
            assert (await pair.run(60, rng, num_at_once=NUM_AT_ONCE)).num_right == 60

    asyncio.run(run())


def proxy_of(fault: FrameFault | TcpFault, address: str) -> AbstractAsyncContextManager[str]:
    """The proxy that does it."""
    return frame_proxy(address, fault) if isinstance(fault, FrameFault) else tcp_proxy(address, fault)
