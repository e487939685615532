"""An etcd in memory for those who write logs of blocks, and what such a log adds up to."""

from __future__ import annotations

from typing import cast

from kvrelay.etcd import EtcdClient, EtcdError
from kvrelay.v1 import cluster_pb2


class PrefixEtcd:
    """`keys` as they are now; `num_calls` counts those that failed, too."""

    def __init__(self) -> None:
        self.keys: dict[bytes, bytes] = {}
        self.error: EtcdError | None = None
        """What every call raises."""
        self.num_calls = 0
        self.puts: list[tuple[bytes, bytes]] = []
        """Those that failed, too."""
        self._followed: dict[int, set[bytes]] = {}

    @property
    def client(self) -> EtcdClient:
        return cast("EtcdClient", self)

    async def put(self, key: bytes, value: bytes, *, lease_id: int = 0) -> int:
        assert f"/{lease_id:x}/".encode() in key
        self.puts.append((key, value))
        self._call()
        if key not in self.keys:
            _apply(value, self._followed.setdefault(lease_id, set()))
        self.keys[key] = value
        return self.num_calls

    async def delete_range(self, first: bytes, end: bytes) -> int:
        self._call()
        gone = [key for key in self.keys if first <= key < end]
        for key in gone:
            del self.keys[key]
        return len(gone)

    def blocks(self, lease_id: int) -> set[bytes]:
        """The first halves of their hashes, as the keys say that are there now."""
        found: set[bytes] = set()
        for key in sorted(self.keys):
            if f"/{lease_id:x}/".encode() in key:
                _apply(self.keys[key], found)
        return found

    def followed(self, lease_id: int) -> set[bytes]:
        """The same for somebody who has seen every delta come."""
        return self._followed.get(lease_id, set())

    def _call(self) -> None:
        self.num_calls += 1
        if self.error is not None:
            raise self.error


def _apply(value: bytes, blocks: set[bytes]) -> None:
    delta = cluster_pb2.PrefixDelta.FromString(value)
    blocks |= set(_halves(delta.added))
    blocks -= set(_halves(delta.removed))


def _halves(packed: bytes) -> list[bytes]:
    return [packed[start : start + 8] for start in range(0, len(packed), 8)]
