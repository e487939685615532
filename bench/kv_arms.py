"""Which transports are measured against each other?"""

from __future__ import annotations

from collections.abc import Sequence

from bench import kv_nixl
from bench.kv_pair import Arm
from bench.kv_side import BLOCKS, block_bytes

BLOCK_BYTES = {name: block_bytes(shape) for name, shape in BLOCKS.items()}
RAW_MESSAGE_BYTES = (256 << 10, 1 << 20, 4 << 20)
OURS = ("grpc", "shm", "gloo_ours")
"""Transports of `kv_ours`."""

_BOTH = tuple(BLOCK_BYTES.values())
_NIXL_TLS = {"tcp": "tcp", "shm": "tcp,sm", "tuned_tcp": "tcp", "tuned_shm": "sm"}


def _copy(name: str, sender: str) -> Arm:
    return Arm(name=name, module="bench.kv_copies", sender=sender, block_bytes=_BOTH)


def _raw_grpc(kind: str) -> Arm:
    return Arm(
        name=f"raw_grpc_{kind.lower()}",
        module="bench.kv_raw_grpc",
        sender=f"{kind}Sender",
        receiver=f"{kind}Receiver",
        block_bytes=RAW_MESSAGE_BYTES,
    )


def _ours(transport: str) -> Arm:
    return Arm(
        name=transport,
        module="bench.kv_ours",
        sender="OurSender",
        receiver="OurReceiver",
        arguments={"transport": transport},
        block_bytes=_BOTH,
    )


def _nixl(tls: str, operation: str) -> Arm:
    return Arm(
        name=f"nixl_{tls}_{operation}",
        module="bench.kv_nixl",
        sender="NixlSender",
        receiver="NixlReceiver",
        arguments={"operation": operation.upper(), "tuned": tls.startswith("tuned")},
        environment={"UCX_TLS": _NIXL_TLS[tls], "NIXL_LOG_LEVEL": "WARN"},
        block_bytes=_BOTH,
        optional=True,
    )


def all_arms() -> Sequence[Arm]:
    """Those that this installation can run."""
    arms = [
        _copy("memcpy", "Memcpy"),
        Arm(
            name="raw_socket",
            module="bench.kv_socket",
            sender="SocketSender",
            receiver="SocketReceiver",
            block_bytes=_BOTH,
        ),
        _raw_grpc("Sync"),
        _raw_grpc("Aio"),
        *map(_ours, OURS),
        Arm(name="gloo", module="bench.kv_gloo", sender="GlooSender", receiver="GlooReceiver", block_bytes=_BOTH),
    ]
    if kv_nixl.installed():
        arms += [_nixl(tls, operation) for tls in _NIXL_TLS for operation in ("read", "write")]
    return [*arms, _copy("store_to_engine", "StoreToEngine")]
