"""Real clusters, started once for all tests that need them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from kvrelay.models import default_cache_dir, resolve_model
from tests.support.live_cluster import LiveCluster, live_cluster
from tests.support.otlp_receiver import OtlpReceiver, otlp_receiver
from tests.support.reference_engine import reference_answers

# Loading vLLM takes half a minute, the referee's answers another one.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session")
def model_path() -> str:
    """The default model, prepared if need be."""
    return resolve_model("", default_cache_dir(dict(os.environ))).path


@pytest.fixture(scope="session")
def reference(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One vLLM engine's answers to every case, in float32. It has ended before any cluster starts."""
    return reference_answers(model_path, "all", tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def float32_cluster(reference: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    """One prefill and one decode worker in float32: token for token comparable."""
    home = tmp_path_factory.mktemp("float32")
    with live_cluster(home, engine_options=("--dtype", "float32", "--max-model-len", "4096")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def otlp() -> Iterator[OtlpReceiver]:
    """Where the traced cluster's spans go."""
    with otlp_receiver() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def default_cluster(otlp: OtlpReceiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    """What `make up` starts, with tracing."""
    with live_cluster(tmp_path_factory.mktemp("default"), "--otlp", otlp.endpoint) as cluster:
        yield cluster
