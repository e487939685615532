"""`kvrelay prefill-worker` and `decode-worker`: flags become a configuration, mistakes become one line."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvrelay.cli import app
from kvrelay.launch import worker
from kvrelay.launch.engines import EngineOptionsError
from kvrelay.launch.worker import WorkerConfig
from kvrelay.v1 import cluster_pb2


@pytest.fixture
def etcd() -> Iterator[str]:
    """Somebody listens; nobody speaks to it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[WorkerConfig]:
    """What the processes would have run with; none is run."""
    configs: list[WorkerConfig] = []

    def run_worker(config: WorkerConfig) -> int:
        configs.append(config)
        return 3 if config.worker_id == "dead" else 0

    monkeypatch.setattr(worker, "run_worker", run_worker)
    return configs


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_flags_become_a_configuration(etcd: str, configs: list[WorkerConfig]) -> None:
    result = run(
        *("decode-worker", "--etcd", f"{etcd},other:2379", "--cluster", "c", "--worker-id", "d1"),
        *("--weight", "2.5", "--heartbeat-timeout-s", "3", "--engine-stuck-s", "20", "--health-interval-s", "5"),
        *("--engine", "simulated", "--model", "/m/tiny", "--kv-host-bytes", "1GiB", "--listen", "127.0.0.1:0"),
        *(
            "--advertise",
            "host:7",
            "--kv-listen",
            ":0",
            "--kv-advertise",
            "nat:9",
            "--otlp",
            "http://o:4317",
            "--log-format",
            "json",
            "--log-level",
            "warning",
        ),
        *("--", "--vocab-size", "10"),
    )
    assert result.exit_code == 0, result.output
    (config,) = configs
    assert (config.role, config.worker_id, config.cluster) == (cluster_pb2.ROLE_DECODE, "d1", "c")
    assert list(config.etcd) == [etcd, "other:2379"]
    assert config.weight == 2.5
    assert (config.heartbeat.timeout_s, config.watch.stuck_s, config.watch.health_interval_s) == (3.0, 20.0, 5.0)
    assert (config.listen, config.advertise) == ("127.0.0.1:0", "host:7")
    assert (config.kv_listen, config.kv_advertise) == ("0.0.0.0:0", "nat:9")
    assert (config.engine.kind, config.engine.served_model_name) == ("simulated", "tiny")
    assert list(config.engine.options) == ["--vocab-size", "10"]
    assert config.store.size_bytes == 1 << 30
    assert (config.otlp_endpoint, config.log_format, config.log_level) == ("http://o:4317", "json", "warning")


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "much"])
def test_what_is_no_weight(etcd: str, configs: list[WorkerConfig], weight: str) -> None:
    result = run("decode-worker", "--etcd", etcd, "--engine", "simulated", "--weight", weight)
    assert result.exit_code == 2
    assert "no weight" in result.output
    assert not configs


def test_room_on_disk(etcd: str, configs: list[WorkerConfig], tmp_path: Path) -> None:
    arguments = ["decode-worker", "--etcd", etcd, "--engine", "simulated", "--kv-disk-path", str(tmp_path)]
    assert run(*arguments, "--kv-disk-bytes", "1MiB").exit_code == 0
    (config,) = configs
    assert (config.store.disk_bytes, config.store.disk_path) == (1 << 20, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_defaults(etcd: str, configs: list[WorkerConfig], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert run("prefill-worker", "--etcd", etcd, "--model", str(tmp_path)).exit_code == 0
    (config,) = configs
    assert config.role == cluster_pb2.ROLE_PREFILL
    assert config.worker_id.startswith("prefill-")
    assert (config.engine.kind, config.engine.model) == ("vllm", str(tmp_path))
    assert config.engine.served_model_name == tmp_path.name
    assert (config.advertise, config.kv_listen, config.kv_advertise, config.otlp_endpoint) == (None,) * 4
    assert (config.store.disk_bytes, config.store.disk_path) == (0, Path("/var/tmp"))


def test_the_exit_code_of_the_process_is_passed_on(etcd: str, configs: list[WorkerConfig]) -> None:
    assert run("decode-worker", "--etcd", etcd, "--engine", "simulated", "--worker-id", "dead").exit_code == 3


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--model", "/no/such/folder"], 2, "there is no folder /no/such/folder"),
        (["--listen", "192.0.2.1:1"], 2, "cannot listen at --listen 192.0.2.1:1"),
        (["--listen", ":0"], 2, "say with --advertise HOST:PORT"),
        (["--advertise", "host:0"], 2, "needs the port that others dial"),
        (["--kv-advertise", "host:0"], 2, "--kv-advertise host:0 needs the port that others dial"),
        (["--otlp", "localhost"], 2, "is not the URL of an OTLP receiver"),
        (["--kv-disk-bytes", "900T"], 2, "--kv-disk-path: /var/tmp has"),
        (["--kv-disk-bytes", "1", "--kv-disk-path", "/no/such"], 2, "/no/such cannot hold KV blocks: No such file"),
        (["--etcd", "127.0.0.1:1"], 4, "no etcd answers (127.0.0.1:1: Connection refused)"),
    ],
)
def test_mistakes_are_told_in_one_line(etcd: str, arguments: list[str], exit_code: int, message: str) -> None:
    result = run("prefill-worker", "--etcd", etcd, *arguments)
    assert result.exit_code == exit_code
    assert message in result.stderr
    assert result.stderr.startswith("kvrelay: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float32"], "options of the engine follow after --"),
        (["float32"], "is one word too many"),
        (["--kv-host-bytes", "lots"], "is not a size"),
        (["--listen", "x"], "is not an address"),
    ],
)
def test_wrong_usage_says_what_is_right(etcd: str, arguments: list[str], message: str) -> None:
    result = run("prefill-worker", "--etcd", etcd, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", "").split())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EngineOptionsError("it does not take --x"), "it does not take --x; options of the engine follow after --"),
        (ExceptionGroup("tasks", [ValueError("raise --kv-host-bytes")]), "raise --kv-host-bytes (--log-level debug"),
    ],
)
def test_what_stops_a_process_is_told_in_one_line(
    etcd: str, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def run_worker(_config: WorkerConfig) -> int:
        raise error

    monkeypatch.setattr(worker, "run_worker", run_worker)
    arguments = ["prefill-worker", "--etcd", etcd, "--engine", "simulated"]
    result = run(*arguments)
    assert result.stderr.startswith(f"kvrelay: {message}")
    assert run(*arguments, "--log-level", "debug").exception is error
