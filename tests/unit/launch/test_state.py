"""One `up` at a time, and others can find it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvrelay.launch.state import AlreadyRunningError, RunningCluster, default_state_dir, hold, running_cluster

CLUSTER = RunningCluster(
    pid=7,
    http_url="http://127.0.0.1:8000",
    grpc_address="127.0.0.1:8001",
    etcd=("127.0.0.1:2379",),
    cluster="default",
    model="m",
    log_dir="/l",
    run_dir="/r",
)


def test_is_found_while_it_runs(tmp_path: Path) -> None:
    assert running_cluster(tmp_path) is None
    with hold(tmp_path) as state:
        assert running_cluster(tmp_path) is None
        state.write(CLUSTER)
        assert running_cluster(tmp_path) == CLUSTER
    assert running_cluster(tmp_path) is None


def test_a_second_one_learns_where_the_first_is(tmp_path: Path) -> None:
    with hold(tmp_path) as state:
        state.write(CLUSTER)
        with pytest.raises(AlreadyRunningError, match=r"at http://127\.0\.0\.1:8000 \(process 7\)"), hold(tmp_path):
            pass
    with hold(tmp_path) as state:
        assert state.previous is None


def test_a_failed_one_leaves_its_state_to_the_next(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="failed"):
        _fail(tmp_path)
    assert running_cluster(tmp_path) is None
    with hold(tmp_path) as state:
        assert state.previous == CLUSTER


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"etcd": []}'])
def test_an_unreadable_state_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "up.json").write_text(content)
    with hold(tmp_path) as state:
        assert state.previous is None


def test_the_directory_follows_the_environment() -> None:
    assert default_state_dir({"XDG_STATE_HOME": "/s", "HOME": "/h"}) == Path("/s/kvrelay")
    assert default_state_dir({"HOME": "/h"}) == Path("/h/.local/state/kvrelay")


def _fail(state_dir: Path) -> None:
    with hold(state_dir) as state:
        state.write(CLUSTER)
        raise RuntimeError("failed")
