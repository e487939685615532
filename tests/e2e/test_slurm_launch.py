"""deploy/launch/slurm.sbatch as a job of one node, with an srun that runs everything here and simulated engines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support import slurm
from tests.support.ssh_launch import ROOT, processes_with
from tests.support.sshd import free_port, free_port_pair

pytestmark = pytest.mark.timeout(300)


@contextmanager
def job(directory: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The job's script; at the end, that nothing of it is left but logs."""
    (directory / "bin").mkdir()
    slurm.install(directory / "bin")
    (directory / "checkout/.venv").mkdir(parents=True)
    (directory / "checkout/.venv/bin").symlink_to(Path(sys.executable).parent)
    (directory / "tmp").mkdir()
    mark = f"KVRELAY_TEST={directory}"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("KVRELAY_")},
        "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
        "TMPDIR": str(directory / "tmp"),
        "KVRELAY_TEST": str(directory),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": slurm.NODE,
        "KVRELAY_DIR": str(directory / "checkout"),
        "LOG_DIR": str(directory / "logs"),
        "WORKER_OPTIONS": "--engine simulated --served-model-name m --kv-host-bytes 64MiB",
        "COORDINATOR_OPTIONS": "--served-model-name m",
        **{name: str(free_port()) for name in ("HTTP_PORT", "GRPC_PORT", "ETCD_PORT")},
        **{name: str(free_port_pair()) for name in ("PREFILL_PORT", "DECODE_PORT")},
        **variables,
    }
    process = subprocess.Popen(
        [ROOT / "deploy/launch/slurm.sbatch"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert not processes_with(mark)
    assert not [path for path in (directory / "tmp").iterdir() if not path.name.startswith("torchinductor")]


def lines_until(process: subprocess.Popen[str], start: str) -> list[str]:
    """What the job prints, up to a line that begins so."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if lines[-1].startswith(start):
            return lines
    raise AssertionError("\n".join(lines))


def test_a_job_serves_and_ends_cleanly_when_it_is_cancelled(tmp_path: Path) -> None:
    with job(tmp_path) as process:
        *_, api = lines_until(process, "OpenAI API")
        body = {"model": "m", "prompt": "Once upon a time", "max_tokens": 4}
        answer = httpx.post(f"{api.split()[-1]}/completions", json=body, timeout=60.0)
        assert answer.status_code == 200, answer.text
        assert {path.name for path in (tmp_path / "logs").iterdir()} == {
            f"{name}-0.log" for name in ("etcd", "coordinator", "prefill", "decode")
        }
        process.send_signal(signal.SIGTERM)
        lines_until(process, "kvrelay: stopped")
        assert process.wait(timeout=10) == 0


def test_a_job_whose_worker_cannot_start_fails_and_says_where_to_look(tmp_path: Path) -> None:
    with job(tmp_path, PREFILL="0", ENGINE_OPTIONS="--no-such 1") as process:
        *_, reason, _ = lines_until(process, "kvrelay: stopped")
        assert f"decode ended; see {tmp_path}/logs/decode-*.log" in reason
        assert process.wait(timeout=10) == 1
    assert "does not take --no-such" in (tmp_path / "logs/decode-0.log").read_text()
