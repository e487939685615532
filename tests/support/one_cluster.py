"""One real cluster at a time: each takes some 8 GB of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

from tests.support.live_cluster import LiveCluster


class OneCluster:
    """Keeps a cluster for the tests that follow, until another one or the whole memory is needed."""

    def __init__(self) -> None:
        self._name = ""
        self._open = contextlib.ExitStack()
        self._cluster: LiveCluster | None = None

    def get(self, name: str, start: Callable[[], AbstractContextManager[LiveCluster]]) -> LiveCluster:
        """The cluster of this name; started, after the end of any other, when it is not the one that runs."""
        if self._cluster is None or self._name != name:
            self.end()
            self._cluster = self._open.enter_context(start())
            self._name = name
        return self._cluster

    def end(self) -> None:
        """Raises what the end of the cluster raises: it checks that nothing is left."""
        self._cluster = None
        self._open.close()
