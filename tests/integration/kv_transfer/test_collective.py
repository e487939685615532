"""Blocks go through process groups of two workers, and by gRPC as soon as such a group does not do what it should."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterable

import pytest

from kvrelay.kv_transfer import collect_receiver
from kvrelay.kv_transfer.block_part import BlockPart
from kvrelay.kv_transfer.collective_group import Group, GroupError, Staging, Transit
from kvrelay.kv_transfer.collectives import Collectives
from kvrelay.v1.kv_transfer_pb2 import CollectiveGroup, CollectiveInvitation
from tests.support.collective_pair import (
    BACKENDS,
    FaultyCollectives,
    Receiving,
    Wrapped,
    group_threads,
    receiving,
    sending,
)
from tests.support.eventually import eventually
from tests.support.kv_pair import LAYERS, SLOT_BYTES, push_of

MANY = list(range(40))

pytestmark = pytest.mark.skipif(not BACKENDS, reason="torch has no gloo here")


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    yield
    with contextlib.suppress(AssertionError):
        await eventually(lambda: not group_threads())
    assert not group_threads(), "threads of groups are left"


async def test_blocks_go_through_the_group_once_it_is_there() -> None:
    async with receiving() as to, sending() as worker:
        await worker.meet(to)
        result = await worker.send(to, "r", MANY)
        assert (result.transport, result.num_bytes) == ("gloo", 40 * SLOT_BYTES)
        assert worker.counters == {"bytes_pushed_grpc": SLOT_BYTES, "bytes_pushed_gloo": 40 * SLOT_BYTES}


async def test_layers_come_group_by_group_and_from_scattered_slots() -> None:
    async with receiving() as to, sending() as worker:
        peer = await worker.meet(to)
        push = push_of(worker.side, peer, "r", [7, 8, 9])
        for first_layer in range(0, LAYERS, 2):
            for index, slot in reversed(list(enumerate(worker.side.put([7, 8, 9])))):
                push.add(BlockPart(index, slot, first_layer, 2))
        push.finish()
        assert (await push.run()).transport == "gloo"
        assert all(to.side.holds(number) for number in (7, 8, 9))
        to.side.receiver.let_go("r")


async def test_blocks_leave_while_others_are_still_computed() -> None:
    async with receiving() as to, sending() as worker:
        peer = await worker.meet(to)
        push = push_of(worker.side, peer, "r", [1, 2])
        running = asyncio.create_task(push.run())
        for index, number in enumerate((1, 2)):
            [slot] = worker.side.put([number])
            push.add(BlockPart(index, slot, 0, LAYERS))
            await eventually(lambda number=number: to.side.holds(number))
        push.finish()
        assert (await running).num_blocks == 2
        to.side.receiver.let_go("r")


async def test_a_cancelled_transfer_leaves_the_group_usable() -> None:
    async with receiving() as to, sending() as worker:
        peer = await worker.meet(to)
        push = worker.push(peer, "r", MANY)
        running = asyncio.create_task(push.run())
        await eventually(lambda: to.side.receiver.num_transfers)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        to.side.receiver.cancel("r")
        assert (await worker.send(to, "s", MANY)).transport == "gloo"
        assert worker.counters["collective_fallbacks"] == 0


async def test_many_transfers_to_several_peers_at_once() -> None:
    async with contextlib.AsyncExitStack() as stack:
        all_to = [await stack.enter_async_context(receiving()) for _ in range(3)]
        worker = await stack.enter_async_context(sending())
        for to in all_to:
            await worker.meet(to)

        async def send(to: Receiving, first: int) -> str:
            return (await worker.send(to, f"r{first}", range(first, first + 12))).transport

        async with asyncio.TaskGroup() as tasks:
            sent = [tasks.create_task(send(to, first)) for to in all_to for first in (0, 12, 24)]
        assert {task.result() for task in sent} == {"gloo"}


class Flipping(Wrapped):
    """Turns a bit in the first run that is sent."""

    has_flipped = False

    def send(self, staging: Staging, num_bytes: int) -> Transit:
        if not self.has_flipped:
            self.has_flipped = True
            staging.host[num_bytes // 2] ^= 1
        return super().send(staging, num_bytes)


async def test_a_flipped_bit_is_noticed_and_the_run_sent_again() -> None:
    async with receiving() as to, sending(FaultyCollectives(Flipping)) as worker:
        await worker.meet(to)
        result = await worker.send(to, "r", MANY)
        assert (result.transport, result.num_resent_frames) == ("gloo", 1)


class Stalling(Wrapped):
    """Does not take the third run before `gate` is set."""

    def __init__(self, group: Group, gate: threading.Event) -> None:
        super().__init__(group)
        self._gate = gate
        self._num_runs = 0

    def recv(self, staging: Staging, num_bytes: int) -> Transit:
        self._num_runs += 1
        if self._num_runs >= 3:
            self._gate.wait()
        return super().recv(staging, num_bytes)


@pytest.fixture
def gate() -> Iterable[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


async def test_a_receiver_that_stalls_beyond_the_deadline_gets_the_rest_by_grpc(gate: threading.Event) -> None:
    stalling = FaultyCollectives(lambda group: Stalling(group, gate))
    async with receiving(stalling) as to, sending(FaultyCollectives(deadline_s=0.3)) as worker:
        await worker.meet(to)
        result = await worker.send(to, "r", MANY)
        assert result.transport == "gloo+grpc"
        assert worker.counters["collective_fallbacks"] == 1
        assert (await worker.send(to, "s", [100])).transport == "grpc", "no other group for a while"
        gate.set()


class Breaking(Wrapped):
    """Loses the third run on its way."""

    num_runs = 0

    def recv(self, staging: Staging, num_bytes: int) -> Transit:
        self.num_runs += 1
        transit = super().recv(staging, num_bytes)
        return self._fail if self.num_runs == 3 else transit

    @staticmethod
    def _fail() -> None:
        raise GroupError("lost")


async def test_what_the_receiver_lost_comes_by_grpc_at_once() -> None:
    async with receiving(FaultyCollectives(Breaking)) as to, sending() as worker:
        await worker.meet(to)
        began = time.monotonic()
        result = await worker.send(to, "r", MANY)
        assert (result.transport, worker.counters["collective_fallbacks"]) == ("gloo+grpc", 1)
        assert time.monotonic() - began < 3, "nobody waited for a deadline"


async def test_a_new_group_is_built_after_the_back_off() -> None:
    groups: list[Group] = []

    def wrap(group: Group) -> Group:
        groups.append(group)
        return Breaking(group) if len(groups) == 1 else group

    async with receiving(FaultyCollectives(wrap)) as to, sending(FaultyCollectives(backoff_s=0)) as worker:
        await worker.meet(to)
        await worker.send(to, "r", MANY)
        await worker.meet(to)
        assert (await worker.send(to, "s", range(100, 110))).transport == "gloo"
        assert len(groups) == 2


async def test_a_group_without_work_is_closed_and_built_again_when_there_is_some() -> None:
    async with receiving() as to, sending(FaultyCollectives(idle_s=0.1)) as worker:
        await worker.meet(to)
        await eventually(lambda: not worker.peer(to).collecting.is_ready, "it was closed")
        await worker.meet(to)
        assert (await worker.send(to, "r", [1])).transport == "gloo"
        assert worker.counters["collective_fallbacks"] == 0


class Misleading(FaultyCollectives):
    """Invites to other places than its own."""

    def __init__(self, **values: object) -> None:
        super().__init__()
        self.values = values

    async def invite(self, offered: Iterable[int]) -> CollectiveInvitation | None:
        invitation = await super().invite(offered)
        if invitation is not None:
            invitation.MergeFrom(CollectiveInvitation(**self.values))  # type: ignore[arg-type]
        return invitation


class Declining(FaultyCollectives):
    """Invites, and builds nothing."""

    def as_receiver(self, _group: CollectiveGroup) -> contextlib.AbstractContextManager[Group]:
        raise GroupError("no")


def _closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("how", ["closed port", "another receiver's store", "receiver declines", "no such host"])
async def test_a_group_that_cannot_be_built_costs_nothing(how: str) -> None:
    receivers: dict[str, Collectives] = {
        "closed port": Misleading(store_address=_closed_port()),
        "another receiver's store": Misleading(world=1),
        "receiver declines": Declining(),
        "no such host": Misleading(store_address="no-such-host.invalid:1"),
    }
    async with receiving(receivers[how]) as to, sending() as worker:
        assert (await worker.send(to, "r", [1])).transport == "grpc"
        await eventually(lambda: worker.counters["collective_fallbacks"] == 1, timeout_s=3)
        assert (await worker.send(to, "s", [2])).transport == "grpc"
        assert worker.counters["collective_fallbacks"] == 1, "no second attempt so soon"


@pytest.mark.parametrize("backends_of", ["sender", "receiver", "neither"])
async def test_no_group_unless_both_want_one(backends_of: str) -> None:
    without = Collectives()
    async with (
        receiving(None if backends_of == "receiver" else without) as to,
        sending(None if backends_of == "sender" else without) as worker,
    ):
        await worker.send(to, "r", [1])
        assert (await worker.send(to, "s", [2])).transport == "grpc"
        assert not group_threads()


async def test_a_sender_ends_at_once_while_its_receiver_stalls(gate: threading.Event) -> None:
    async with receiving(FaultyCollectives(lambda group: Stalling(group, gate))) as to:
        async with sending() as worker:
            peer = await worker.meet(to)
            running = asyncio.create_task(worker.push(peer, "r", MANY).run())
            await eventually(lambda: worker.counters["bytes_pushed_gloo"])
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            began = time.monotonic()
        assert time.monotonic() - began < 3
        gate.set()
        to.side.receiver.let_go("r")


async def test_a_receiver_ends_at_once_while_its_sender_stalls_and_frees_its_port() -> None:
    holding = threading.Event()

    class Silent(Wrapped):
        """Tells of a run that it does not send."""

        def send(self, staging: Staging, num_bytes: int) -> Transit:
            holding.set()
            return lambda: None

    async with sending(FaultyCollectives(Silent)) as worker:
        async with receiving() as to:
            peer = await worker.meet(to)
            invitation = await to.collectives.invite(BACKENDS)
            assert invitation is not None
            running = asyncio.create_task(worker.push(peer, "r", MANY).run())
            await eventually(holding.is_set)
            began = time.monotonic()
            await to.server.stop()
            assert time.monotonic() - began < 3
            to.side.receiver.let_go("r")
        host, _, port = invitation.store_address.rpartition(":")
        with pytest.raises(ConnectionRefusedError), socket.create_connection((host, int(port))):
            pass
        assert (await running).error


async def test_a_sender_ends_at_once_while_its_receiver_does_not_come() -> None:
    class Late(FaultyCollectives):
        @contextlib.contextmanager
        def as_receiver(self, _group: CollectiveGroup):  # type: ignore[no-untyped-def]
            self._closing.wait()
            raise GroupError("too late")
            yield

    async with receiving(Late()) as to:
        async with sending() as worker:
            await worker.send(to, "r", [1])
            began = time.monotonic()
        assert time.monotonic() - began < 3


async def test_a_run_that_is_too_large_ends_the_stream_and_not_the_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_receiver, "MAX_RUN_BYTES", SLOT_BYTES)
    async with receiving() as to, sending() as worker:
        peer = await worker.meet(to)
        await worker.push(peer, "r", MANY).run()
        to.side.receiver.let_go("r")
        assert (await worker.send(to, "s", [100])).transport == "grpc"


async def test_a_worker_listens_at_its_own_host_only() -> None:
    collectives = FaultyCollectives()
    collectives.listen("127.0.0.1", "127.0.0.1")
    invitation = await collectives.invite(BACKENDS)
    assert invitation is not None
    port = int(invitation.store_address.rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.2", port)):
        pass
    collectives.close()
