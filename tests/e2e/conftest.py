"""Real clusters, one at a time, started once for all tests that need them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.default_model import default_model_path
from tests.support.live_cluster import LiveCluster, live_cluster
from tests.support.one_cluster import OneCluster
from tests.support.otlp_receiver import OtlpReceiver, otlp_receiver
from tests.support.reference_engine import reference_answers

# Loading vLLM takes half a minute, the referee's answers another one.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session")
def model_path() -> str:
    return default_model_path()


@pytest.fixture(scope="session")
def one_cluster() -> Iterator[OneCluster]:
    """Where the clusters come from that several tests use."""
    one = OneCluster()
    yield one
    one.end()


@pytest.fixture(scope="module")
def no_cluster(one_cluster: OneCluster) -> None:
    """For tests that start engines of their own."""
    one_cluster.end()


@pytest.fixture(scope="session")
def reference(one_cluster: OneCluster, model_path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One vLLM engine's answers to every case, in float32. No cluster runs beside it."""
    one_cluster.end()
    return reference_answers(model_path, "all", tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def float32_cluster(
    one_cluster: OneCluster, reference: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> LiveCluster:
    """One prefill and one decode worker in float32: token for token comparable."""
    options = ("--dtype", "float32", "--max-model-len", "4096")
    return one_cluster.get("float32", lambda: live_cluster(tmp_path_factory.mktemp("float32"), engine_options=options))


@pytest.fixture(scope="session")
def otlp() -> Iterator[OtlpReceiver]:
    """Where the traced cluster's spans go."""
    with otlp_receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def default_cluster(
    one_cluster: OneCluster, otlp: OtlpReceiver, tmp_path_factory: pytest.TempPathFactory
) -> LiveCluster:
    """What `make up` starts, with tracing."""
    return one_cluster.get("default", lambda: live_cluster(tmp_path_factory.mktemp("default"), "--otlp", otlp.endpoint))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one cluster follow each other, so that it is started once. All other tests come before."""
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    if Path(__file__).parent not in item.path.parents:
        return 0
    fixtures = getattr(item, "fixturenames", ())
    clusters = ("default_cluster", "float32_cluster")
    return next((turn for turn, name in enumerate(clusters, 1) if name in fixtures), len(clusters) + 1)
