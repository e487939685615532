"""The server of frames refuses what is too much, tells which streams broke, and ends with all that it started."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import grpc.aio
import pytest

from kvrelay.kv_transfer import frame_order, placing, push_server
from kvrelay.kv_transfer.push_server import PushServer
from kvrelay.kv_transfer.sender import Push
from kvrelay.kv_transfer.wire import MAX_PAYLOAD_BYTES, SERVICE, FrameHeader, encode_frame
from kvrelay.v1.kv_transfer_pb2 import FrameAcks
from tests.support.eventually import eventually
from tests.support.kv_pair import (
    LAYERS,
    SLOT_BYTES,
    Side,
    block_bytes,
    block_name,
    kv_server,
    open_peers,
    push_of,
    side,
    whole,
)

NUM_BLOCKS = 40
"""Several frames."""
LAYER_BYTES = SLOT_BYTES // LAYERS
HEADER_BYTES = 64 << 10


@pytest.fixture
def _no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
async def test_no_thread_outlives_it_until_garbage_is_collected() -> None:
    with side() as source, side() as receiver:
        async with kv_server(receiver.receiver) as server, open_peers() as peers:
            push = push_of(source, peers.get(server.address), "r", [1])
            push.add(whole(0, *source.put([1])))
            push.finish()
            assert (await push.run()).num_blocks == 1
            receiver.receiver.let_go("r")
    await eventually(lambda: not _threads(), "its threads end")


async def test_it_may_be_stopped_twice_or_before_it_starts() -> None:
    with side() as receiver:
        server = PushServer(receiver.receiver)
        server.stop()
        server.start("127.0.0.1:0")
        for _ in range(2):
            await asyncio.to_thread(server.stop)
    assert not _threads()


class Held(PushServer):
    """Counts its streams, which take nothing before `go_on` is set."""

    num_streams: int
    go_on: threading.Event

    def push(self, frames: Iterator[bytes], context: Any) -> Iterator[FrameAcks]:
        type(self).num_streams += 1
        self.go_on.wait()
        yield from super().push(frames, context)


@pytest.fixture
def held() -> Iterator[type[Held]]:
    Held.num_streams, Held.go_on = 0, threading.Event()
    yield Held
    Held.go_on.set()


async def test_a_stream_too_many_is_refused_and_costs_its_sender_one_push(
    held: type[Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_server, "MAX_STREAMS", 2)
    with side() as first, side() as second, side(num_slots=128) as receiver:
        async with kv_server(receiver.receiver, held) as server, open_peers() as others:
            async with open_peers() as peers:
                push = push_of(first, peers.get(server.address), "r", range(NUM_BLOCKS))
                running = asyncio.create_task(_fed(push, first, range(NUM_BLOCKS)).run())
                await eventually(lambda: held.num_streams == 2, "both streams are open")

                refused = _fed(push_of(second, others.get(server.address), "s", [50]), second, [50])
                async with asyncio.timeout(5):
                    result = await refused.run()
                assert "RESOURCE_EXHAUSTED" in result.error, "says why"
                assert (result.num_blocks, result.num_missing_blocks) == (0, 1)
                assert second.store.usage().num_pinned == 0
                assert receiver.store.usage().num_reserved == NUM_BLOCKS, "who waits for the refused blocks need not"
                assert not running.done()
                held.go_on.set()
                assert (await running).num_blocks == NUM_BLOCKS
            # The streams of the first sender have ended, so there is room.
            async with asyncio.timeout(5):
                while True:
                    push = push_of(second, others.get(server.address), "t", [50])
                    again = await _fed(push, second, [50]).run()
                    if not again.error:
                        break
                    assert "RESOURCE_EXHAUSTED" in again.error
            assert again.num_blocks == 1
            for request_id in "rst":
                receiver.receiver.let_go(request_id)


@pytest.mark.parametrize(
    ("payload_bytes", "most_bytes"),
    [(MAX_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES + HEADER_BYTES), (LAYER_BYTES // 2, LAYER_BYTES + HEADER_BYTES)],
    ids=["frames are larger than a layer", "a layer is larger than frames"],
)
async def test_a_message_beyond_any_legal_frame_ends_its_stream_and_no_other(
    payload_bytes: int, most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (frame_order, placing):
        monkeypatch.setattr(module, "MAX_PAYLOAD_BYTES", payload_bytes)
    with side() as source, side() as receiver:
        async with kv_server(receiver.receiver) as server, open_peers() as peers:
            push = push_of(source, peers.get(server.address), "r", [1, 2])
            running = asyncio.create_task(push.run())
            push.add(whole(0, *source.put([1])))
            await eventually(lambda: receiver.holds(1))

            async with grpc.aio.insecure_channel(server.push_address) as channel:
                call = _push(channel)
                await _send_layer(call, receiver, "s")
                await call.write(_frame(most_bytes))
                assert (await call.read()).acks, "an answer, whatever it is"
                await call.write(_frame(most_bytes + 1))
                with pytest.raises(grpc.aio.AioRpcError, match="RESOURCE_EXHAUSTED"):
                    await call.read()
            async with asyncio.timeout(5):
                assert await receiver.receiver.wait_settled("s", 60), "what the stream carried has ended"

            push.add(whole(1, *source.put([2])))
            push.finish()
            result = await running
            assert (result.error, result.num_blocks, result.num_resent_frames) == ("", 2, 0)
            for request_id in "rs":
                receiver.receiver.let_go(request_id)


async def test_a_stream_whose_sender_is_gone_never_looks_half_closed() -> None:
    with side() as receiver:
        async with kv_server(receiver.receiver) as server:
            for attempt in range(30):
                async with grpc.aio.insecure_channel(server.push_address) as channel:
                    call = _push(channel)
                    await _send_layer(call, receiver, f"r{attempt}")
                    call.cancel()
                async with asyncio.timeout(5):
                    assert await receiver.receiver.wait_settled(f"r{attempt}", 60)
                receiver.receiver.let_go(f"r{attempt}")


def _fed(push: Push, source: Side, numbers: Sequence[int]) -> Push:
    for index, slot in enumerate(source.put(numbers)):
        push.add(whole(index, slot))
    push.finish()
    return push


def _push(channel: grpc.aio.Channel) -> Any:
    return channel.stream_stream(
        f"/{SERVICE}/Push", request_serializer=bytes, response_deserializer=FrameAcks.FromString
    )()


async def _send_layer(call: Any, receiver: Side, request_id: str) -> None:
    """One layer of the only block of a new transfer, until it is acknowledged."""
    transfer_id = receiver.receiver.offer(request_id, receiver.layout, block_name(50)).transfer_id
    await call.write(encode_frame(FrameHeader(transfer_id, 0, 1, 0, 1, ack_now=1), [block_bytes(50)[:LAYER_BYTES]]))
    assert len((await call.read()).acks) == 1


def _frame(num_bytes: int) -> bytes:
    """A frame of so many bytes, of no transfer."""
    header = FrameHeader(1, 0, 1, 0, 1, ack_now=1)
    beside = len(encode_frame(header, [bytes(num_bytes)])) - num_bytes
    return encode_frame(header, [bytes(num_bytes - beside)])


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-")]
