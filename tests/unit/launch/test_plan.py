"""The command lines of a cluster's processes."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from kvrelay.kv_transfer.transport import KvTransport
from kvrelay.launch.announcement import announcement, curl_line
from kvrelay.launch.devices import Devices
from kvrelay.launch.display import how_ended
from kvrelay.launch.places import Places, new_log_dir, with_port
from kvrelay.launch.plan import UpConfig, cluster_specs, coordinator_id, etcd_spec, member_ids, worker_ids
from kvrelay.launch.supervisor import ChildSpec

CONFIG = UpConfig(
    prefill=1,
    decode=2,
    model="owner/name",
    served_model_name="name",
    engine_options=["--dtype", "float32"],
    state_dir=Path("/state"),
    environment={"HOME": "/h", "TMPDIR": "/elsewhere", "MALLOC_TOP_PAD_": "1"},
)
PLACES = Places(
    etcd=["127.0.0.1:1", "127.0.0.1:2"],
    http="0.0.0.0:8000",
    grpc="127.0.0.1:8001",
    log_dir=Path("/logs"),
    run_dir=Path("/run"),
)


def _specs(config: UpConfig = CONFIG) -> dict[str, ChildSpec]:
    return {spec.name: spec for spec in cluster_specs(config, PLACES, Devices([0, 1]))}


def test_one_coordinator_and_all_workers() -> None:
    specs = _specs()
    assert list(specs) == ["coordinator", "prefill-0", "decode-0", "decode-1"]
    assert [spec.arguments[3] for spec in specs.values()] == [
        "coordinator",
        "prefill-worker",
        "decode-worker",
        "decode-worker",
    ]
    assert all(spec.log_path == Path(f"/logs/{name}.log") for name, spec in specs.items())


def test_all_are_told_of_the_same_cluster_and_model() -> None:
    for spec in _specs().values():
        words = shlex.join(spec.arguments)
        assert "--etcd 127.0.0.1:1,127.0.0.1:2 --cluster default --model owner/name --served-model-name name" in words


def test_engine_options_go_to_the_workers_behind_everything_else() -> None:
    specs = _specs()
    assert list(specs["decode-1"].arguments[-3:]) == ["--", "--dtype", "float32"]
    assert "--" not in specs["coordinator"].arguments


def test_each_role_has_options_of_its_own_after_the_common_ones() -> None:
    config = dataclasses.replace(CONFIG, prefill_options=["-tp", "2"], decode_options=["--max-num-seqs", "8"])
    specs = _specs(config)
    assert list(specs["prefill-0"].arguments[-5:]) == ["--", "--dtype", "float32", "-tp", "2"]
    assert list(specs["decode-1"].arguments[-5:]) == ["--", "--dtype", "float32", "--max-num-seqs", "8"]
    assert [specs[name].environment["VLLM_CPU_OMP_THREADS_BIND"] for name in worker_ids(config)] == ["0|1", "0", "1"]


def test_workers_are_told_of_room_on_disk_where_there_is_any() -> None:
    assert not any("--kv-disk" in shlex.join(spec.arguments) for spec in _specs().values())
    specs = _specs(dataclasses.replace(CONFIG, kv_disk_bytes=1 << 30, kv_disk_path=Path("/ssd")))
    with_disk = [name for name, spec in specs.items() if "--kv-disk-bytes" in spec.arguments]
    assert with_disk == ["prefill-0", "decode-0", "decode-1"]
    assert f"--kv-disk-bytes {1 << 30} --kv-disk-path /ssd -- --dtype" in shlex.join(specs["decode-1"].arguments)


def test_workers_are_told_of_a_transport_that_is_chosen() -> None:
    assert not any("--kv-transport" in spec.arguments for spec in _specs().values())
    specs = _specs(dataclasses.replace(CONFIG, kv_transport=KvTransport.COLLECTIVE))
    told = [name for name, spec in specs.items() if "--kv-transport collective" in shlex.join(spec.arguments)]
    assert told == ["prefill-0", "decode-0", "decode-1"]


def test_workers_have_options_of_their_own_before_those_of_the_engine() -> None:
    specs = _specs(dataclasses.replace(CONFIG, worker_options=["--engine-stuck-s", "20"]))
    told = [name for name, spec in specs.items() if "--engine-stuck-s 20 -- --dtype" in shlex.join(spec.arguments)]
    assert told == ["prefill-0", "decode-0", "decode-1"]


def test_the_coordinator_hears_of_engine_options_that_concern_it() -> None:
    options = ["--dtype=float32", "--max-model-len=4096", "--trust-remote-code", "--tokenizer", "t"]
    config = dataclasses.replace(CONFIG, engine_options=options, coordinator_options=["--tool-parser", "hermes"])
    words = shlex.join(_specs(config)["coordinator"].arguments)
    assert words.endswith("--max-model-len 4096 --trust-remote-code --tokenizer t --tool-parser hermes")


def test_temporary_files_stay_in_the_runs_directory() -> None:
    for spec in [*_specs().values(), etcd_spec(["etcd"], CONFIG, PLACES)]:
        assert spec.environment["TMPDIR"] == "/run"
        assert spec.environment["VLLM_RPC_BASE_PATH"] == "/run"
        assert spec.environment["HOME"] == "/h"


def test_the_users_settings_win_over_defaults() -> None:
    environment = _specs()["prefill-0"].environment
    assert environment["MALLOC_TOP_PAD_"] == "1"
    assert environment["MALLOC_TRIM_THRESHOLD_"] == "2147483648"


def test_no_hub_is_asked_for_a_local_model(tmp_path: Path) -> None:
    local = dataclasses.replace(CONFIG, model=str(tmp_path))
    assert _specs(local)["decode-0"].environment["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in _specs()["decode-0"].environment


def test_etcd_ends_last() -> None:
    assert etcd_spec(["etcd"], CONFIG, PLACES).stage < min(spec.stage for spec in _specs().values())


def test_in_a_shared_etcd_ids_carry_the_hosts_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "box.example")
    shared = dataclasses.replace(CONFIG, etcd=["10.0.0.1:2379"])
    assert worker_ids(shared) == ["prefill-0-box", "decode-0-box", "decode-1-box"]
    assert coordinator_id(shared) == "coordinator-box"


def test_a_coordinator_with_replicas_is_one_child_and_several_members() -> None:
    config = dataclasses.replace(CONFIG, replicas=3)
    assert "--coordinator-id coordinator --replicas 3" in shlex.join(_specs(config)["coordinator"].arguments)
    assert member_ids("coordinator", config) == ["coordinator-0", "coordinator-1", "coordinator-2"]
    assert member_ids("decode-0", config) == ["decode-0"]
    assert "--replicas" not in _specs()["coordinator"].arguments
    assert member_ids("coordinator", CONFIG) == ["coordinator"]


def test_addresses_as_this_machine_dials_them() -> None:
    assert PLACES.http_url == "http://127.0.0.1:8000"
    assert PLACES.http_url_at(7) == "http://127.0.0.1:7"
    assert dataclasses.replace(PLACES, grpc="[::]:9").grpc_address == "[::1]:9"


def test_port_zero_becomes_a_free_one() -> None:
    assert with_port("127.0.0.1:80") == "127.0.0.1:80"
    host, _, port = with_port("127.0.0.1:0").rpartition(":")
    assert 16384 <= int(port) < 32768, "none that an outgoing connection may get"
    assert (host, int(port) > 0) == ("127.0.0.1", True)


def test_old_logs_go(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / "logs" / f"2020{number:04}").mkdir(parents=True)
    log_dir = new_log_dir(tmp_path)
    kept = sorted((tmp_path / "logs").iterdir())
    assert (len(kept), kept[-1]) == (20, log_dir)


def test_the_curl_line_is_one_command_for_any_model_name() -> None:
    words = shlex.split(curl_line("http://127.0.0.1:8000", 'it\'s "odd"'))
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == 'it\'s "odd"'


def test_says_where_everything_is() -> None:
    text = "\n".join(announcement(CONFIG, PLACES, 31.4))
    for part in ("Ready after 31 s: name", "http://127.0.0.1:8000/v1", "127.0.0.1:8001", "kvrelay chat", "/logs"):
        assert part in text


@pytest.mark.parametrize(("status", "words"), [(3, "ended with exit code 3"), (137, "was ended by SIGKILL")])
def test_how_a_child_ended(status: int, words: str) -> None:
    assert how_ended(status) == words
