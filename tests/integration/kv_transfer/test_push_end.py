"""A push that is over holds nothing, however long its peer takes to hear of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvrelay.kv_transfer.push_server import PushServer
from kvrelay.v1 import kv_transfer_pb2
from kvrelay.v1.kv_transfer_pb2 import FrameAck
from tests.support.eventually import eventually
from tests.support.kv_pair import kv_server, open_peers, push_of, side, whole

NUM_BLOCKS = 40


class Gated(PushServer):
    """Takes no frame before `go_on` is set."""

    came: threading.Event
    go_on: threading.Event

    def push(self, frames: Iterator[bytes], context: Any) -> Iterator[kv_transfer_pb2.FrameAcks]:
        def held() -> Iterator[bytes]:
            for frame in frames:
                self.came.set()
                self.go_on.wait()
                yield frame

        yield from super().push(held(), context)


@pytest.fixture
def gated() -> Iterator[type[Gated]]:
    Gated.came, Gated.go_on = threading.Event(), threading.Event()
    yield Gated
    Gated.go_on.set()


async def test_a_push_that_failed_pins_nothing_while_its_commit_is_not_answered(
    gated: type[Gated], monkeypatch: pytest.MonkeyPatch
) -> None:
    with side() as source, side() as receiver:
        async with kv_server(receiver.receiver, gated) as server, open_peers() as peers:
            peer = peers.get(server.address)
            committed, answered = asyncio.Event(), asyncio.Event()

            async def slow_commit(_transfer_id: int) -> int:
                committed.set()
                await answered.wait()
                return 0

            monkeypatch.setattr(peer, "commit", slow_commit)
            push = push_of(source, peer, "r", range(NUM_BLOCKS))
            running = asyncio.create_task(push.run())
            for index, slot in enumerate(source.put(range(NUM_BLOCKS))):
                push.add(whole(index, slot))
            push.finish()
            await asyncio.to_thread(gated.came.wait)
            receiver.receiver.let_go("r")
            gated.go_on.set()
            async with asyncio.timeout(10):
                await committed.wait()
            assert source.store.usage().num_pinned == 0
            answered.set()
            assert "STATUS_STALE" in (await running).error
            await eventually(lambda: not peers.num_transfers)


async def test_a_push_that_is_cancelled_frees_the_slots_at_its_receiver_at_once(gated: type[Gated]) -> None:
    with side() as source, side() as receiver:
        async with kv_server(receiver.receiver, gated) as server, open_peers() as peers:
            push = push_of(source, peers.get(server.address), "r", range(NUM_BLOCKS))
            for index, slot in enumerate(source.put(range(NUM_BLOCKS))):
                push.add(whole(index, slot))
            running = asyncio.create_task(push.run())
            await asyncio.to_thread(gated.came.wait)
            assert receiver.store.usage().num_reserved == NUM_BLOCKS
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert source.store.usage().num_pinned == 0
            # No frame is taken, and no stream of frames ends: only the end of the offer can have said it.
            await eventually(lambda: not receiver.receiver.num_transfers, "the receiver's slots are free")
            receiver.assert_idle()
            async with asyncio.timeout(5):
                assert await receiver.receiver.wait_settled("r", 60) is None, "it is over"
            gated.go_on.set()


async def test_an_id_that_another_transfer_has_ends_the_push_and_not_the_other(
    gated: type[Gated], monkeypatch: pytest.MonkeyPatch
) -> None:
    with side() as source, side() as receiver:
        async with kv_server(receiver.receiver, gated) as server, open_peers() as peers:
            peer = peers.get(server.address)
            offered = peer.offered
            answers: list[kv_transfer_pb2.Want] = []

            @asynccontextmanager
            async def first_answer_again(request: kv_transfer_pb2.OfferRequest) -> AsyncIterator[kv_transfer_pb2.Want]:
                async with offered(request) as want:
                    answers.append(answers[0] if answers else want)
                    yield answers[-1]

            monkeypatch.setattr(peer, "offered", first_answer_again)
            first, second = (push_of(source, peer, request_id, [1, 2]) for request_id in ("first", "second"))
            for push in (first, second):
                for index, slot in enumerate(source.put([1, 2])):
                    push.add(whole(index, slot))
                push.finish()
            running = asyncio.create_task(first.run())
            await asyncio.to_thread(gated.came.wait)
            result = await second.run()
            assert result.error == f"{peer.address} gave two transfers the id {answers[0].transfer_id}"
            assert result.num_bytes == 0
            assert not running.done()
            assert peer.num_transfers == 1
            gated.go_on.set()
            done = await running
            assert (done.error, done.num_blocks, done.num_missing_blocks) == ("", 2, 0)
            assert receiver.holds(1)
            receiver.receiver.let_go("first")


@pytest.mark.parametrize(
    ("status", "name"),
    [(17, "17"), (0, "STATUS_UNSPECIFIED"), (FrameAck.STATUS_REFUSED, "STATUS_REFUSED")],
)
async def test_a_status_that_is_no_answer_ends_the_push_and_is_named(status: int, name: str) -> None:
    """A newer peer may have statuses that are unknown here."""

    class Answers(PushServer):
        def push(self, frames: Iterator[bytes], context: Any) -> Iterator[kv_transfer_pb2.FrameAcks]:
            for acks in super().push(frames, context):
                for ack in acks.acks:
                    ack.status = status  # type: ignore[assignment]
                yield acks

    with side() as source, side() as receiver:
        async with kv_server(receiver.receiver, Answers) as server, open_peers() as peers:
            peer = peers.get(server.address)
            push = push_of(source, peer, "r", [1, 2])
            for index, slot in enumerate(source.put([1, 2])):
                push.add(whole(index, slot))
            push.finish()
            async with asyncio.timeout(5):
                result = await push.run()
            assert (result.error, result.num_blocks) == (f"{peer.address} answered {name}", 0)
            assert source.store.usage().num_pinned == 0
            receiver.receiver.let_go("r")
