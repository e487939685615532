"""Real clusters, started once for all tests that need them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from kvrelay.models import default_cache_dir, resolve_model
from tests.support.live_cluster import LiveCluster, live_cluster
from tests.support.otlp_receiver import OtlpReceiver, otlp_receiver

# Loading vLLM takes half a minute, the referee's answers another one.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session")
def model_path() -> str:
    """The default model, prepared if need be."""
    return resolve_model("", default_cache_dir(dict(os.environ))).path


@pytest.fixture(scope="session")
def reference(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One vLLM engine's answers to every case, in float32. It has ended before any cluster starts."""
    scratch = tmp_path_factory.mktemp("reference")
    target = scratch / "answers.json"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_RPC_BASE_PATH": str(scratch),
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch),
    }
    command = [sys.executable, "-m", "tests.support.reference_engine", model_path, "float32", str(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answers: dict[str, Any] = json.loads(target.read_text())
    return answers


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
