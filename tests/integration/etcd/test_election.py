"""Who leads, with a real etcd that comes and goes."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvrelay.etcd import EtcdClient, EtcdConfig, EtcdError, LeaseLostError, connect
from kvrelay.membership import LeadershipLostError, campaign
from tests.support.etcd_process import EtcdProcess
from tests.support.fake_cluster import until

KEY = b"/test/leader"
TTL_S = 2
EXPIRY_S = 1.0
"""Etcd looks for leases that are over twice a second."""

_LEADER = """
import asyncio, sys
from kvrelay.etcd import EtcdConfig, connect
from kvrelay.membership import campaign

async def main():
    async with connect(EtcdConfig(endpoints=[sys.argv[1]])) as client:
        async with campaign(client, b"/test/leader", "other", ttl_s=2):
            print("leading", flush=True)
            await asyncio.Event().wait()

asyncio.run(main())
"""


class Candidate:
    """Stands until it is told to leave, and notes how that went."""

    def __init__(self, client: EtcdClient, name: str, ttl_s: int = TTL_S) -> None:
        self.name = name
        self.is_leading = False
        self.has_left = False
        self.num_terms = 0
        self.lost: EtcdError | None = None
        self.leave = asyncio.Event()
        self._client = client
        self._ttl_s = ttl_s

    async def stand(self) -> None:
        try:
            async with campaign(self._client, KEY, self.name, ttl_s=self._ttl_s):
                self.is_leading = True
                self.num_terms += 1
                try:
                    await self.leave.wait()
                finally:
                    self.is_leading = False
            self.has_left = True
        except EtcdError as error:
            self.lost = error


@asynccontextmanager
async def standing(client: EtcdClient, *names: str, ttl_s: int = TTL_S) -> AsyncIterator[list[Candidate]]:
    candidates = [Candidate(client, name, ttl_s) for name in names]
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(candidate.stand()) for candidate in candidates]
        yield candidates
        for task in running:
            task.cancel()


def leaders(candidates: list[Candidate]) -> list[Candidate]:
    return [candidate for candidate in candidates if candidate.is_leading]


async def value(client: EtcdClient) -> bytes | None:
    entry = await client.get(KEY)
    return entry.value if entry else None


async def test_one_of_three_leads_and_the_next_one_follows_at_once(client: EtcdClient) -> None:
    async with standing(client, "a", "b", "c", ttl_s=30) as candidates:
        led = []
        for _ in candidates:
            await until(lambda: leaders(candidates), 5)
            (leader,) = leaders(candidates)
            assert await value(client) == leader.name.encode()
            led.append(leader)
            leader.leave.set()
            await until(lambda: leader.has_left)  # noqa: B023 - awaited here
        assert len({leader.name for leader in led}) == 3
        assert [candidate.num_terms for candidate in candidates] == [1, 1, 1]
    assert await value(client) is None


async def test_a_leader_that_is_killed_is_followed_within_its_time(client: EtcdClient, etcd: EtcdProcess) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _LEADER, etcd.endpoint, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"leading\n"
        async with standing(client, "a", "b") as candidates:
            assert await value(client) == b"other"
            process.kill()
            killed = time.monotonic()
            await until(lambda: leaders(candidates))
            assert time.monotonic() - killed < TTL_S + EXPIRY_S
            assert len(leaders(candidates)) == 1
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_without_etcd_nobody_leads_for_longer_than_the_lease_and_afterwards_one_does(
    client: EtcdClient, etcd: EtcdProcess
) -> None:
    async with standing(client, "a") as (first,):
        await until(lambda: first.is_leading)
        etcd.kill()
        killed = time.monotonic()
        await until(lambda: not first.is_leading)
        assert time.monotonic() - killed <= TTL_S + 0.2
        await until(lambda: first.lost)
        assert isinstance(first.lost, LeaseLostError)
    await etcd.start()
    async with standing(client, "b") as (second,):
        await until(lambda: second.is_leading)


async def test_a_short_absence_of_etcd_and_a_compaction_change_nothing(client: EtcdClient, etcd: EtcdProcess) -> None:
    async with standing(client, "a", "b", ttl_s=30) as candidates:
        await until(lambda: leaders(candidates))
        (leader,) = leaders(candidates)
        for number in range(3):
            await client.put(b"/test/other", b"%d" % number)
        await client.compact(await client.put(b"/test/leader/below", b"x"))
        etcd.kill()
        await etcd.start()
        assert await value(client) == leader.name.encode()
        leader.leave.set()
        await until(lambda: leaders(candidates) and not leader.is_leading)
        assert [candidate.lost for candidate in candidates] == [None, None]


@pytest.mark.parametrize("taken", [True, False], ids=["overwritten", "deleted"])
async def test_who_loses_the_key_leads_no_more(client: EtcdClient, taken: bool) -> None:
    async with standing(client, "a", ttl_s=30) as (candidate,):
        await until(lambda: candidate.is_leading)
        if taken:
            await client.put(KEY, b"somebody else")
        else:
            await client.delete(KEY)
        await until(lambda: candidate.lost)
        assert isinstance(candidate.lost, LeadershipLostError)
        assert not candidate.is_leading


async def test_what_the_body_raises_comes_out_and_the_leadership_is_given_back(client: EtcdClient) -> None:
    with pytest.raises(ValueError, match="mine"):
        async with campaign(client, KEY, "a", ttl_s=30):
            raise ValueError("mine")
    assert await value(client) is None


async def test_who_gives_up_waiting_leaves_nothing(client: EtcdClient) -> None:
    async with campaign(client, KEY, "a", ttl_s=30):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2), campaign(client, KEY, "b", ttl_s=30):
                raise AssertionError("there are two leaders")
        assert await value(client) == b"a"
    assert await value(client) is None


async def test_an_attempt_that_seemed_to_fail_but_did_not_is_a_win(etcd: EtcdProcess) -> None:
    async with connect(EtcdConfig(endpoints=[etcd.endpoint])) as client:
        lease = await client.grant_lease(30)
        first = await client.create(KEY, b"a", lease_id=lease.lease_id)
        second = await client.create(KEY, b"a", lease_id=lease.lease_id)
        assert first.found is None
        assert second.found is not None
        assert second.found.lease == lease.lease_id
        assert second.revision == first.revision
