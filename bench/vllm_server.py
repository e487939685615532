"""vLLM's own OpenAI server, as a user starts it, on chosen cores."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from bench.token_stream import Server

_START_TIMEOUT_S = 300.0
_POLL_S = 0.5
_END_TIMEOUT_S = 30.0


@contextlib.contextmanager
def vllm_server(model: str, cores: Sequence[int], options: Sequence[str] = ()) -> Iterator[Server]:
    """It serves inside the context and is gone with all its processes after it. Raises `RuntimeError`."""
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="kvrelay-bench-") as scratch:
        environment = {
            **os.environ,
            "TMPDIR": scratch,
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_RPC_BASE_PATH": scratch,
            "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
            "TORCHINDUCTOR_CACHE_DIR": scratch,
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
        log_path = Path(scratch) / "vllm.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [*command, *options], env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_ready(process, url, log_path)
            yield Server(url=url, model="model")
        finally:
            _end(process)


def _wait_ready(process: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").is_success:
                return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_S)
    raise RuntimeError(f"vLLM's server did not start:\n{log_path.read_text()[-4000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C, and then whatever is left of its process group."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
