"""Options of every gRPC channel and server in the cluster.

Argument names are those of gRPC core (include/grpc/impl/channel_arg_names.h). A channel belongs to
the event loop that runs when it is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc.aio

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Log probabilities of long prompts are the largest messages."""

KEEPALIVE_TIME_MS = 5_000
KEEPALIVE_TIMEOUT_MS = 5_000
PING_TIMEOUT_MS = 10_000
"""Of pings that measure the bandwidth. While one is under way gRPC sends no keepalive, and by itself it waits a minute:
a peer that falls silent while data flows would be noticed as late as that. A process that only stands still for some
seconds keeps its connections."""
INITIAL_RECONNECT_MS = 100
MAX_RECONNECT_MS = 2_000
CONNECT_TIMEOUT_MS = 5_000
"""gRPC bounds a connection attempt by its "min_reconnect_backoff"; a busy peer needs more than the first back-off."""

Options = Sequence[tuple[str, int]]

_SIZES: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]


def server_options(*, max_message_bytes: int = MAX_MESSAGE_BYTES, shares_port: bool = False) -> Options:
    """One server per port, unless all of them share it, and peers may ping as often as they like."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.so_reuseport", int(shares_port)),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def fixed_window(num_bytes: int) -> Options:
    """For a server: a stream takes so much more than the message that is read, however fast the link is."""
    return [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", num_bytes)]


def channel_options(*, own_connection: bool = False) -> Options:
    """Notices a dead peer within 15 s and tries again at least every 2 s.

    With `own_connection` the channel never shares a TCP connection with another channel to the same
    address.
    """
    return [
        *_SIZES,
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", INITIAL_RECONNECT_MS),
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_MS),
        ("grpc.use_local_subchannel_pool", int(own_connection)),
    ]


def listen_at(server: grpc.Server | grpc.aio.Server, address: str) -> int:
    """Open a plaintext port at `address` (host:port, 0 for a free one); returns the port. Raises `OSError`."""
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(
            f"cannot listen at {address}: something else does, or it is no address of this machine"
        ) from error


def open_channel(address: str, *, own_connection: bool = False) -> grpc.aio.Channel:
    """Open a plaintext channel in the running loop; the caller closes it."""
    return grpc.aio.insecure_channel(address, options=channel_options(own_connection=own_connection))
