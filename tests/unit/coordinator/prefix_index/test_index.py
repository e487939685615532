"""The index answers as a set of blocks per worker would, whatever was added, promised, removed, dropped and swept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvrelay.coordinator.prefix_index.block_table import BlockTable, Keys
from kvrelay.coordinator.prefix_index.index import PrefixIndex

SPECULATION_S = 5.0
# Keys that meet in one bucket, and one more than its slots.
CROWDED = [(i << 32) + 7 for i in range(1, 10)]
KEYS = [*CROWDED, *range(1, 12)]
WORKERS = st.sampled_from([f"w{i}" for i in range(70)])
FEW_WORKERS = st.sampled_from(["w0", "w1", "w65"])
BLOCKS = st.lists(st.sampled_from(KEYS), max_size=12)


@dataclass
class Model:
    """What the index means."""

    held: dict[str, set[int]] = field(default_factory=dict)
    promised: dict[str, dict[int, float]] = field(default_factory=dict)

    def has(self, worker_id: str, key: int) -> bool:
        return key in self.held.get(worker_id, ()) or key in self.promised.get(worker_id, ())

    def match(self, keys: Sequence[int]) -> dict[str, int]:
        found = {}
        for worker_id in self.held.keys() | self.promised.keys():
            depth = 0
            while depth < len(keys) and self.has(worker_id, keys[depth]):
                depth += 1
            if depth:
                found[worker_id] = depth
        return found

    def blocks(self) -> set[tuple[str, int]]:
        return {
            (worker_id, key)
            for worker_id in self.held.keys() | self.promised.keys()
            for key in KEYS
            if self.has(worker_id, key)
        }


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(SPECULATION_S)
        self.model = Model()
        self.now_s = 0.0

    @rule(worker_id=WORKERS | FEW_WORKERS, keys=BLOCKS)
    def add(self, worker_id: str, keys: list[int]) -> None:
        self.index.add(worker_id, keys)
        self.model.held.setdefault(worker_id, set()).update(keys)
        for key in keys:
            self.model.promised.get(worker_id, {}).pop(key, None)

    @rule(worker_id=FEW_WORKERS, keys=BLOCKS)
    def remove(self, worker_id: str, keys: list[int]) -> None:
        self.index.remove(worker_id, keys)
        self.model.held.get(worker_id, set()).difference_update(keys)

    @rule(worker_id=FEW_WORKERS, keys=BLOCKS, removed=BLOCKS)
    def replace(self, worker_id: str, keys: list[int], removed: list[int]) -> None:
        self.index.add("builder", keys)
        self.index.remove("builder", removed)
        self.index.replace(worker_id, by="builder")
        held = self.model.held[worker_id] = set(keys) - set(removed)
        for key in held:
            self.model.promised.get(worker_id, {}).pop(key, None)

    @rule(worker_id=FEW_WORKERS, keys=BLOCKS)
    def speculate(self, worker_id: str, keys: list[int]) -> None:
        self.index.speculate(worker_id, keys, self.now_s)
        for key in keys:
            if key not in self.model.held.get(worker_id, ()):
                self.model.promised.setdefault(worker_id, {})[key] = self.now_s

    @rule(worker_id=FEW_WORKERS, keys=BLOCKS)
    def retract(self, worker_id: str, keys: list[int]) -> None:
        self.index.retract(worker_id, keys, self.now_s)
        promised = self.model.promised.get(worker_id, {})
        for key in keys:
            if promised.get(key) == self.now_s:
                del promised[key]

    @rule(seconds=st.sampled_from([0.5, 3.0, 5.0]))
    def expire(self, seconds: float) -> None:
        self.now_s += seconds
        self.index.expire(self.now_s)
        for promised in self.model.promised.values():
            for key in [key for key, since_s in promised.items() if since_s + SPECULATION_S <= self.now_s]:
                del promised[key]

    @rule(worker_id=FEW_WORKERS)
    def drop(self, worker_id: str) -> None:
        self.index.drop(worker_id)
        self.model.held.pop(worker_id, None)
        self.model.promised.pop(worker_id, None)

    @rule()
    def sweep(self) -> None:
        while self.index.sweep():
            pass
        assert self.index.num_blocks == len({key for _, key in self.model.blocks()})

    @precondition(lambda self: self.index.size_bytes < 1_000_000)
    @rule(worker_id=FEW_WORKERS, seed=st.integers(0, 100))
    def grow(self, worker_id: str, seed: int) -> None:
        """Many blocks come and go: the table is another one afterwards, and half of the time a sweep is under way."""
        many = np.random.default_rng(seed).integers(1 << 40, 1 << 64, 5_000, dtype=np.uint64)
        self.index.add(worker_id, many)
        assert self.index.match(many) == {worker_id: len(many)}
        self.index.sweep()
        self.index.remove(worker_id, many)
        assert self.index.match(many) == {}

    @rule(keys=BLOCKS)
    def match(self, keys: list[int]) -> None:
        assert self.index.match(keys) == self.model.match(keys)

    @invariant()
    def counts(self) -> None:
        assert self.index.num_entries == len(self.model.blocks())
        assert self.index.num_speculated == sum(map(len, self.model.promised.values()))
        assert self.index.match(CROWDED) == self.model.match(CROWDED)


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def _random_keys(count: int, seed: int = 1) -> Keys:
    return np.random.default_rng(seed).integers(1, 1 << 64, count, dtype=np.uint64)


def test_a_hole_ends_a_prefix() -> None:
    index = PrefixIndex()
    index.add("a", [1, 2, 4])
    index.add("b", [1, 2, 3, 4])
    index.add("c", [2, 3, 4])
    assert index.match([1, 2, 3, 4, 5]) == {"a": 2, "b": 4}
    assert index.match([]) == {}
    assert index.match([9, 1]) == {}


def test_a_promise_counts_at_once_and_expires_unless_it_is_kept() -> None:
    index = PrefixIndex(speculation_s=5.0)
    index.speculate("a", [1, 2], 0.0)
    assert index.match([1, 2, 3]) == {"a": 2}
    index.add("a", [1])
    index.expire(4.9)
    assert index.match([1, 2]) == {"a": 2}
    index.expire(5.0)
    assert index.match([1, 2]) == {"a": 1}


def test_a_dispatch_that_failed_takes_back_only_its_own() -> None:
    index = PrefixIndex()
    index.speculate("a", [1, 2, 3], 0.0)
    index.speculate("a", [1, 2], 1.0)
    index.retract("a", [1, 2, 3], 0.0)
    assert index.match([1, 2, 3]) == {"a": 2}
    index.retract("a", [1, 2], 1.0)
    assert index.match([1]) == {}
    index.retract("nobody", [1], 1.0)


def test_what_a_dropped_worker_had_is_gone_at_once_and_its_space_later() -> None:
    index = PrefixIndex()
    keys = _random_keys(100_000)
    index.add("a", keys)
    index.add("b", keys[:10])
    index.drop("a")
    assert index.match(keys) == {"b": 10}
    index.add("a", keys[:5])
    assert index.match(keys) == {"b": 10, "a": 5}
    num_slices = 1
    while index.sweep():
        num_slices += 1
    assert num_slices > 1
    assert index.match(keys) == {"b": 10, "a": 5}
    assert index.num_blocks == 10


def test_a_table_that_grows_amid_a_sweep_is_swept_all() -> None:
    index = PrefixIndex()
    index.add("gone", _random_keys(200_000))
    index.drop("gone")
    assert index.sweep()
    index.add("a", _random_keys(400_000, seed=2))
    while index.sweep():
        pass
    assert index.num_blocks == index.num_entries == 400_000


def test_workers_that_have_nothing_leave_their_bits_to_others() -> None:
    index = PrefixIndex(speculation_s=1.0)
    size_bytes = index.size_bytes
    for i in range(300):
        index.speculate(f"w{i}", [i + 1], float(i))
        index.expire(float(i + 1))
    assert index.size_bytes == size_bytes
    index.add("w0", [1])
    assert index.match([1]) == {"w0": 1}


def test_many_workers_need_more_bits() -> None:
    index = PrefixIndex()
    for i in range(200):
        index.add(f"w{i}", range(1, i + 2))
    assert index.match(range(1, 301)) == {f"w{i}": i + 1 for i in range(200)}


@pytest.mark.parametrize("kind", [list, np.array])
def test_zero_is_no_block(kind: type) -> None:
    index = PrefixIndex()
    index.add("a", kind([0, 1]))
    assert index.match(kind([1, 0])) == {"a": 1}
    assert index.match(kind([0])) == {}
    assert index.num_blocks == 1


def test_a_million_blocks_take_little_memory() -> None:
    table = BlockTable()
    for seed in range(100):
        table.add(_random_keys(10_000, seed), seed % 64)
    assert table.num_blocks == 1_000_000
    assert table.size_bytes / table.num_blocks < 40


def test_keys_that_are_no_hashes_are_lost_and_harm_nobody() -> None:
    index = PrefixIndex()
    same_bucket = [i << 40 for i in range(1, 1_000)]
    index.add("a", same_bucket)
    index.add("b", [5])
    assert 0 < index.num_blocks < 1_000
    assert index.match([5]) == {"b": 1}
    index.remove("a", same_bucket)
    assert index.num_blocks == 1
