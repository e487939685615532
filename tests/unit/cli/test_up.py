"""`kvrelay up`: flags become a configuration, mistakes become one line."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvrelay.cli import app
from kvrelay.etcd.server import EtcdServerError
from kvrelay.launch import up
from kvrelay.launch.plan import UpConfig
from kvrelay.launch.state import RunningCluster, hold


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "kvrelay"


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[UpConfig]:
    """What would have run; nothing is run."""
    configs: list[UpConfig] = []

    def run_up(config: UpConfig) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr(up, "run_up", run_up)
    return configs


@pytest.fixture
def listener() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["up", "--engine", "simulated", "--grpc", "127.0.0.1:0", *arguments])


def test_flags_become_a_configuration(configs: list[UpConfig], listener: str, state_dir: Path) -> None:
    result = run(
        *("--prefill", "2", "--decode", "3", "--model", "/m/tiny", "--etcd", listener, "--http", "127.0.0.1:0"),
        *("--kv-host-bytes", "1GiB", "--kv-disk-bytes", "1KiB", "--kv-disk-path", str(state_dir.parent)),
        *("--kv-transport", "grpc", "--kv-cache-gib", "2", "--policy", "prefix-only"),
        *("--max-queued-requests", "7", "--heartbeat-timeout-s", "3", "--engine-stuck-s", "20"),
        *("--coordinator-args", "--max-plans 2"),
        *("--", "--vocab-size", "10"),
    )
    assert result.exit_code == 0, result.output
    (config,) = configs
    assert (config.prefill, config.decode, list(config.etcd)) == (2, 3, [listener])
    assert (config.engine, config.served_model_name, list(config.engine_options)) == (
        "simulated",
        "tiny",
        ["--vocab-size", "10"],
    )
    assert (config.kv_host_bytes, config.kv_cache_gib, config.kv_transport) == (1 << 30, 2, "grpc")
    assert (config.kv_disk_bytes, config.kv_disk_path) == (1 << 10, state_dir.parent)
    assert (config.http, config.grpc, config.state_dir) == ("127.0.0.1:0", "127.0.0.1:0", state_dir)
    assert list(config.coordinator_options) == [
        *("--policy", "prefix-only", "--local-prefill", "when-cheaper"),
        *("--max-queued-requests", "7", "--max-queued-tokens", "8000000", "--dispatch-ahead-s", "0.25"),
        *("--heartbeat-timeout-s", "3.0", "--max-plans", "2"),
    ]
    assert list(config.worker_options) == [
        *("--heartbeat-timeout-s", "3.0", "--engine-stuck-s", "20.0", "--health-interval-s", "30.0")
    ]
    assert config.environment["XDG_STATE_HOME"] == str(state_dir.parent)


def test_each_role_has_engine_options_of_its_own(configs: list[UpConfig]) -> None:
    own = ("--prefill-args", "--latency-ms '2'", "--decode-args=--latency-ms 3", "--http", "127.0.0.1:0")
    assert run(*own, "--", "--vocab-size", "10").exit_code == 0
    assert run("--http", "127.0.0.1:0").exit_code == 0
    assert [list(config.engine_options) for config in configs] == [["--vocab-size", "10"], []]
    assert [list(config.prefill_options) for config in configs] == [["--latency-ms", "2"], []]
    assert [list(config.decode_options) for config in configs] == [["--latency-ms", "3"], []]


def test_a_taken_port_is_told_in_one_line(configs: list[UpConfig], listener: str) -> None:
    result = run("--http", listener)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"kvrelay: cannot listen at --http {listener}: Address already in use")
    assert configs == []


def test_the_cluster_that_runs_already_is_left_to_tell_so(
    configs: list[UpConfig], listener: str, state_dir: Path
) -> None:
    with hold(state_dir) as state:
        state.write(
            RunningCluster(
                pid=1,
                http_url=f"http://{listener}",
                grpc_address=listener,
                etcd=(),
                cluster="default",
                model="m",
                log_dir="",
                run_dir="",
            )
        )
        assert run("--http", listener).exit_code == 0
    assert len(configs) == 1


def test_no_etcd_to_start_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_up(_config: UpConfig) -> int:
        raise EtcdServerError("there is no etcd on this machine")

    monkeypatch.setattr(up, "run_up", run_up)
    result = run("--http", "127.0.0.1:0")
    assert (result.exit_code, result.stderr) == (1, "kvrelay: there is no etcd on this machine\n")
