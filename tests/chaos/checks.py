"""What must not be left when the load is over and every fault is healed?"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import httpx

from kvrelay import keeper
from kvrelay.grpc_options import open_channel
from kvrelay.launch.marked_processes import mark, marked
from kvrelay.membership.records import (
    chores_key,
    coordinators_prefix,
    list_coordinators,
    list_workers,
    prefix_logs_prefix,
    workers_prefix,
)
from kvrelay.v1 import worker_pb2_grpc
from tests.chaos.cluster import Cluster
from tests.chaos.members import CLUSTER, COORDINATORS, WORKERS
from tests.support.cluster_gauges import ClusterGauges

IDLE_TIMEOUT_S = 10.0
WHOLE_TIMEOUT_S = 60.0
_TIDY_TIMEOUT_S = 5.0
_POLL_S = 0.2
_MEETING_FILE = "vllm_dist_"
"""What vLLM's ranks meet over; a killed engine leaves it in its temporary folder, which ends with the run."""
_ZERO = re.compile(
    r"^kvrelay_(in_flight_requests|queued_requests|prefix_index_speculated_entries|worker_running_requests"
    r"|worker_queued_prompts|worker_queued_prompt_tokens|worker_context_tokens|worker_engine_running_requests"
    r"|worker_engine_waiting_requests)\{([^}]*)\} (\S+)$",
    re.MULTILINE,
)
_WORKER = re.compile(r"^kvrelay_worker_info\{.*worker=\"([^\"]+)\"", re.MULTILINE)


async def leaks_of(cluster: Cluster) -> list[str]:
    """What is left, each in words; waits until nothing is, for the times above."""
    left: list[str] = []
    try:
        await cluster.wait_whole(WHOLE_TIMEOUT_S)
    except TimeoutError:
        left.append(f"the cluster is not whole {WHOLE_TIMEOUT_S:g} s after the last fault: {await _members(cluster)}")
    found = await asyncio.gather(
        *(_until_none(look, cluster) for look in (_of_workers, _of_coordinators, _of_etcd, _of_processes))
    )
    return [*left, *(each for some in found for each in some)]


async def _until_none(look: Callable[[Cluster], Awaitable[list[str]]], cluster: Cluster) -> list[str]:
    deadline_s = time.monotonic() + IDLE_TIMEOUT_S
    while (left := await look(cluster)) and time.monotonic() < deadline_s:
        await asyncio.sleep(_POLL_S)
    return left


async def _members(cluster: Cluster) -> str:
    async with cluster.etcd() as client:
        workers = [info.worker_id for info in await list_workers(client, CLUSTER)]
        coordinators = [info.coordinator_id for info in await list_coordinators(client, CLUSTER)]
    return f"registered are {', '.join([*workers, *coordinators])}; ready are {', '.join(sorted(cluster.serving))}"


async def _of_workers(cluster: Cluster) -> list[str]:
    """Gauges that are not zero."""
    left = []
    for worker_id in WORKERS:
        async with open_channel(cluster.addresses.listen[worker_id, "grpc"]) as channel:
            gauges = ClusterGauges({worker_id: worker_pb2_grpc.WorkerStub(channel)})
            try:
                await gauges.wait_idle(timeout_s=1.0)
            except AssertionError as error:
                left.append(str(error).partition(": ")[2] or f"{worker_id} does not answer")
    return left


async def _of_coordinators(cluster: Cluster) -> list[str]:
    """Gauges that are not zero, and workers that a coordinator does not know."""
    left = []
    async with httpx.AsyncClient(timeout=IDLE_TIMEOUT_S) as http:
        for name in COORDINATORS:
            try:
                page = (await http.get(f"http://{cluster.addresses.listen[name, 'http']}/metrics")).text
            except httpx.HTTPError as error:
                left.append(f"{name} does not answer: {error!r}")
                continue
            left += [
                f"{name}: {gauge}{{{labels}}} {value}" for gauge, labels, value in _ZERO.findall(page) if float(value)
            ]
            if unknown := set(WORKERS) - set(_WORKER.findall(page)):
                left.append(f"{name} is not connected to {', '.join(sorted(unknown))}")
    return left


async def _of_etcd(cluster: Cluster) -> list[str]:
    """Keys that belong to no living member."""
    async with cluster.etcd() as client:
        entries = (await client.list_prefix(b"/")).entries
    members = {entry.key: entry.lease for entry in entries if entry.key.startswith(_member_prefixes())}
    leases = set(members.values())
    left = [
        f"etcd: {entry.key.decode()}"
        for entry in entries
        if entry.lease not in leases and not (entry.key == chores_key(CLUSTER) and entry.value.decode() in COORDINATORS)
    ]
    logs = prefix_logs_prefix(CLUSTER)
    for key in [entry.key for entry in entries if entry.key.startswith(logs)]:
        worker_id, lease = key.removeprefix(logs).decode().split("/")[:2]
        if members.get(workers_prefix(CLUSTER) + worker_id.encode()) != int(lease, 16):
            left.append(f"etcd: {key.decode()} of an earlier lease")
    return left


def _member_prefixes() -> tuple[bytes, ...]:
    return workers_prefix(CLUSTER), coordinators_prefix(CLUSTER)


async def _of_processes(cluster: Cluster) -> list[str]:
    """Processes of the run beside one for each member, with its keeper."""
    known: set[int] = set()
    for keeper_pid in cluster.keepers.values():
        children = keeper.children(keeper_pid)
        known |= {keeper_pid, *children[:1], *(pid for child in children[:1] for pid in keeper.descendants(child))}
    return [f"process {pid}: {_command(pid)}" for pid in marked(mark(cluster.run_id), whole=False) if pid not in known]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return "gone"


async def left_behind(run_id: str, directory: Path, shared_memory_before: set[str]) -> list[str]:
    """After the cluster has been stopped. Others on the machine have names for a moment that nobody maps yet."""
    deadline_s = time.monotonic() + _TIDY_TIMEOUT_S
    while (left := _left_behind(run_id, directory, shared_memory_before)) and time.monotonic() < deadline_s:
        await asyncio.sleep(_POLL_S)
    return left


def _left_behind(run_id: str, directory: Path, shared_memory_before: set[str]) -> list[str]:
    left = [f"process {pid}: {_command(pid)}" for pid in marked(mark(run_id), whole=False)]
    left += [f"shared memory: {name}" for name in sorted(unmapped_shared_memory() - shared_memory_before)]
    return [*left, *(f"file: {path.name}" for path in _named_segments(directory))]


def unmapped_shared_memory() -> set[str]:
    """Names in the machine's shared memory that no process maps."""
    mapped = keeper.shared_memory([int(name) for name in os.listdir("/proc") if name.isdecimal()])
    return {name for name in os.listdir("/dev/shm") if Path("/dev/shm") / name not in mapped}


def _named_segments(directory: Path) -> Sequence[Path]:
    """Of stores that were given files."""
    files = [path for path in (directory / "tmp").iterdir() if path.is_file()]
    return [path for path in files if not path.name.startswith(_MEETING_FILE)]
