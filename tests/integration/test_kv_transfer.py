"""Blocks go from one store into another over real gRPC, and whatever happens on the way, both let go of everything."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio
import pytest
import xxhash

from kvrelay.kv_transfer import sender
from kvrelay.kv_transfer.compression import Compression
from kvrelay.kv_transfer.peer import LayoutRefusedError, Peer, Peers
from kvrelay.kv_transfer.push_server import PushServer
from kvrelay.kv_transfer.sender import Push, PushResult
from kvrelay.kv_transfer.wire import SERVICE, FrameHeader, encode_frame
from kvrelay.v1 import kv_transfer_pb2
from tests.support.eventually import eventually
from tests.support.kv_pair import (
    LAYERS,
    SLOT_BYTES,
    KvServer,
    Side,
    block_bytes,
    block_name,
    kv_server,
    make_layout,
    open_peers,
    push_of,
    side,
    whole,
)

MANY = list(range(40))
"""More than one frame: 4 blocks fill one."""


@dataclass(slots=True)
class Pair:
    sender: Side
    receiver: Side
    server: KvServer
    peers: Peers

    @property
    def peer(self) -> Peer:
        return self.peers.get(self.server.address)

    def push(self, request_id: str, numbers: Sequence[int], ready: Sequence[int] | None = None) -> Push:
        """A push of blocks of which the first `ready` (all by default) are ready, and that is finished then."""
        push = push_of(self.sender, self.peer, request_id, numbers)
        for index, slot in enumerate(self.sender.put(numbers if ready is None else ready)):
            push.add(whole(index, slot))
        if ready is None:
            push.finish()
        return push


@contextlib.asynccontextmanager
async def open_pair(push_server: type[PushServer] = PushServer, **receiver_values: Any) -> AsyncIterator[Pair]:
    """Both sides are idle at the end, or it fails."""
    compression = receiver_values.get("compression", Compression.NONE)
    with side() as source, side(**receiver_values) as receiver:
        async with kv_server(receiver.receiver, push_server) as server, open_peers(compression) as peers:
            yield Pair(source, receiver, server, peers)


class Gated(PushServer):
    """Takes no frame until `gate` is set, and counts those it was given."""

    gate: threading.Event
    num_frames: int

    def push(self, frames: Iterator[bytes], context: Any) -> Iterator[kv_transfer_pb2.FrameAck]:
        def gated() -> Iterator[bytes]:
            for frame in frames:
                type(self).num_frames += 1
                self.gate.wait()
                yield frame

        yield from super().push(gated(), context)


@pytest.fixture
def gated() -> Iterator[type[Gated]]:
    Gated.gate = threading.Event()
    Gated.num_frames = 0
    yield Gated
    Gated.gate.set()


async def test_blocks_arrive_with_their_content() -> None:
    async with open_pair() as pair:
        result = await pair.push("r", MANY).run()
        size = 40 * SLOT_BYTES
        assert result.busy_s > 0
        assert result == PushResult(
            num_wanted_bytes=size,
            num_blocks=40,
            num_bytes=size,
            num_stored_bytes=size,
            busy_s=result.busy_s,
            transport="grpc",
        )
        transfer = await pair.receiver.receiver.wait_settled("r", 10)
        assert transfer is not None
        assert (transfer.received_blocks, transfer.received_bytes) == (40, 40 * SLOT_BYTES)
        assert all(pair.receiver.holds(number) for number in MANY)
        assert pair.receiver.store.usage().num_pinned == 40
        pair.receiver.receiver.let_go("r")
        assert all(pair.receiver.holds(number) for number in MANY), "still a cache"


async def test_blocks_leave_while_others_are_still_computed() -> None:
    async with open_pair() as pair:
        push = pair.push("r", [1, 2, 3, 4], ready=[1, 2])
        running = asyncio.create_task(push.run())
        await eventually(lambda: pair.receiver.holds(2))
        await eventually(lambda: pair.sender.store.usage().num_pinned == 0, "acknowledged blocks are unpinned")
        for index, slot in enumerate(pair.sender.put([3, 4]), start=2):
            push.add(whole(index, slot))
        await eventually(lambda: pair.receiver.holds(4))
        assert not running.done()
        push.finish()
        assert (await running).num_blocks == 4
        pair.receiver.receiver.let_go("r")


async def test_compressed_blocks_arrive_whole() -> None:
    class Counting(PushServer):
        num_bytes = 0

        def push(self, frames: Iterator[bytes], context: Any) -> Iterator[kv_transfer_pb2.FrameAcks]:
            def counted() -> Iterator[bytes]:
                for frame in frames:
                    type(self).num_bytes += len(frame)
                    yield frame

            yield from super().push(counted(), context)

    async with open_pair(Counting, compression=Compression.LOSSLESS) as pair:
        result = await pair.push("r", MANY).run()
        assert (result.num_stored_bytes, result.error) == (40 * SLOT_BYTES, "")
        assert all(pair.receiver.holds(number) for number in MANY)
        assert Counting.num_bytes < 0.9 * 40 * SLOT_BYTES
        pair.receiver.receiver.let_go("r")


async def test_lossy_frames_that_the_receiver_did_not_agree_to_do_not_come() -> None:
    async with open_pair() as pair, open_peers(Compression.FP8) as peers:
        push = push_of(pair.sender, peers.get(pair.server.address), "r", [1])
        [slot] = pair.sender.put([1])
        push.add(whole(0, slot))
        push.finish()
        assert (await push.run()).error == ""
        assert pair.receiver.holds(1)
        pair.receiver.receiver.let_go("r")


async def test_only_missing_blocks_travel() -> None:
    async with open_pair() as pair:
        await pair.push("a", [1, 2]).run()
        result = await pair.push("b", [1, 2, 3]).run()
        assert (result.num_blocks, result.num_bytes, result.num_missing_blocks) == (1, SLOT_BYTES, 0)
        for request_id in ("a", "b"):
            pair.receiver.receiver.let_go(request_id)


async def test_blocks_that_do_not_come_are_counted_and_their_slots_free() -> None:
    async with open_pair() as pair:
        push = pair.push("r", [1, 2, 3], ready=[1])
        push.finish()
        result = await push.run()
        assert (result.num_blocks, result.num_missing_blocks, result.error) == (1, 2, "")
        assert pair.receiver.store.usage().num_reserved == 0
        pair.receiver.receiver.let_go("r")


async def test_a_receiver_without_room_gets_what_fits() -> None:
    async with open_pair(num_slots=3) as pair:
        result = await pair.push("r", MANY).run()
        assert (result.num_blocks, result.num_missing_blocks, result.error) == (3, 0, "")
        assert [pair.receiver.holds(number) for number in range(4)] == [True, True, True, False]
        pair.receiver.receiver.let_go("r")


async def test_different_layouts_are_told_with_both_sides() -> None:
    async with open_pair(layout=make_layout("other-model")) as pair:
        with pytest.raises(LayoutRefusedError, match=r"sender \[model model,.*receiver \[model other-model,"):
            await pair.push("r", [1]).run()


async def test_a_corrupted_frame_is_sent_again_once() -> None:
    class Corrupting(PushServer):
        num_frames = 0

        def push(self, frames: Iterator[bytes], context: Any) -> Iterator[kv_transfer_pb2.FrameAck]:
            def corrupted() -> Iterator[bytes]:
                for frame in frames:
                    if len(frame) < SLOT_BYTES:  # It only asks for acks.
                        yield frame
                        continue
                    type(self).num_frames += 1
                    yield frame[:-1] + bytes([frame[-1] ^ 1]) if self.num_frames == 2 else frame

            yield from super().push(corrupted(), context)

    async with open_pair(Corrupting) as pair:
        result = await pair.push("r", MANY).run()
        assert (result.num_blocks, result.num_resent_frames, result.error) == (40, 1, "")
        assert result.num_bytes == 48 * SLOT_BYTES
        assert Corrupting.num_frames == 6
        assert all(pair.receiver.holds(number) for number in MANY)
        pair.receiver.receiver.let_go("r")


async def test_a_frame_that_stays_corrupt_ends_the_push() -> None:
    class Corrupting(PushServer):
        def push(self, frames: Iterator[bytes], context: Any) -> Iterator[kv_transfer_pb2.FrameAck]:
            def corrupted() -> Iterator[bytes]:
                for frame in frames:
                    yield frame[:-1] + bytes([frame[-1] ^ 1])

            yield from super().push(corrupted(), context)

    async with open_pair(Corrupting) as pair:
        async with asyncio.timeout(10):
            result = await pair.push("r", [1, 2]).run()
        assert (result.num_blocks, result.num_resent_frames, result.num_missing_blocks) == (0, 1, 2)
        assert "STATUS_CORRUPT" in result.error
        assert not pair.receiver.holds(1)
        pair.receiver.receiver.let_go("r")


async def test_a_corrupt_last_frame_is_resent_although_nothing_else_happens() -> None:
    """The answer to it may come while the push waits for more blocks."""

    class Corrupting(PushServer):
        answered = threading.Event()

        def push(self, frames: Iterator[bytes], context: Any) -> Iterator[kv_transfer_pb2.FrameAck]:
            def corrupted() -> Iterator[bytes]:
                for frame in frames:
                    yield frame if self.answered.is_set() else frame[:-1] + bytes([frame[-1] ^ 1])

            for ack in super().push(corrupted(), context):
                yield ack
                self.answered.set()

    async with open_pair(Corrupting) as pair:
        push = pair.push("r", [1], ready=[1])
        running = asyncio.create_task(push.run())
        await eventually(lambda: push.result.num_resent_frames == 1)
        push.finish()
        async with asyncio.timeout(10):
            assert (await running).num_blocks == 1
        pair.receiver.receiver.let_go("r")


async def test_a_broken_stream_releases_every_pin(gated: type[Gated]) -> None:
    async with open_pair(gated) as pair:
        push = pair.push("r", MANY)
        running = asyncio.create_task(push.run())
        await eventually(lambda: gated.num_frames >= 1)
        assert pair.sender.store.usage().num_pinned == 40
        await pair.server.stop()
        async with asyncio.timeout(10):
            result = await running
        assert "broke" in result.error or "UNAVAILABLE" in result.error
        assert pair.sender.store.usage().num_pinned == 0
        pair.receiver.receiver.let_go("r")


async def test_a_peer_is_used_again_after_it_came_back(gated: type[Gated]) -> None:
    """No frame gets lost in what is left of the broken stream."""
    async with open_pair(gated) as pair:
        running = asyncio.create_task(pair.push("r", [1]).run())
        await eventually(lambda: gated.num_frames >= 1)
        await pair.server.stop()
        await running
        pair.receiver.receiver.let_go("r")
        gated.gate.set()
        await pair.server.start()
        async with asyncio.timeout(20):
            for attempt in itertools.count(2):
                result = await pair.push(f"r{attempt}", [attempt]).run()
                pair.receiver.receiver.let_go(f"r{attempt}")
                if not result.error:
                    break
                assert "UNAVAILABLE" in result.error, "the peer answers again, but a frame was lost"
        assert pair.receiver.holds(attempt)


async def test_an_unreachable_peer_ends_the_push_at_once() -> None:
    async with open_pair() as pair:
        await pair.server.stop()
        async with asyncio.timeout(15):
            result = await pair.push("r", [1, 2]).run()
        assert "UNAVAILABLE" in result.error
        assert pair.sender.store.usage().num_pinned == 0


async def test_a_cancelled_push_releases_every_pin(gated: type[Gated]) -> None:
    async with open_pair(gated) as pair:
        running = asyncio.create_task(pair.push("r", MANY).run())
        await eventually(lambda: gated.num_frames >= 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert pair.sender.store.usage().num_pinned == 0
        assert pair.peers.num_transfers == 0
        pair.receiver.receiver.let_go("r")
        gated.gate.set()
        # What was on its way is stale, and other transfers go on over the same stream.
        assert (await pair.push("other", [50]).run()).num_blocks == 1
        pair.receiver.receiver.let_go("other")
        await eventually(lambda: gated.num_frames >= 2)
        assert not any(pair.receiver.holds(number) for number in MANY)


async def test_a_transfer_that_the_receiver_ended_ends_the_push(gated: type[Gated]) -> None:
    async with open_pair(gated) as pair:
        running = asyncio.create_task(pair.push("r", MANY).run())
        await eventually(lambda: gated.num_frames >= 1)
        pair.receiver.receiver.let_go("r")
        gated.gate.set()
        async with asyncio.timeout(10):
            assert "STATUS_STALE" in (await running).error
        assert pair.sender.store.usage().num_pinned == 0


async def test_a_receiver_that_answers_nothing_is_given_up(gated: type[Gated], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "_RESEND_S", 0.05)
    monkeypatch.setattr(sender, "_GIVE_UP_S", 0.2)
    async with open_pair(gated, num_slots=320) as pair:
        # More frames than the stream takes: some pushes wait for room, others for answers.
        pushes = [pair.push(f"r{i}", MANY) for i in range(8)]
        async with asyncio.timeout(10):
            results = await asyncio.gather(*(push.run() for push in pushes))
        assert [result.error for result in results if "took nothing" not in result.error] == []
        assert pair.sender.store.usage().num_pinned == 0
        for i in range(8):
            pair.receiver.receiver.let_go(f"r{i}")


async def test_a_slow_receiver_holds_the_sender_back(gated: type[Gated]) -> None:
    async with open_pair(gated) as pair:
        pushes = [asyncio.create_task(pair.push(f"r{i}", MANY[i::4]).run()) for i in range(4)]
        await eventually(lambda: gated.num_frames >= 1)
        assert all(not push.done() for push in pushes)
        gated.gate.set()
        results = await asyncio.gather(*pushes)
        assert [result.num_blocks for result in results] == [10] * 4
        assert all(pair.receiver.holds(number) for number in MANY)
        for i in range(4):
            pair.receiver.receiver.let_go(f"r{i}")


async def test_many_pushes_at_once_share_a_stream() -> None:
    async with open_pair() as pair:
        pushes = [pair.push(f"r{i}", [i, i + 1, 50]) for i in range(0, 40, 2)]
        results = await asyncio.gather(*(push.run() for push in pushes))
        assert all(result.error == "" and result.num_missing_blocks == 0 for result in results)
        assert all(pair.receiver.holds(number) for number in [*MANY, 50])
        for i in range(0, 40, 2):
            pair.receiver.receiver.let_go(f"r{i}")


async def test_a_protobuf_client_of_any_language_is_a_valid_sender() -> None:
    """Nothing but the generated messages on the sending side."""
    with side() as receiver:
        async with (
            kv_server(receiver.receiver) as server,
            grpc.aio.insecure_channel(server.address) as channel,
            grpc.aio.insecure_channel(server.push_address) as push_channel,
        ):
            offer = channel.unary_stream(
                f"/{SERVICE}/Offer",
                request_serializer=kv_transfer_pb2.OfferRequest.SerializeToString,
                response_deserializer=kv_transfer_pb2.Want.FromString,
            )
            push = push_channel.stream_stream(
                f"/{SERVICE}/Push",
                request_serializer=kv_transfer_pb2.Frame.SerializeToString,
                response_deserializer=kv_transfer_pb2.FrameAcks.FromString,
            )
            commit = channel.unary_unary(
                f"/{SERVICE}/Commit",
                request_serializer=kv_transfer_pb2.CommitRequest.SerializeToString,
                response_deserializer=kv_transfer_pb2.CommitResponse.FromString,
            )
            offering = offer(
                kv_transfer_pb2.OfferRequest(request_id="r", layout=receiver.layout, block_hashes=block_name(1))
            )
            want = await anext(aiter(offering))
            # As kv_transfer.proto says, without our own code.
            fields = (want.transfer_id, 0, 1, 0, LAYERS, 1, 0, 0)
            seed = xxhash.xxh3_64_intdigest(b"".join(value.to_bytes(8, "little") for value in fields))
            frame = kv_transfer_pb2.Frame(
                transfer_id=want.transfer_id,
                num_blocks=1,
                num_layers=LAYERS,
                checksum=xxhash.xxh3_64_intdigest(block_bytes(1), seed),
                payload=block_bytes(1),
                ack_now=True,
            )
            acks = [
                ack async for answer in push(iter([frame, kv_transfer_pb2.Frame(is_last=True)])) for ack in answer.acks
            ]
            committed = await commit(kv_transfer_pb2.CommitRequest(transfer_id=want.transfer_id))
            assert committed.num_missing_blocks == 0
            offering.cancel()
        assert [ack.status for ack in acks] == [kv_transfer_pb2.FrameAck.STATUS_STORED]
        assert receiver.holds(1)
        receiver.receiver.let_go("r")


@pytest.mark.parametrize("data", [b"", b"\x00", b"garbage", encode_frame(FrameHeader(1, 0, 1, 0, 1), [b"x"])[:-1]])
async def test_garbage_ends_its_stream_and_nothing_else(data: bytes) -> None:
    with side() as receiver:
        async with kv_server(receiver.receiver) as server, open_peers() as peers:
            async with grpc.aio.insecure_channel(server.push_address) as channel:
                push = channel.stream_stream(
                    f"/{SERVICE}/Push",
                    request_serializer=bytes,
                    response_deserializer=kv_transfer_pb2.FrameAcks.FromString,
                )
                call = push()
                await call.write(data)
                if data:
                    with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
                        await call.read()
                else:  # An empty message is a Frame that brings nothing.
                    await call.write(kv_transfer_pb2.Frame(is_last=True).SerializeToString())
                    await call.done_writing()
                    assert await call.read() is grpc.aio.EOF
            with side() as source:
                [slot] = source.put([1])
                good = push_of(source, peers.get(server.address), "r", [1])
                good.add(whole(0, slot))
                good.finish()
                assert (await good.run()).num_blocks == 1
        receiver.receiver.let_go("r")


async def test_the_receivers_of_two_processes_never_share_transfer_ids() -> None:
    with side() as one, side() as other:
        ids = {s.receiver.offer("r", s.layout, block_name(1))[0] for s in (one, other)}
        assert len(ids) == 2
        for s in (one, other):
            s.receiver.let_go("r")
