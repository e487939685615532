"""deploy/launch/ssh.sh against a real sshd: two loopback addresses are two machines, the engines are simulated."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kvrelay.client.workers import WorkerRow, collect_workers
from tests.support.ssh_launch import make_launch, processes_with
from tests.support.sshd import find_sshd, free_port, free_port_pair, sshd

SSHD = find_sshd()
pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(SSHD is None, reason="there is no sshd; install openssh-server"),
]
FIRST, SECOND = "127.0.0.1", "127.0.0.2"
ENGINE = "--engine simulated --served-model-name m --kv-host-bytes 64MiB"
MANY_TOKENS = "All happy families are alike; each unhappy family is unhappy in its own way. " * 12


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What ssh.sh needs to reach the sshd; at the end, that nothing of the cluster is left but logs."""
    (tmp_path / "ssh").mkdir(mode=0o700)
    mark = f"KVRELAY_TEST={tmp_path}"
    assert SSHD is not None
    with sshd(SSHD, tmp_path / "ssh", [FIRST, SECOND]) as ssh_config:
        yield {
            "KVRELAY_RUN_DIR": str(tmp_path / "run"),
            "KVRELAY_SSH_OPTIONS": f"-F {ssh_config}",
            "KVRELAY_SETTINGS": mark,
            "KVRELAY_CLUSTER": "over-ssh",
        }
    assert not processes_with(mark)
    assert {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()} <= {"log", "log.1"}


def workers(etcd: str) -> list[WorkerRow]:
    return asyncio.run(collect_workers([etcd], "over-ssh", 5.0))


def test_a_cluster_on_two_machines(tmp_path: Path, settings: dict[str, str]) -> None:
    etcd, http, grpc = (free_port() for _ in range(3))
    prefill, decode = free_port_pair(), free_port_pair()
    launch = make_launch(
        tmp_path,
        f"# host role devices model options\n"
        f"{FIRST} etcd - - --advertise-client-urls http://{FIRST}:{etcd}\n"
        f"{FIRST} coordinator - - --served-model-name m --http {FIRST}:{http} --grpc {FIRST}:{grpc}"
        f" --local-prefill never\n"
        f"{FIRST} prefill cpu:0 - {ENGINE} --listen {FIRST}:{prefill}\n"
        f"{SECOND} decode cpu:1 - {ENGINE} --listen {SECOND}:{decode}\n",
        **settings,
    )
    try:
        started = launch("start")
        assert started.returncode == 0, started.stderr
        assert f"OpenAI API  http://{FIRST}:{http}/v1" in started.stdout

        body = {"model": "m", "prompt": MANY_TOKENS, "max_tokens": 5, "temperature": 0}
        answer = httpx.post(f"http://{FIRST}:{http}/v1/completions", json=body, timeout=60.0)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 5

        rows = workers(f"{FIRST}:{etcd}")
        assert [row.address for row in rows] == [f"{FIRST}:{prefill}", f"{SECOND}:{decode}"]
        assert all(row.num_cached_slots for row in rows), "the blocks went from one machine to the other"

        again = launch("start")
        assert again.returncode == 1
        assert "line 5 (decode-0 on 127.0.0.2): it runs already" in again.stderr

        status = launch("status")
        assert status.returncode == 0
        assert re.findall(r"(\w+-0) .* running +\d+", status.stdout) == [
            "etcd-0",
            "coordinator-0",
            "prefill-0",
            "decode-0",
        ]
        assert f"address={SECOND}:{decode}" in launch("logs", "decode-0").stdout
        assert launch("logs", "-n", "1", "4").stdout.count("\n") == 1
        with launch.running("logs", "-f", "-n", "1", "decode-0") as following:
            assert following.stdout is not None
            assert following.stdout.readline().startswith("decode-0: ")
            following.terminate()
            assert following.wait(timeout=20) == 130
        scratch = [Path(path.read_text().split()[3]) for path in tmp_path.glob("run/*/pid")]
        assert all(directory.is_dir() for directory in scratch)
    finally:
        stopped = launch("stop")
    assert stopped.returncode == 0, stopped.stderr
    names = [line.split()[0] for line in stopped.stdout.splitlines()]
    assert set(names[:2]) == {"prefill-0", "decode-0"}
    assert names[2:] == ["coordinator-0", "etcd-0"]
    assert all(line.endswith(" stopped") for line in stopped.stdout.splitlines())
    assert launch("status").returncode == 3
    assert len(scratch) == 4
    assert not any(directory.exists() for directory in scratch)


def test_a_start_that_fails_is_undone(tmp_path: Path, settings: dict[str, str]) -> None:
    etcd, decode = free_port(), free_port_pair()
    launch = make_launch(
        tmp_path,
        f"{FIRST} etcd - - --advertise-client-urls http://{FIRST}:{etcd}\n"
        f"{SECOND} decode - - {ENGINE} --listen {SECOND}:{decode} -- --no-such 1\n",
        **settings,
    )
    result = launch("start")
    assert result.returncode == 1
    assert "line 2 (decode-0 on 127.0.0.2): it ended" in result.stderr
    assert "the simulated engine does not take --no-such" in result.stderr
    assert "stopped" in launch("status").stdout


def test_machines_that_cannot_run_it_are_told_before_anything_starts(tmp_path: Path, settings: dict[str, str]) -> None:
    hostfile = f"{FIRST} etcd\n{SECOND} decode\n127.0.0.3 decode\n"
    launch = make_launch(tmp_path, hostfile, **settings | {"KVRELAY_COMMAND": "/no/such/kvrelay"})
    result = launch("start")
    assert result.returncode == 1
    assert "line 2 (decode-0 on 127.0.0.2): there is no /no/such/kvrelay; run make setup there" in result.stderr
    assert "line 3 (decode-1 on 127.0.0.3): no ssh connection; try: ssh" in result.stderr
    assert "nothing was started" in result.stderr
