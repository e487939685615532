"""Runs pass through pinned memory and the GPU in this order, and nobody waits for a group that is over.

GPU and NCCL are stand-ins: what NCCL itself does is not tested here.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch.distributed

from kvrelay.kv_transfer.collective_group import RECEIVER_RANK, SENDER_RANK, CollectiveConfig, Group, GroupError
from tests.support.cuda_stand_in import Gpu, NcclStandIn

ASYNC, MONITOR = "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING"


@dataclass
class Rig:
    """Two processes with a GPU each."""

    module: ModuleType
    monkeypatch: pytest.MonkeyPatch
    gpus: tuple[Gpu, Gpu] = field(default_factory=lambda: (Gpu(), Gpu()))
    wire: deque[bytes] = field(default_factory=deque)
    made: list[NcclStandIn] = field(default_factory=list)
    fails: bool = False

    def group(self, rank: int, deadline_s: float = 5.0) -> Group:
        gpu = self.gpus[rank]
        self.monkeypatch.setattr(self.module, "torch", gpu.torch)

        def make(_store: Any, own_rank: int, size: int, options: Any) -> NcclStandIn:
            assert (own_rank, size, options._timeout.total_seconds()) == (rank, 2, 8.0)
            self.made.append(NcclStandIn(gpu, self.wire, self.fails))
            return self.made[-1]

        make.Options = SimpleNamespace  # type: ignore[attr-defined]
        self.monkeypatch.setattr(self.module, "ProcessGroupNCCL", make)
        group: Group = self.module.NcclGroup(None, rank, CollectiveConfig(deadline_s=deadline_s))
        return group

    def pair(self) -> tuple[Group, Group]:
        """The sender is made first: what it says first waits on the wire."""
        return self.group(SENDER_RANK), self.group(RECEIVER_RANK)

    def on(self, rank: int, call: Callable[[], Any]) -> Any:
        """In the process of this rank."""
        self.monkeypatch.setattr(self.module, "torch", self.gpus[rank].torch)
        return call()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", None, raising=False)  # A torch without NCCL has none.
    name = "kvrelay.kv_transfer.nccl_group"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, module)
    return Rig(module, monkeypatch)


def test_runs_arrive_in_their_order_over_two_stagings(rig: Rig) -> None:
    sender, receiver = rig.pair()
    outs = [rig.on(SENDER_RANK, lambda: sender.staging(8)) for _ in range(2)]
    ins = [rig.on(RECEIVER_RANK, lambda: receiver.staging(8)) for _ in range(2)]
    sent, received = [], []
    for i in range(2):
        outs[i].host[:] = range(8 * i, 8 * i + 8)
        sent.append(rig.on(SENDER_RANK, lambda i=i: sender.send(outs[i], 8 - i)))
        received.append(rig.on(RECEIVER_RANK, lambda i=i: receiver.recv(ins[i], 8 - i)))
    for transit in (*sent, *received):
        transit()
    assert ins[0].host.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert ins[1].host.tolist() == [8, 9, 10, 11, 12, 13, 14, 0], "no more than what was sent"
    assert not rig.wire


def test_a_staging_is_busy_until_its_transit_is_over(rig: Rig) -> None:
    sender, _ = rig.pair()
    staging = rig.on(SENDER_RANK, lambda: sender.staging(2))
    staging.host[:] = 1, 2
    rig.gpus[SENDER_RANK].paused = True
    transit = rig.on(SENDER_RANK, lambda: sender.send(staging, 2))
    assert not rig.wire
    rig.gpus[SENDER_RANK].paused = False
    transit()
    staging.host[:] = 0
    assert list(rig.wire) == [b"\1\2"]


@pytest.mark.parametrize("end", ["abort", "close"])
def test_whoever_waits_is_let_go_when_the_group_ends(rig: Rig, end: str) -> None:
    _, receiver = rig.pair()
    staging = rig.on(RECEIVER_RANK, lambda: receiver.staging(2))
    transit = rig.on(RECEIVER_RANK, lambda: receiver.recv(staging, 2))
    asked = rig.gpus[RECEIVER_RANK].asked
    asked.clear()
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(transit)
        assert asked.wait(2)
        getattr(receiver, end)()
        getattr(receiver, end)()
        with pytest.raises(GroupError, match="aborted"):
            waiting.result(2)
    assert rig.made[RECEIVER_RANK].num_aborts == 1
    for begin in (receiver.send, receiver.recv):
        with pytest.raises(GroupError, match="closed"):
            begin(staging, 2)


def test_what_does_not_come_is_waited_for_until_the_deadline(rig: Rig) -> None:
    rig.group(SENDER_RANK)
    receiver = rig.group(RECEIVER_RANK, deadline_s=0.02)
    staging = receiver.staging(2)
    with pytest.raises(GroupError, match=r"receive: not within 0\.02 s"):
        receiver.recv(staging, 2)()


def test_an_error_of_the_device_is_one_of_the_group(rig: Rig) -> None:
    sender, _ = rig.pair()
    transit = rig.on(SENDER_RANK, lambda: sender.send(sender.staging(2), 2))
    rig.gpus[SENDER_RANK].error = "CUDA error: an illegal memory access"
    with pytest.raises(GroupError, match="cannot send: CUDA error"):
        transit()


def test_a_gpu_without_memory_is_an_error_of_the_group(rig: Rig) -> None:
    sender = rig.group(SENDER_RANK)
    with pytest.raises(GroupError, match=r"2097152 bytes .* out of memory"):
        sender.staging(2 << 20)


def test_a_group_that_cannot_send_its_first_message_is_aborted(rig: Rig) -> None:
    rig.fails = True
    with pytest.raises(GroupError, match=r"no NCCL group: .*system error"):
        rig.group(SENDER_RANK)
    assert [made.num_aborts for made in rig.made] == [1]


def test_a_group_whose_peer_does_not_answer_is_aborted(rig: Rig) -> None:
    with pytest.raises(GroupError, match=r"no NCCL group: .*not within"):
        rig.group(RECEIVER_RANK, deadline_s=0.02)
    assert [made.num_aborts for made in rig.made] == [1]


def test_the_watchdog_is_off_for_these_groups_only(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ASYNC, "3")
    monkeypatch.delenv(MONITOR, raising=False)
    rig.group(SENDER_RANK)
    assert (rig.made[0].environment[ASYNC], rig.made[0].environment[MONITOR]) == ("0", "0")
    assert (os.environ[ASYNC], os.environ.get(MONITOR)) == ("3", None)
