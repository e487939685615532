"""How do blocks leave through a process group? One thread sends them, and tells over gRPC what it sends."""

from __future__ import annotations

import asyncio
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import grpc

from kvrelay import grpc_options
from kvrelay.kv_transfer.collective_group import NUM_STAGINGS, RUN_BYTES, Group, GroupError, Staging, Transit
from kvrelay.kv_transfer.collectives import Collectives
from kvrelay.kv_transfer.frame_order import FrameOrder
from kvrelay.kv_transfer.posting import post_to_running_loop, raise_in_loop
from kvrelay.kv_transfer.wire import SERVICE
from kvrelay.v1.kv_transfer_pb2 import CollectiveGroup, CollectiveInvitation, CollectRun, FrameAck, FrameAcks, Want

_POLL_S = 0.2
_JOIN_S = 10.0


class Sent(NamedTuple):
    """An order and the answer that it is for."""

    want: Want
    order: FrameOrder


OnEnd = Callable[["CollectStream", Sequence[Sent], str], None]
"""Called once: with what was not acknowledged, and with why the group failed, or nothing when it was not used."""


class CollectStream:
    """One group to one receiver, which lives as long as the gRPC stream beside it. Belongs to the event loop.

    gRPC's thread that asks for the next message builds the group, sends and closes it; a thread of ours reads the acks.
    Not ready before both sides have the group: until then nothing is to be put.
    """

    def __init__(
        self,
        push_address: str,
        invitation: CollectiveInvitation,
        collectives: Collectives,
        on_ack: Callable[[FrameAck], None],
        on_end: OnEnd,
    ) -> None:
        """Begins to build the group."""
        self.push_address = push_address
        self.invitation = invitation
        self.is_ready = False
        self._collectives = collectives
        self._on_ack = on_ack
        self._on_end = on_end
        self._post = post_to_running_loop(raise_in_loop)
        self._unacknowledged: dict[tuple[int, int, int], Sent] = {}
        self._ended = False
        self._orders: queue.SimpleQueue[tuple[int, FrameOrder] | None] = queue.SimpleQueue()
        self._stop, self._finished = threading.Event(), threading.Event()
        self._group: Group | None = None
        self._call: grpc.Call | None = None
        self._num_sent = self._num_acked = 0
        self._heard_s = 0.0
        self._thread = threading.Thread(target=self._run, name=f"kv-Collect-{push_address}", daemon=True)
        self._thread.start()

    def put(self, want: Want, order: FrameOrder) -> None:
        """Send it, or hand it back when the group ends."""
        self._unacknowledged[want.transfer_id, *order.key] = Sent(want, order)
        self._orders.put((want.transfer_id, order))

    async def close(self) -> None:
        """Break the group and wait for its threads."""
        self._ended = True
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._break()
        call = self._call
        if call is not None:
            call.cancel()
        self._thread.join(_JOIN_S)

    def _break(self) -> None:
        self._stop.set()
        self._orders.put(None)
        group = self._group
        if group is not None:
            group.abort()

    def _run(self) -> None:
        """The thread that reads acks."""
        error = ""
        runs = self._runs()
        with grpc.insecure_channel(
            self.push_address, options=grpc_options.channel_options(own_connection=True)
        ) as channel:
            collect: grpc.StreamStreamMultiCallable[CollectRun, FrameAcks] = channel.stream_stream(
                f"/{SERVICE}/Collect",
                request_serializer=CollectRun.SerializeToString,
                response_deserializer=FrameAcks.FromString,
            )
            call = collect(runs)
            self._call = call
            if self._stop.is_set():
                call.cancel()
            try:
                for acks in call:
                    self._take(acks.acks)
                if not self._finished.is_set():
                    error = "the receiver ended the stream"
            except grpc.RpcError as broken:
                error = f"the stream broke: {_reason(call, broken)}"
            self._break()
            self._finish(runs)
        self._post(self._end, error)

    def _take(self, acks: Sequence[FrameAck]) -> None:
        self._num_acked += len(acks)
        self._heard_s = time.monotonic()
        if any(ack.status == FrameAck.STATUS_LOST for ack in acks):
            self._post(self._end, "the receiver's side of the group failed")
            self._break()
        self._post(self._on_acks, acks)

    def _finish(self, runs: Generator[CollectRun, None, None]) -> None:
        """Have the group closed, by gRPC's thread if that is still there."""
        while True:
            try:
                runs.close()
                return
            except ValueError:  # It is running.
                self._finished.wait(_POLL_S)

    def _runs(self) -> Generator[CollectRun, None, None]:
        """What the stream says, for gRPC's thread."""
        try:
            from kvrelay.kv_transfer.rendezvous import own_host_towards

            group = CollectiveGroup(
                backend=self.invitation.backend,
                group_id=secrets.randbits(64),
                sender_host=own_host_towards(self.invitation.store_address),
            )
            yield CollectRun(group=group)
            with self._collectives.as_sender(self.invitation, group, self._stop) as opened:
                self._group = opened
                self._post(self._set_ready)
                yield from self._send(opened)
        except GroupError as error:
            if not self._stop.is_set():
                self._post(self._end, str(error))
        finally:
            self._finished.set()
        yield CollectRun(is_last=True)

    def _send(self, group: Group) -> Generator[CollectRun, None, None]:
        free = deque(group.staging(RUN_BYTES) for _ in range(NUM_STAGINGS))
        under_way: deque[tuple[Staging, Transit]] = deque()

        def land(most: int) -> None:
            while len(under_way) > most:
                staging, transit = under_way.popleft()
                transit()
                free.append(staging)

        while True:
            if self._orders.empty():
                land(0)
            item = self._next()
            if item is None:
                return
            transfer_id, order = item
            land(NUM_STAGINGS - 1)
            staging = free.popleft()
            if len(staging.host) < order.num_bytes:
                staging = group.staging(order.num_bytes)
            header = order.gather(staging.host)
            if header is None:
                free.append(staging)
                self._post(self._forget, (transfer_id, *order.key), order)
                continue
            under_way.append((staging, group.send(staging, order.num_bytes)))
            if self._num_sent == self._num_acked:
                self._heard_s = time.monotonic()
            self._num_sent += 1
            yield CollectRun(
                transfer_id=header.transfer_id,
                first_block=header.first_block,
                num_blocks=header.num_blocks,
                first_layer=header.first_layer,
                num_layers=header.num_layers,
                checksum=header.checksum,
                num_bytes=order.num_bytes,
            )

    def _next(self) -> tuple[int, FrameOrder] | None:
        """The next order, or None when the group shall end. Raises `GroupError` when acks are overdue."""
        config = self._collectives.config
        idle_since_s = time.monotonic()
        while not self._stop.is_set():
            now = time.monotonic()
            if self._num_acked < self._num_sent and now - self._heard_s > config.deadline_s:
                raise GroupError(f"nothing was acknowledged for {config.deadline_s} s")
            try:
                return self._orders.get(timeout=min(_POLL_S, config.deadline_s))
            except queue.Empty:
                if now - idle_since_s > config.idle_s:
                    return None
        return None

    def _set_ready(self) -> None:
        self.is_ready = not self._ended

    def _forget(self, key: tuple[int, int, int], order: FrameOrder) -> None:
        """The order was not wanted any more."""
        if key in self._unacknowledged and self._unacknowledged[key].order is order:
            del self._unacknowledged[key]

    def _on_acks(self, acks: Sequence[FrameAck]) -> None:
        for ack in acks:
            if ack.status != FrameAck.STATUS_LOST:
                self._unacknowledged.pop((ack.transfer_id, ack.first_block, ack.first_layer), None)
                self._on_ack(ack)

    def _end(self, error: str) -> None:
        if not self._ended:
            self._ended = True
            self.is_ready = False
            left = list(self._unacknowledged.values())
            self._unacknowledged.clear()
            self._on_end(self, left, error)


def _reason(call: grpc.Call, broken: grpc.RpcError) -> str:
    return f"{call.code().name}: {call.details()}" if call.code() else str(broken)
