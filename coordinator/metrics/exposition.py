"""What does GET /metrics answer?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector


class Page(NamedTuple):
    body: bytes
    content_type: str


class Exposition:
    """The metrics of one coordinator, and of its process. Has a registry of its own: nothing is global."""

    def __init__(self, collectors: Iterable[Collector] = ()) -> None:
        self._registry = CollectorRegistry()
        for collector in (*collectors, ProcessCollector(registry=None)):
            self._registry.register(collector)

    def page(self, accept: str) -> Page:
        """All of it, in OpenMetrics or Prometheus' text format, as the Accept header prefers."""
        encode, content_type = choose_encoder(accept)
        return Page(encode(self._registry), content_type)
