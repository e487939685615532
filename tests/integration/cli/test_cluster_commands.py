"""`kvrelay coordinator`: flags become a configuration, mistakes become one line."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvrelay.cli import app
from kvrelay.coordinator import main as coordinator
from kvrelay.coordinator.config import CoordinatorConfig
from kvrelay.launch import replicas
from kvrelay.launch.replicas import ReplicasConfig


@pytest.fixture
def listener() -> Iterator[str]:
    """A taken address, at which somebody listens who never speaks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[CoordinatorConfig]:
    """What the processes would have run with; none is run."""
    configs: list[CoordinatorConfig] = []

    def run_coordinator(config: CoordinatorConfig) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr(coordinator, "run_coordinator", run_coordinator)
    monkeypatch.setattr("kvrelay.logs.configure", lambda **_: None)
    return configs


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["coordinator", *arguments])


def test_flags_become_a_configuration(
    listener: str, configs: list[CoordinatorConfig], model: str, tmp_path: Path
) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    result = run(
        *("--etcd", listener, "--cluster", "c", "--coordinator-id", "c1", "--model", model, "--served-model-name", "m"),
        *("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--advertise-host", "h", "--otlp", "http://o:4317"),
        *("--max-model-len", "100", "--trust-remote-code", "--tool-parser", "hermes"),
        *("--chat-template", str(tmp_path / "chat.jinja")),
    )
    assert result.exit_code == 0, result.output
    (config,) = configs
    assert (config.coordinator_id, config.cluster, list(config.etcd)) == ("c1", "c", [listener])
    assert (config.http_listen, config.grpc_listen, config.advertise_host) == ("127.0.0.1:0", "127.0.0.1:0", "h")
    front_end = config.front_end
    assert (front_end.model, front_end.served_model_name, front_end.max_model_len_tokens) == (model, "m", 100)
    assert front_end.engine_args == {"tokenizer": None, "trust_remote_code": True}
    assert (config.serving.chat_template, config.serving.tool_parser) == ("{{ messages }}", "hermes")
    assert config.otlp_endpoint == "http://o:4317"


def test_replicas_are_the_same_command_below_a_process_that_holds_the_ports(
    listener: str, configs: list[CoordinatorConfig], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    above: list[ReplicasConfig] = []

    def run_replicas(config: ReplicasConfig) -> int:
        above.append(config)
        return 3

    monkeypatch.setattr(replicas, "run_replicas", run_replicas)
    words = ["coordinator", "--etcd", listener, "--coordinator-id", "c", "--model", model, "--replicas", "2"]
    monkeypatch.setattr("sys.argv", ["kvrelay", *words])
    assert CliRunner().invoke(app, [*words, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]).exit_code == 3
    (config,) = above
    assert (config.coordinator_id, config.num_replicas, list(config.etcd)) == ("c", 2, [listener])
    assert (config.http_listen, config.grpc_listen) == ("127.0.0.1:0", "127.0.0.1:0")
    assert configs == []

    taken = ["--http", listener, "--grpc", listener, "--coordinator-id", "c-1"]
    result = CliRunner().invoke(app, [*config.arguments, *taken])
    assert result.exit_code == 0, result.output
    assert [(each.coordinator_id, each.shares_ports, each.http_listen) for each in configs] == [("c-1", True, listener)]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--etcd", "127.0.0.1:1"], 4, "no etcd answers"),
        (["--http", "TAKEN"], 2, "cannot listen at --http TAKEN: Address already in use; choose another"),
        (["--model", "/no/such"], 2, "there is no folder /no/such"),
    ],
)
def test_mistakes_are_told_in_one_line(listener: str, arguments: list[str], exit_code: int, message: str) -> None:
    arguments = [word.replace("TAKEN", listener) for word in arguments]
    result = run("--etcd", listener, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", *arguments)
    assert result.exit_code == exit_code
    assert result.stderr.startswith("kvrelay: ")
    assert message.replace("TAKEN", listener) in result.stderr
    assert result.stderr.count("\n") == 1
