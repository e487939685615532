"""What deploy/launch/remote.sh does on a machine: processes are started and ended, and strangers are left alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.ssh_launch import ROOT, processes_with

STUBBORN = """#!/usr/bin/env bash
trap '' TERM
sleep 300 &
echo "ready: $*"
wait
"""


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """Does not end by SIGTERM, and has a child that does not either."""
    path = tmp_path / "kvrelay"
    path.write_text(STUBBORN)
    path.chmod(0o755)
    return path


def remote(*call: str | Path) -> subprocess.CompletedProcess[str]:
    """One function of the file, in a shell of its own as over ssh."""
    script = f'source "{ROOT}/deploy/launch/remote.sh"; "$@"'
    return subprocess.run(
        ["bash", "-c", script, "bash", *map(str, call)], capture_output=True, text=True, timeout=30, check=False
    )


def started(command: Path, directory: Path, mark: str) -> list[str]:
    """Start it; the fields of its pid file once it has spoken."""
    result = remote("start", command, directory, mark, "--", "@kvrelay", "a b", "@dir/x")
    assert result.returncode == 0, result.stdout + result.stderr
    with subprocess.Popen(["tail", "-F", directory / "log"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as tail:
        assert tail.stdout is not None
        assert tail.stdout.readline().decode() == f"ready: a b {directory}/x\n"
        tail.terminate()
    return (directory / "pid").read_text().split()


def test_what_ignores_the_signal_is_killed_with_its_children(tmp_path: Path, command: Path) -> None:
    directory, mark = tmp_path / "run", f"KVRELAY_TEST={tmp_path}"
    *_, scratch = started(command, directory, mark)
    assert remote("status", directory).stdout.startswith("running ")
    assert remote("last_words", directory).returncode == 1
    assert "runs already" in remote("check", command, directory, "@kvrelay").stdout
    assert len(processes_with(mark)) == 2
    assert remote("stop", directory, "0").stdout == "killed after 0 s\n"
    assert not processes_with(mark)
    assert not Path(scratch).exists()
    assert [path.name for path in directory.iterdir()] == ["log"]
    assert remote("stop", directory, "0").stdout == "was not running\n"


def test_children_of_a_process_that_was_killed_are_ended(tmp_path: Path, command: Path) -> None:
    directory, mark = tmp_path / "run", f"KVRELAY_TEST={tmp_path}"
    pid, *_ = started(command, directory, mark)
    subprocess.run(["kill", "-KILL", pid], check=True)
    assert remote("await", directory, "5", "127.0.0.1:1", "/health").returncode == 1
    assert remote("status", directory).stdout == "died\n"
    assert remote("stop", directory, "5").stdout == "was not running\n"
    assert not processes_with(mark)


def test_another_process_with_the_same_number_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "300"], start_new_session=True) as stranger:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        (tmp_path / "pid").write_text(f"{stranger.pid} 1 {boot} -\n")
        assert remote("status", tmp_path).stdout == "died\n"
        assert remote("stop", tmp_path, "0").stdout == "was not running\n"
        assert stranger.poll() is None
        stranger.kill()


def test_what_earlier_hostfiles_started_is_found(tmp_path: Path, command: Path) -> None:
    mark = f"KVRELAY_TEST={tmp_path}"
    started(command, tmp_path / "run/decode-3@h", mark)
    assert remote("stop_others", tmp_path / "run", "h", "0").stdout == "decode-3@h: killed after 0 s\n"
    assert not processes_with(mark)
