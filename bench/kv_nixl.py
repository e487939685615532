"""NIXL over UCX, the transport of vLLM's own disaggregated prefill: the sender writes, or the receiver reads.

Which of UCX's transports it may use is told to it by `UCX_TLS` in the environment. A notification carries the sender's
word that blocks are ready and the receiver's that they are there. Blocks travel in random order, so that they are not
merged into one transfer. With its defaults an agent has a thread that polls beside the one that waits, which costs
where both share a core; `tuned` agents have none.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import json
import os
import random
import time
from typing import Any

from bench.kv_side import Job, Receiver, Sender, Side, new_memory

_PACKAGES = ("nixl_cu12", "nixl_cu13")
_DEADLINE_S = 60.0
_READY, _THERE = b"ready", b"there"


def installed() -> str:
    """The package that is there; empty when none is."""
    return next((name for name in _PACKAGES if importlib.util.find_spec(name) is not None), "")


class _Agent:
    """A NIXL agent over one region."""

    def __init__(self, side: Side, name: str, *, tuned: bool) -> None:
        api: Any = importlib.import_module(f"{installed()}._api")
        self._side = side
        self._agent = api.nixl_agent(name, api.nixl_agent_config(backends=[], enable_prog_thread=not tuned))
        # "peer" wants a transport that notices a peer's death, which shared memory alone does not.
        self._agent.create_backend("UCX", {"ucx_error_handling_mode": "none" if tuned else "peer"})
        self._address = side.memory.ctypes.data
        self._registered = self._agent.register_memory([(self._address, side.memory.nbytes, 0, "")], "DRAM")
        self._peer = ""
        self._peer_address = 0
        self._lists: tuple[Any, Any] | None = None
        self._notes: list[bytes] = []

    def contact(self) -> str:
        metadata = base64.b64encode(self._agent.get_agent_metadata()).decode()
        return json.dumps({"metadata": metadata, "address": self._address})

    def connect(self, contact: str) -> None:
        peer = json.loads(contact)
        self._peer_address = peer["address"]
        name = self._agent.add_remote_agent(base64.b64decode(peer["metadata"]))
        self._peer = name.decode() if isinstance(name, bytes) else name

    def prepare(self, job: Job) -> None:
        """Descriptors of the job's blocks on both sides."""
        self._release()
        offsets = range(0, job.num_bytes, job.block_bytes)
        local = [(self._address + offset, job.block_bytes, 0) for offset in offsets]
        remote = [(self._peer_address + offset, job.block_bytes, 0) for offset in offsets]
        self._lists = (
            self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", local, "DRAM"),
            self._agent.prep_xfer_dlist(self._peer, remote, "DRAM"),
        )

    def transfer(self, operation: str, job: Job, note: bytes) -> None:
        """Move all blocks, and tell the peer `note` when they are there."""
        assert self._lists is not None
        local, remote = self._lists
        every = random.Random(1).sample(range(job.num_blocks), job.num_blocks)
        handle = self._agent.make_prepped_xfer(operation, local, every, remote, every, note)
        state = self._agent.transfer(handle)
        deadline = time.monotonic() + _DEADLINE_S
        while state == "PROC" and time.monotonic() < deadline:
            state = self._agent.check_xfer_state(handle)
            os.sched_yield()
        if state != "DONE":
            raise ConnectionError(f"NIXL's transfer ended as {state}")
        handle.release()

    def tell(self, note: bytes) -> None:
        self._agent.send_notif(self._peer, note)

    def wait_for(self, note: bytes) -> None:
        deadline = time.monotonic() + _DEADLINE_S
        while note not in self._notes:
            for notes in self._agent.get_new_notifs().values():
                self._notes += notes
            os.sched_yield()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the peer did not say {note!r}")
        self._notes.remove(note)

    def _release(self) -> None:
        for handle in self._lists or ():
            handle.release()
        self._lists = None

    def close(self) -> None:
        """UCX keeps files in /dev/shm as long as its agent lives."""
        self._release()
        if self._peer:
            self._agent.remove_remote_agent(self._peer)
        self._agent.deregister_memory(self._registered)
        del self._agent


class NixlSender(Sender):
    """Writes, or lets the receiver read."""

    def __init__(self, num_bytes: int, operation: str, tuned: bool) -> None:
        super().__init__(new_memory(num_bytes, random=True))
        self._operation = operation
        self._agent = _Agent(self, "sender", tuned=tuned)

    def contact(self) -> str:
        return self._agent.contact()

    def connect(self, contact: str) -> None:
        self._agent.connect(contact)

    def prepare(self, job: Job) -> None:
        self._agent.prepare(job)

    def send(self, job: Job) -> list[float]:
        seconds = []
        for _ in range(job.repeat):
            began = time.perf_counter()
            if self._operation == "WRITE":
                self._agent.transfer("WRITE", job, _READY)
            else:
                self._agent.tell(_READY)
            self._agent.wait_for(_THERE)
            seconds.append(time.perf_counter() - began)
        return seconds

    def close(self) -> None:
        self._agent.close()


class NixlReceiver(Receiver):
    """Reads, or sees what is written."""

    def __init__(self, num_bytes: int, operation: str, tuned: bool) -> None:
        super().__init__(new_memory(num_bytes, random=False))
        self._operation = operation
        self._agent = _Agent(self, "receiver", tuned=tuned)

    def contact(self) -> str:
        return self._agent.contact()

    def connect(self, contact: str) -> None:
        self._agent.connect(contact)

    def prepare(self, job: Job) -> None:
        self._agent.prepare(job)

    def receive(self, job: Job) -> None:
        for _ in range(job.repeat):
            self._agent.wait_for(_READY)
            if self._operation == "WRITE":
                self._agent.tell(_THERE)
            else:
                self._agent.transfer("READ", job, _THERE)

    def close(self) -> None:
        self._agent.close()
