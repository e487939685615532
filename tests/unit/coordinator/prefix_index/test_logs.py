"""The index holds what the workers' logs add up to, however the logs are cut, replaced and read."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvrelay.coordinator.prefix_index.index import PrefixIndex
from kvrelay.coordinator.prefix_index.logs import LogEntry, PrefixLogs
from kvrelay.v1 import cluster_pb2

KEYS = range(1, 9)
BLOCKS = st.sets(st.sampled_from(KEYS), max_size=4)


def entry(sequence: int, added: Iterable[int] = (), removed: Iterable[int] = (), unix_ns: int = 0) -> LogEntry:
    delta = cluster_pb2.PrefixDelta(added=_packed(added), removed=_packed(removed), published_unix_ns=unix_ns)
    return LogEntry(sequence, delta, delta.ByteSize())


def _packed(keys: Iterable[int]) -> bytes:
    return b"".join(key.to_bytes(8, "little") for key in keys)


def _split(packed: bytes) -> set[bytes]:
    return {packed[start : start + 8] for start in range(0, len(packed), 8)}


def held(index: PrefixIndex, worker_id: str = "w") -> set[int]:
    return {key for key in KEYS if index.match([key]).get(worker_id)}


def done(steps: Iterable[None]) -> None:
    for _ in steps:
        pass


class LogMachine(RuleBasedStateMachine):
    """One worker that writes, and a coordinator that sees everything at once, or misses it and lists again."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.logs = PrefixLogs(self.index)
        self.blocks: set[int] = set()
        self.name = 0
        self.next = 0
        self.etcd: dict[int, LogEntry] = {}
        self.is_watching = True
        self.superseded = ""
        """The log before this one, where the coordinator saw the change."""

    def _write(self, added: set[int], removed: set[int]) -> None:
        written = self.etcd[self.next] = entry(self.next, sorted(added), sorted(removed))
        self.next += 1
        if self.is_watching:
            done(self.logs.put("w", str(self.name), written))

    @rule(added=BLOCKS, removed=BLOCKS)
    def change(self, added: set[int], removed: set[int]) -> None:
        removed -= added
        self.blocks = (self.blocks | added) - removed
        self._write(added, removed)

    @rule()
    def snapshot(self) -> None:
        """In two chunks, as a large one would be."""
        before = list(self.etcd)
        low = {key for key in self.blocks if key < 4}
        self._write(low, set())
        self._write(self.blocks - low, set())
        for sequence in before:
            del self.etcd[sequence]
            if self.is_watching:
                self.logs.delete("w", str(self.name), sequence)

    @rule(blocks=BLOCKS)
    def new_lease(self, blocks: set[int]) -> None:
        self.superseded = str(self.name) if self.is_watching and self.etcd else ""
        self.name, self.next, self.etcd, self.blocks = self.name + 1, 0, {}, blocks
        self._write(blocks, set())

    @precondition(lambda self: self.is_watching and self.superseded)
    @rule(sequence=st.integers(0, 5))
    def old_log_ends(self, sequence: int) -> None:
        """After a last write that was late."""
        done(self.logs.put("w", self.superseded, entry(sequence, KEYS)))
        self.logs.delete("w", self.superseded, sequence)

    @rule()
    def lose_the_watch(self) -> None:
        self.is_watching = False

    @precondition(lambda self: self.etcd)
    @rule()
    def list_again(self) -> None:
        """Until all is read nothing is missing that was there before and has been all the time."""
        removed = {key for each in self.etcd.values() for key in KEYS if _packed([key]) in _split(each.delta.removed)}
        before = (held(self.index) & self.blocks) - removed
        for _ in self.logs.restore("w", str(self.name), [self.etcd[key] for key in sorted(self.etcd)]):
            assert before <= held(self.index)
        self.is_watching = True

    @precondition(lambda self: self.is_watching and self.etcd)
    @rule()
    def lease_ends(self) -> None:
        for sequence in self.etcd:
            self.logs.delete("w", str(self.name), sequence)
        self.name, self.next, self.etcd, self.blocks = self.name + 1, 0, {}, set()
        self.superseded = ""

    @invariant()
    def it_holds_what_the_worker_has(self) -> None:
        if self.is_watching:
            assert held(self.index) == self.blocks
            assert self.logs.num_deltas == len(self.etcd)
            assert self.logs.size_bytes == sum(each.size_bytes for each in self.etcd.values())
            assert self.logs.workers == ({"w"} if self.etcd else set())


LogMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)
TestLogs = LogMachine.TestCase


def test_the_lag_is_that_of_the_newest_delta() -> None:
    logs = PrefixLogs(PrefixIndex(), unix_ns=lambda: 5_000_000_000)
    done(logs.restore("w", "1", [entry(0, unix_ns=1_000_000_000)]))
    assert logs.lag_s == 0
    done(logs.put("w", "1", entry(1, unix_ns=4_750_000_000)))
    assert logs.lag_s == 0.25


def test_what_was_promised_survives_a_new_log() -> None:
    index = PrefixIndex()
    logs = PrefixLogs(index)
    done(logs.put("w", "1", entry(0, [1])))
    index.speculate("w", [2], 0.0)
    done(logs.put("w", "2", entry(0, [3])))
    assert held(index) == {2, 3}


def test_a_large_delta_is_many_steps() -> None:
    index = PrefixIndex()
    steps = list(PrefixLogs(index).put("w", "1", entry(0, range(1, 20_001))))
    assert len(steps) == 5
    assert index.num_blocks == 20_000


def test_a_log_is_of_one_worker() -> None:
    index = PrefixIndex()
    logs = PrefixLogs(index)
    done(logs.put("a", "1", entry(0, [1])))
    done(logs.put("b", "1", entry(0, [1])))
    logs.drop("a")
    assert index.match([1]) == {"b": 1}
