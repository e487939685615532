"""Commands find the cluster that `kvrelay up` runs here."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvrelay.cli import app
from kvrelay.launch.state import RunningCluster, default_state_dir, hold
from tests.support.scripted_inference import scripted_inference


@pytest.fixture(autouse=True)
def _state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.fixture
def service_address() -> Iterator[str]:
    """A coordinator that a running `up` knows; its etcd does not answer."""
    with scripted_inference() as service, hold(default_state_dir(os.environ)) as state:
        service.say("ok")
        state.write(
            RunningCluster(
                pid=1,
                http_url="http://localhost:1",
                grpc_address=service.address,
                etcd=("127.0.0.1:1",),
                cluster="mine",
                model="m",
                log_dir="/l",
                run_dir="/r",
            )
        )
        yield service.address


@pytest.mark.usefixtures("service_address")
def test_generate_goes_to_the_running_cluster() -> None:
    assert CliRunner().invoke(app, ["generate", "x"]).stdout == "ok\n"


@pytest.mark.usefixtures("service_address")
def test_workers_asks_the_running_clusters_etcd() -> None:
    assert "no etcd answers at 127.0.0.1:1" in CliRunner().invoke(app, ["workers", "--timeout", "0.1"]).stderr


def test_without_a_running_cluster_etcd_must_be_named() -> None:
    result = CliRunner().invoke(app, ["workers"])
    assert (result.exit_code, "with --etcd HOST:PORT" in result.stderr) == (4, True)


def test_without_a_running_cluster_the_default_port_is_tried() -> None:
    assert "at 127.0.0.1:50051" in CliRunner().invoke(app, ["generate", "x"]).stderr
