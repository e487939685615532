"""Whatever lies in etcd under our keys, or workers report of themselves, requests are planned or refused."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

from google.protobuf.message import DecodeError, Message

from kvrelay.coordinator.prefix_index.follow import PrefixReplica
from kvrelay.coordinator.prefix_index.index import PrefixIndex
from kvrelay.coordinator.prefix_index.prompt import IndexedPrompt
from kvrelay.coordinator.scheduler.policies import POLICIES, make_scheduler
from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView
from kvrelay.coordinator.worker_load import WorkerLoad
from kvrelay.coordinator.worker_view import take_speeds, view_of
from kvrelay.errors import KvrelayError
from kvrelay.etcd.rpc_pb2 import Event, KeyValue
from kvrelay.membership.follow import MemberTable
from kvrelay.membership.records import prefix_logs_prefix, workers_prefix
from kvrelay.v1 import cluster_pb2, worker_pb2
from tests.fuzz.target import BETWEEN, Check, Target, joined, pieces

_MODEL, _CLUSTER = "m", "c"
_RECORD, _STATUS, _DELTA, _DELETE = range(4)
_PROMPT = range(100)
_SCHEDULERS = [make_scheduler(name) for name in POLICIES]


class _Workers:
    """The members of a cluster, as the scheduler sees them."""

    def __init__(self) -> None:
        self.views: dict[str, WorkerView] = {}

    def join(self, worker: cluster_pb2.WorkerInfo) -> None:
        worker.model = _MODEL
        self.views[worker.worker_id] = view_of(worker)

    update = join

    def leave(self, worker_id: str) -> None:
        self.views.pop(worker_id, None)

    def report(self, status: worker_pb2.WorkerStatus) -> None:
        for view in self.views.values():
            load = WorkerLoad()
            load.report(status)
            load.fill(view)
            take_speeds(view, status)


@contextlib.contextmanager
def _open() -> Iterator[Check]:
    logging.disable(logging.CRITICAL)  # Every value that is none has its line.
    yield _check
    logging.disable(logging.NOTSET)


def _check(data: bytes) -> None:
    """The first byte of each piece says what it is."""
    workers = _Workers()
    table = MemberTable(workers_prefix(_CLUSTER), cluster_pb2.WorkerInfo, workers)
    replica = PrefixReplica(PrefixIndex())
    replica._prefix = prefix_logs_prefix(_CLUSTER)
    for piece in pieces(data):
        if not piece:
            continue
        kind, number, value = piece[0] % 4, piece[0] // 4, piece[1:]
        if kind == _RECORD:
            table.apply([_event(table.prefix + b"w%d" % (number % 4), value)])
        elif kind == _STATUS:
            with contextlib.suppress(DecodeError):
                workers.report(worker_pb2.WorkerStatus.FromString(value))
        else:
            key, _, delta = value.partition(b"=")
            event = _event(replica._prefix + key, delta, deleted=kind == _DELETE)
            for _ in replica.apply([event]):
                pass
            if number % 8 == 7:
                for _ in replica.replace([event.kv]):
                    pass
    _plan(replica.index, list(workers.views.values()))
    replica.figures()


def _event(key: bytes, value: bytes, *, deleted: bool = False) -> Event:
    return Event(type=Event.DELETE if deleted else Event.PUT, kv=KeyValue(key=key, value=value))


def _plan(index: PrefixIndex, views: Sequence[WorkerView]) -> None:
    prompt = IndexedPrompt(index, "", list(_PROMPT), views, 0.0)
    shape = RequestShape(
        model=_MODEL,
        num_prompt_tokens=len(_PROMPT),
        num_sequences=1,
        max_tokens=10,
        num_stored_blocks=prompt.num_stored_blocks(),
        ttft_s=0.5,
    )
    for scheduler in _SCHEDULERS:
        with contextlib.suppress(KvrelayError):
            scheduler.plan(shape, views)


def _seeds() -> Iterator[bytes]:
    layout = cluster_pb2.KvLayout(
        num_layers=4, num_kv_heads=2, head_elements=8, dtype="bfloat16", block_size_tokens=16, fingerprint=b"f" * 16
    )

    def worker(number: int, role: cluster_pb2.Role.ValueType) -> tuple[int, Message]:
        record = cluster_pb2.WorkerInfo(
            worker_id=f"w{number}",
            role=role,
            state=cluster_pb2.WORKER_STATE_READY,
            address=f"127.0.0.1:{number}",
            layout=layout,
            max_model_len_tokens=512,
            num_engine_blocks=100,
            max_running_requests=8,
            weight=2.0,
        )
        return _RECORD + 4 * number, record

    times = cluster_pb2.StepTimes(prefill_fixed_s=1e-3, prefill_token_s=1e-4, prefill_pair_s=1e-9)
    link = worker_pb2.LinkSpeed(address="127.0.0.1:2", bytes_per_s=1e9)
    status = worker_pb2.WorkerStatus(num_queued_prompt_tokens=100, num_decode_jobs=2, step_times=times, links=[link])
    pair = [worker(1, cluster_pb2.ROLE_PREFILL), worker(2, cluster_pb2.ROLE_DECODE)]
    yield joined(bytes([kind]) + message.SerializeToString() for kind, message in [*pair, (_STATUS, status)])
    yield joined(
        bytes([kind]) + m.SerializeToString() for kind, m in [worker(1, cluster_pb2.ROLE_BOTH), (_STATUS, status)]
    )
    delta = cluster_pb2.PrefixDelta(added=bytes(range(24)), removed=bytes(8), published_unix_ns=1).SerializeToString()
    yield joined(
        [bytes([_DELTA]) + b"w1/a/0=" + delta, bytes([_DELTA]) + b"w1/a/1=" + delta, bytes([_DELETE]) + b"w1/a/0="]
    )
    yield joined([bytes([_DELTA + 28]) + b"w1/b/3=" + delta, bytes([_DELTA]) + b"w1/b/1=" + delta])


TARGET = Target("etcd_values", "values in etcd, and workers' reports of themselves", _open, _seeds, (BETWEEN, b"w1/"))
