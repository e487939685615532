"""Which backends a worker may use, before any group is built."""

from __future__ import annotations

import pytest

from kvrelay.kv_transfer.collectives import Collectives, usable_backends
from kvrelay.kv_transfer.transport import KvTransport
from kvrelay.v1.kv_transfer_pb2 import COLLECTIVE_BACKEND_GLOO, COLLECTIVE_BACKEND_NCCL

GLOO, NCCL = COLLECTIVE_BACKEND_GLOO, COLLECTIVE_BACKEND_NCCL


@pytest.mark.parametrize(
    ("transport", "has_gpus", "expected"),
    [
        (KvTransport.AUTO, True, []),
        (KvTransport.COLLECTIVE, False, [GLOO]),
        (KvTransport.COLLECTIVE, True, [NCCL, GLOO]),
        (KvTransport.GRPC, True, []),
    ],
)
def test_backends_follow_from_the_transport_and_the_gpus(
    monkeypatch: pytest.MonkeyPatch, transport: KvTransport, has_gpus: bool, expected: list[int]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpus)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    monkeypatch.setattr("torch.distributed.is_gloo_available", lambda: True)
    assert list(usable_backends(transport)) == expected


def test_memory_is_shared_unless_another_way_was_chosen() -> None:
    assert [transport.value for transport in KvTransport if transport.shares_memory] == ["auto"]


async def test_nobody_is_invited_without_a_common_backend_or_a_place_to_meet() -> None:
    collectives = Collectives([GLOO])
    assert await collectives.invite([GLOO]) is None, "it does not listen"
    collectives.listen("127.0.0.1", "127.0.0.1")
    assert await collectives.invite([NCCL]) is None
    assert await collectives.invite([]) is None
    collectives.close()
    assert await collectives.invite([GLOO]) is None


async def test_a_worker_that_cannot_listen_invites_nobody() -> None:
    collectives = Collectives([GLOO])
    collectives.listen("192.0.2.1", "192.0.2.1")
    assert await collectives.invite([GLOO]) is None
